"""Attention among the patches of a frame: cuDNN's fused attention on Hopper GPUs, XLA elsewhere."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from models.qwen2_5_vl.config import VisionConfig
from models.qwen2_5_vl.vision.windows import Windows
from pallas_kernels.device import has_hopper_gpu

Implementation = Literal["cudnn", "xla"]
"""cuDNN's fused attention through JAX, or scores in float32 that XLA holds in memory."""

SCORE_BYTES = 2**28
"""Attention scores of whole-frame layers that XLA holds at a time; more frames or queries go one after the other."""
MASKED = -1e30
"""Score of a hole in a window: finite, and far below every real one."""


class FrameTables:
    """Inputs of the attention layers that depend on the frame size, as constants of the compiled program."""

    def __init__(
        self,
        windows: Windows,
        rotary: tuple[np.ndarray, np.ndarray],
        config: VisionConfig,
        implementation: Implementation | None = None,
    ):
        """Reorders the rotary tables to window order; `implementation` is that of `attend`."""
        self.windows = windows
        self.implementation: Implementation | None = implementation
        self.rotary = tuple(jnp.asarray(table[windows.order])[None] for table in rotary)
        self.scale = config.head_dim**-0.5

    def to_window_order(self, x: Float[Array, "n q e"]) -> Float[Array, "n q e"]:
        """Patches of the frame, window by window."""
        return x[:, self.windows.order]

    def to_frame_order(self, x: Float[Array, "n q e"]) -> Float[Array, "n q e"]:
        """The inverse."""
        return x[:, np.argsort(self.windows.order)]

    def attend_windows(self, q: Array, k: Array, v: Array) -> Float[Array, "n q h d"]:
        """Every patch attends to its window; windows are filled up for this alone, so that holes cost nothing else."""
        num_windows, window_len = self.windows.rows.shape
        shape = (q.shape[0] * num_windows, window_len, *q.shape[2:])
        lengths, is_ragged = None, self.windows.is_ragged
        if is_ragged:
            q, k, v = (x[:, self.windows.rows.reshape(-1)] for x in (q, k, v))
            lengths = np.tile(self.windows.lengths, q.shape[0])
        q_rows, k_rows, v_rows = (x.reshape(shape) for x in (q, k, v))
        out = attend(q_rows, k_rows, v_rows, self.scale, lengths, self.implementation).reshape(q.shape)
        return out[:, self.windows.filled] if is_ragged else out

    def attend_whole(self, q: Array, k: Array, v: Array) -> Float[Array, "n q h d"]:
        """Every patch attends to its frame, in whatever order."""
        return attend(q, k, v, self.scale, None, self.implementation)


def rotate(
    x: Float[Array, "n t h d"],
    cos: Float[Array, "1 t d"],
    sin: Float[Array, "1 t d"],
) -> Float[Array, "n t h d"]:
    """As `rope.rotate`, by a reversal in place of a concatenation: one pass over memory on a GPU."""
    halves = (*x.shape[:-1], 2, x.shape[-1] // 2)
    x32 = x.astype(jnp.float32).reshape(halves)
    sign = np.array([-1.0, 1.0], np.float32).reshape(*[1] * (x.ndim - 1), 2, 1)
    cos, sin = (table[..., None, :].reshape(*table.shape[:-1], 1, *halves[-2:]) for table in (cos, sin))
    return (x32 * cos + jnp.flip(x32, axis=-2) * (sin * sign)).reshape(x.shape).astype(x.dtype)


def attend(
    q: Float[Array, "n t h d"],
    k: Float[Array, "n t h d"],
    v: Float[Array, "n t h d"],
    scale: float,
    lengths: Int32[np.ndarray, " n"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "n t h d"]:
    """Softmax attention of every patch to all patches of its row, or the first `lengths` of them.

    None takes cuDNN on a Hopper GPU for 16-bit values with a head dim that is a multiple of 8 (bench/RESULTS.md has
    both at the same time), and XLA for everything else.
    """
    if implementation is None:
        fits = has_hopper_gpu() and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0
        implementation = "cudnn" if fits else "xla"
    return (attend_fused if implementation == "cudnn" else attend_in_chunks)(q, k, v, scale, lengths)


def attend_fused(
    q,
    k,
    v,
    scale: float,
    lengths: np.ndarray | None = None,
    implementation: Implementation = "cudnn",
) -> Float[Array, "n t h d"]:
    """`attend` as one call of JAX's attention; rows past `lengths` come out as anything finite."""
    rows = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, query_seq_lengths=rows, key_value_seq_lengths=rows, implementation=implementation
    )


def attend_in_chunks(q, k, v, scale: float, lengths: np.ndarray | None = None):
    """`attend` one row and one chunk of queries at a time, as many as keep the scores within `SCORE_BYTES`."""
    n, t, h, _ = q.shape
    row_bytes = 4 * h * t
    if lengths is not None or n * t * row_bytes <= SCORE_BYTES:
        return _attend(q, k, v, scale, lengths)
    chunk_len = max(1, min(t, SCORE_BYTES // row_bytes))

    def one_frame(frame):
        q, k, v = frame
        return jax.lax.map(lambda row: _attend(row[None, None], k[None], v[None], scale)[0, 0], q, batch_size=chunk_len)

    return jax.lax.map(one_frame, (q, k, v))


def _attend(q, k, v, scale: float, lengths: np.ndarray | None = None):
    scores = jnp.einsum("nthd,nshd->nhts", q, k, preferred_element_type=jnp.float32) * scale
    if lengths is not None:
        is_key = np.arange(k.shape[1]) < lengths[:, None]
        scores = jnp.where(is_key[:, None, None], scores, MASKED)
    return jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
