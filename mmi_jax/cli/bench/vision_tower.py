"""Figures of a vision tower: videos from host memory, compared with one batch on the device and XLA's attention."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax.bench.timing.measurements import measurement, rate
from mmi_jax.bench.timing.wall_time import summary, time_calls
from models.interface import FrameSize, VisionImplementation, VisionTower


def bench_vision(tower: VisionTower, name: str, size: FrameSize, *, num_frames: int, with_baseline: bool, repeats: int):
    """Figures of frames of one size, float32 patches in host memory; a frame is a temporal patch.

    `median_ms` is the whole call, copies from the host included; "one batch" has its patches on the device already.

    Args:
      tower: a `VisionTower`, weights in the dtype to be timed.
      name: of the case.
      num_frames: of the video.
      with_baseline: also times one batch with XLA's attention.
      repeats: measurements of each program.

    Raises:
      RuntimeError: the tokens of a frame are wrong; a wrong tower is not timed.
    """
    config = tower.config
    rng = np.random.default_rng(0)
    frame = rng.standard_normal((math.prod(size), config.patch_dim), dtype=np.float32)
    patches, grids = np.tile(frame, (num_frames, 1)), ((num_frames, *size),)
    start = time.perf_counter()
    tokens = jax.block_until_ready(tower(patches, grids))
    compile_ms = (time.perf_counter() - start) * 1e3
    errors = _errors(tower, frame, size, tokens.reshape(num_frames, -1, config.out_dim)[-1])
    del tokens
    timing = summary(
        time_calls(lambda: tower(patches, grids), jax.block_until_ready, repeats=repeats), compile_ms=compile_ms
    )
    flops = num_frames * tower.frame_flops(size)
    names: tuple[VisionImplementation | None, ...] = (None, "xla") if with_baseline else (None,)
    batches = {
        f"one batch on the device{', xla attention' if attention else ''}": functools.partial(
            _one_batch, tower, frame, size, num_frames, attention, repeats
        )
        for attention in names
    }
    return {
        "case": name,
        "frames": num_frames,
        "patches_per_frame": math.prod(size),
        **errors,
        **rate(flops, timing),
        "frames_per_s": round(num_frames / timing.median_ms * 1e3, 2),
        "tokens_per_s": round(num_frames * math.prod(size) / config.block_len / timing.median_ms * 1e3, 1),
        "others": [measurement(name, measure) for name, measure in batches.items()],
    }


def _errors(tower: VisionTower, patches: np.ndarray, size: FrameSize, ours: jax.Array) -> dict[str, float]:
    """Relative errors against the tower in float32: ours at most twice that of XLA's attention in the same dtype.

    A GPU's products of float32 are TF32 by default: an eighth of bfloat16's rounding. Exact ones took XLA
    longer to compile than everything else together.
    """
    grids = ((1, *size),)
    want = np.asarray(in_float32(tower)(patches, grids), np.float64)

    def error(tokens):
        return float(np.linalg.norm(np.asarray(tokens.astype(jnp.float32)) - want) / np.linalg.norm(want))

    errors = {"relative_error": error(ours), "relative_error_xla": error(tower(patches, grids, attention="xla"))}
    of_reference = 16 * tower.config.num_layers * 2.0**-24  # float32 too, and its sums have an order
    limit = 2 * errors["relative_error_xla"] + float(jnp.finfo(tower.dtype).eps) + of_reference
    if not errors["relative_error"] <= limit:
        raise RuntimeError(
            f"the tokens' relative error must be at most {limit:.2e}, got {errors['relative_error']:.2e}"
        )
    return errors


def in_float32(tower: VisionTower) -> VisionTower:
    """The same weights and computation in float32."""
    from flax import nnx

    new_tower = cast(Callable[..., VisionTower], type(tower))
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: new_tower(tower.config, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(jnp.float32), nnx.split(tower)[1]))


def _one_batch(
    tower: VisionTower,
    patches: np.ndarray,
    size: FrameSize,
    num_frames: int,
    attention: VisionImplementation | None,
    repeats: int,
) -> dict[str, Any]:
    """One batch of the call's length."""
    length, encode = tower.batch_frames(num_frames, size), tower.encoder(size, attention)
    frames = jnp.broadcast_to(jnp.asarray(patches), (length, *patches.shape))

    def call():
        return encode(frames)

    timing = summary(time_calls(call, jax.block_until_ready, repeats=repeats), compile_ms=0.0)
    return {"frames": length} | rate(length * tower.frame_flops(size), timing)
