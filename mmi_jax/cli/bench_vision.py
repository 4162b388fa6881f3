"""Figures of a vision tower: whole videos from host memory, beside one batch on the device and XLA's attention."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax.bench.rows import rate, row
from mmi_jax.bench.timing import compile_lowered, summary, time_calls

Size = tuple[int, int]
"""Rows and columns of a frame in patches."""


def bench_vision(tower: Any, name: str, size: Size, *, num_frames: int, with_baseline: bool, repeats: int):
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
    one = rng.standard_normal((math.prod(size), config.patch_dim), dtype=np.float32)
    errors = _errors(tower, one, size)
    patches = np.tile(one, (num_frames, 1))
    grids = ((num_frames, *size),)
    compile_ms = time_calls(lambda: tower(patches, grids), jax.block_until_ready, repeats=1)[0]  # its programs are made
    times = time_calls(lambda: tower(patches, grids), jax.block_until_ready, repeats=repeats)
    timing = summary(times, compile_ms=compile_ms)
    flops = num_frames * frame_flops(config, size)
    names: tuple[Literal["cudnn", "xla"] | None, ...] = (None, "xla") if with_baseline else (None,)
    return {
        "case": name,
        "frames": num_frames,
        "patches_per_frame": math.prod(size),
        **errors,
        **rate(flops, timing),
        "frames_per_s": round(num_frames / timing.median_ms * 1e3, 2),
        "tokens_per_s": round(num_frames * math.prod(size) / config.block_len / timing.median_ms * 1e3, 1),
        "others": [
            row(f"one batch on the device{', xla attention' if attention else ''}",
                functools.partial(_one_batch, tower, one, size, num_frames, attention, repeats))
            for attention in names
        ],
    }  # fmt: skip


def frame_flops(config: Any, size: Size) -> float:
    """Floating-point operations of one frame: products and attention, two per multiply-add; holes of windows not."""
    num_patches, e = math.prod(size), config.embed_dim
    window_len = config.block_len * config.window_len**2
    num_full = len(config.full_attention_layers)
    keys = num_full * num_patches + (config.num_layers - num_full) * min(window_len, num_patches)
    layer = 4 * e * e + 3 * e * config.mlp_dim
    block_dim = config.block_len * e
    merger = (block_dim * block_dim + block_dim * config.out_dim) / config.block_len
    return 2.0 * num_patches * (config.num_layers * layer + config.patch_dim * e + merger + 2 * e * keys)


def _errors(tower: Any, patches: np.ndarray, size: Size) -> dict[str, float]:
    """Relative errors against the tower in float32: ours at most twice that of XLA's attention in the same dtype."""
    from models.qwen2_5_vl.vision import VisionTower

    grids = ((1, *size),)
    with jax.default_matmul_precision("highest"):
        want = np.asarray(in_float32(VisionTower, tower)(patches, grids), np.float64)

    def error(attention):
        got = np.asarray(tower(patches, grids, attention=attention).astype(jnp.float32), np.float64)
        return float(np.linalg.norm(got - want) / np.linalg.norm(want))

    ours, plain = error(None), error("xla")
    limit = 2 * plain + float(jnp.finfo(tower.dtype).eps)
    if not ours <= limit:
        raise RuntimeError(f"the tokens' relative error must be at most {limit:.2e}, got {ours:.2e}")
    return {"relative_error": ours, "relative_error_xla": plain}


def in_float32(kind: Any, tower: Any) -> Any:
    """The same weights and computation in float32."""
    from flax import nnx

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: kind(tower.config, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(jnp.float32), nnx.split(tower)[1]))


def _one_batch(tower, patches, size: Size, num_frames: int, attention, repeats: int) -> dict[str, Any]:
    """One batch of the call's own length."""
    from flax import nnx

    from models.qwen2_5_vl.vision import batch_frames, encode_batch

    length = batch_frames(num_frames, size)
    graphdef, state = nnx.split(tower)
    frames = jnp.broadcast_to(jnp.asarray(patches), (length, *patches.shape))
    program = compile_lowered(encode_batch.lower(graphdef, state, frames, size, attention))
    timing = program.time(state, frames, repeats=repeats)
    return {"frames": length} | rate(length * frame_flops(tower.config, size), timing)
