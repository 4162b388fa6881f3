"""The vision tower: patches of a frame attend within windows, in a few layers within the frame, never across frames."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.qwen2_5_vl.config import VisionConfig
from models.qwen2_5_vl.frames import Windows, rotary, windows
from models.qwen2_5_vl.layers import GatedMLP, State, linear, rms_norm, stack_layers
from models.qwen2_5_vl.rope import rotate
from pallas_kernels.notation import AnyArray

RMS_NORM_EPS = 1e-6
"""Fixed by the published code, in no configuration file."""
FRAME_BATCH_PATCHES = 8192
"""Patches encoded by one call (at least one frame): large enough to fill a chip, small enough to bound memory."""
SCORE_BYTES = 2**28
"""Attention scores of whole-frame layers held at a time; more frames or queries go one after the other."""
MASKED = -1e30
"""Score of a hole in a window; finite, so that an empty window stays free of NaN."""


class VisionAttention(nnx.Module):
    """Attention among the patches of a frame, in windows or whole."""

    def __init__(self, config: VisionConfig, *, dtype: Any, rngs: nnx.Rngs):
        """Random weights; `dtype` holds for parameters and computation."""
        self.config = config
        self.qkv = linear(config.embed_dim, 3 * config.embed_dim, dtype=dtype, rngs=rngs)
        self.out = linear(config.embed_dim, config.embed_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n w p e"], frame: "FrameTables", is_full: Array) -> Float[Array, "n w p e"]:
        """The attention output before the residual; `is_full` chooses the whole frame over the windows."""
        n, w, p, e = x.shape
        heads = (self.config.num_heads, self.config.head_dim)
        q, k, v = (y.reshape(n, w * p, *heads) for y in jnp.split(self.qkv(x), 3, axis=-1))
        q, k = rotate(q, *frame.rotary), rotate(k, *frame.rotary)
        out = jax.lax.cond(is_full, frame.attend_whole, frame.attend_windows, q, k, v)
        return self.out(out.reshape(n, w, p, e))


class VisionLayer(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: VisionConfig, *, dtype: Any, rngs: nnx.Rngs):
        """Random weights; `dtype` holds for parameters and computation."""
        self.attention_norm = rms_norm(config.embed_dim, RMS_NORM_EPS, dtype=dtype, rngs=rngs)
        self.attention = VisionAttention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = rms_norm(config.embed_dim, RMS_NORM_EPS, dtype=dtype, rngs=rngs)
        self.mlp = GatedMLP(config.embed_dim, config.mlp_dim, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n w p e"], frame: "FrameTables", is_full: Array) -> Float[Array, "n w p e"]:
        """The layer's output for a batch of frames in windows."""
        x = x + self.attention(self.attention_norm(x), frame, is_full)
        return x + self.mlp(self.mlp_norm(x))


class Merger(nnx.Module):
    """A block of neighbouring patches to one token of the decoder's width."""

    def __init__(self, config: VisionConfig, *, dtype: Any, rngs: nnx.Rngs):
        """Random weights; `dtype` holds for parameters and computation."""
        self.block_dim = config.block_len * config.embed_dim
        self.norm = rms_norm(config.embed_dim, RMS_NORM_EPS, dtype=dtype, rngs=rngs)
        self.hidden = linear(self.block_dim, self.block_dim, dtype=dtype, rngs=rngs)
        self.out = linear(self.block_dim, config.out_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n p e"]) -> Float[Array, "n t o"]:
        """One row per block of consecutive patches."""
        x = self.norm(x).reshape(x.shape[0], -1, self.block_dim)
        return self.out(jax.nn.gelu(self.hidden(x), approximate=False))


class VisionTower(nnx.Module):
    """Patches of images and videos to tokens of the decoder's width.

    `layers` is one `VisionLayer` whose parameters carry a leading layer axis.
    """

    def __init__(self, config: VisionConfig, *, dtype: Any, rngs: nnx.Rngs):
        """Random weights; `dtype` holds for parameters and computation."""
        self.config = config
        self.dtype = dtype
        self.patch_embed = linear(config.patch_dim, config.embed_dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.layers = stack_layers(lambda rngs: VisionLayer(config, dtype=dtype, rngs=rngs), config.num_layers, rngs)
        self.merger = Merger(config, dtype=dtype, rngs=rngs)

    def __call__(self, patches: Float[AnyArray, "p c"], grids: tuple[tuple[int, int, int], ...]) -> Float[Array, "t o"]:
        """The tokens of every grid, in order of appearance.

        Frames of one size are encoded together, in batches of one length, so that a frame size compiles once however
        long the video; only one batch of patches is on the device at a time.
        """
        _check_patches(patches, grids, self.config)
        if not grids:
            return jnp.zeros((0, self.config.out_dim), self.dtype)
        starts = np.cumsum([0, *(math.prod(grid) for grid in grids)])
        tokens: dict[int, Array] = {}
        for size in dict.fromkeys(grid[1:] for grid in grids):
            members = [i for i, grid in enumerate(grids) if grid[1:] == size]
            first_patch = np.concatenate([starts[i] + math.prod(size) * np.arange(grids[i][0]) for i in members])
            encoded = self._encode_frames(patches, first_patch, size)
            ends = np.cumsum([grids[i][0] for i in members])
            pieces = jnp.split(encoded, ends[:-1].tolist())
            tokens.update((i, piece.reshape(-1, piece.shape[-1])) for i, piece in zip(members, pieces, strict=True))
        return jnp.concatenate([tokens[i] for i in range(len(grids))])

    def encode(self, frames: Float[Array, "n p c"], size: tuple[int, int]) -> Float[Array, "n t o"]:
        """The tokens of frames of one size (rows and columns in patches), all in one call; differentiable."""
        return _encode_batch(*nnx.split(self), frames, size)

    def _encode_frames(
        self, patches: AnyArray, first_patch: np.ndarray, size: tuple[int, int]
    ) -> Float[Array, "n t o"]:
        """All frames of one size, each given by its first patch, in batches of one length."""
        num_frames = len(first_patch)
        largest = max(1, FRAME_BATCH_PATCHES // math.prod(size))
        batch_len = min(largest, 1 << (num_frames - 1).bit_length())
        first_patch = np.pad(first_patch, (0, -num_frames % batch_len), mode="edge")
        graphdef, state = nnx.split(self)
        encoded = []
        for batch in first_patch.reshape(-1, batch_len, 1):
            frames = jnp.asarray(patches[batch + np.arange(math.prod(size))], self.dtype)
            encoded.append(_encode_batch(graphdef, state, frames, size))
        return jnp.concatenate(encoded)[:num_frames]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _encode_batch(
    graphdef: nnx.GraphDef, state: State, frames: Float[Array, "n p c"], size: tuple[int, int]
) -> Float[Array, "n t o"]:
    tower = nnx.merge(graphdef, state)
    config = tower.config
    frame = FrameTables(windows(*size, config), rotary(*size, config), config)
    x = frame.to_windows(tower.patch_embed(frames))
    layer_def, layer_state = nnx.split(tower.layers)
    is_full = np.isin(np.arange(config.num_layers), config.full_attention_layers)

    def step(x, layer):
        state, is_full = layer
        return nnx.merge(layer_def, state)(x, frame, is_full), None

    with jax.named_scope("vision_layers"):
        x, _ = jax.lax.scan(step, x, (layer_state, jnp.asarray(is_full)))
    return tower.merger(frame.to_frames(x))


class FrameTables:
    """What the attention layers need to know of one frame size, as constants of the compiled program."""

    def __init__(self, windows: Windows, rotary: tuple[np.ndarray, np.ndarray], config: VisionConfig):
        """Reorders the rotary tables to the order of the windows."""
        self.windows = windows
        self.is_ragged = not windows.is_real.all()
        order = windows.order.reshape(-1)
        self.rotary = tuple(jnp.asarray(table[order])[None] for table in rotary)
        self.scale = config.head_dim**-0.5

    def to_windows(self, x: Float[Array, "n q e"]) -> Float[Array, "n w p e"]:
        """Patches grouped by window; holes are zero, so that nothing of one window can reach another."""
        grouped = x[:, self.windows.order]
        return jnp.where(self.windows.is_real[None, ..., None], grouped, 0) if self.is_ragged else grouped

    def to_frames(self, x: Float[Array, "n w p e"]) -> Float[Array, "n q e"]:
        """The inverse: patches in the order of the frame."""
        return x.reshape(x.shape[0], -1, x.shape[-1])[:, self.windows.place]

    def attend_windows(self, q: Array, k: Array, v: Array) -> Float[Array, "n k h d"]:
        """Every patch attends to its window."""
        num_windows, window_len = self.windows.order.shape
        shape = (q.shape[0] * num_windows, window_len, *q.shape[2:])
        bias = None
        if self.is_ragged:
            bias = jnp.where(self.windows.is_real, 0.0, MASKED)[:, None, None, :]
            bias = jnp.tile(bias, (q.shape[0], 1, 1, 1))
        return _attend(q.reshape(shape), k.reshape(shape), v.reshape(shape), self.scale, bias).reshape(q.shape)

    def attend_whole(self, q: Array, k: Array, v: Array) -> Float[Array, "n k h d"]:
        """Every patch attends to its frame; the holes are left out of the work."""
        if not self.is_ragged:
            return _attend_in_chunks(q, k, v, self.scale)
        place = self.windows.place
        out = _attend_in_chunks(q[:, place], k[:, place], v[:, place], self.scale)
        return jnp.zeros_like(q).at[:, place].set(out, unique_indices=True)


def _attend(q: Array, k: Array, v: Array, scale: float, bias: Array | None = None) -> Array:
    """Softmax attention with float32 scores; q [n, t, h, d], k and v [n, s, h, d]."""
    scores = jnp.einsum("nthd,nshd->nhts", q, k, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)
    return jnp.einsum("nhts,nshd->nthd", weights.astype(v.dtype), v)


def _attend_in_chunks(q: Array, k: Array, v: Array, scale: float) -> Array:
    """`_attend` one frame and one chunk of queries at a time, as many as keep the scores within `SCORE_BYTES`."""
    n, t, h, _ = q.shape
    row_bytes = 4 * h * t
    if n * t * row_bytes <= SCORE_BYTES:
        return _attend(q, k, v, scale)
    chunk_len = max(1, min(t, SCORE_BYTES // row_bytes))

    def one_frame(frame):
        q, k, v = frame
        rows = jax.lax.map(lambda row: _attend(row[None, None], k[None], v[None], scale)[0, 0], q, batch_size=chunk_len)
        return rows

    return jax.lax.map(one_frame, (q, k, v))


def _check_patches(patches, grids, config: VisionConfig) -> None:
    expected = (sum(math.prod(grid) for grid in grids), config.patch_dim)
    if tuple(patches.shape) != expected:
        raise ValueError(
            f"patches must have one row per patch of {grids=}: expected shape {expected}, got {patches.shape}"
        )
    uneven = [grid for grid in grids if min(grid) < 1 or grid[1] % config.merge_size or grid[2] % config.merge_size]
    if uneven:
        raise ValueError(f"grids need rows and columns in positive multiples of {config.merge_size=}, got {uneven}")
