"""The vision tower: patches of a frame attend within windows, in a few layers within the frame, never across frames."""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.qwen2_5_vl.config import VisionConfig
from models.qwen2_5_vl.layers import GatedMLP, State, linear, rms_norm, stack_layers
from models.qwen2_5_vl.vision.attention import FrameTables, Implementation, rotate
from models.qwen2_5_vl.vision.windows import rotary, windows
from pallas_kernels.notation import AnyArray

RMS_NORM_EPS = 1e-6
"""A constant of the published code (the norms of transformers' Qwen2_5_VLVisionBlock), in no configuration file."""

FRAME_BATCH_PATCHES = 16384
"""Patches encoded by one call (at least one frame): large enough to fill a chip, small enough to bound memory."""

MLP_MULTIPLE = 128
"""The hidden width of the MLP is padded to a multiple of this where it runs in 16 bits: see `_aligned`."""

BATCHES_IN_FLIGHT = 2
"""Batches whose patches are on the device at a time: one is encoded while the next one arrives."""


class VisionAttention(nnx.Module):
    """Attention among the patches of a frame, in windows or whole."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        """Random weights; `dtype` holds for parameters and computation."""
        self.config = config
        self.qkv = linear(config.embed_dim, 3 * config.embed_dim, dtype=dtype, rngs=rngs)
        self.out = linear(config.embed_dim, config.embed_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n q e"], frame: FrameTables, is_full: bool) -> Float[Array, "n q e"]:
        """The attention output before the residual; `is_full` chooses the whole frame over the windows."""
        shape = *x.shape[:2], self.config.num_heads, self.config.head_dim
        q, k, v = (y.reshape(shape) for y in jnp.split(self.qkv(x), 3, axis=-1))
        q, k = rotate(q, *frame.rotary), rotate(k, *frame.rotary)
        out = frame.attend_whole(q, k, v) if is_full else frame.attend_windows(q, k, v)
        return self.out(out.reshape(x.shape))


class VisionLayer(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        """Random weights; `dtype` holds for parameters and computation."""
        self.attention_norm = rms_norm(config.embed_dim, RMS_NORM_EPS, dtype=dtype, rngs=rngs)
        self.attention = VisionAttention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = rms_norm(config.embed_dim, RMS_NORM_EPS, dtype=dtype, rngs=rngs)
        self.mlp = GatedMLP(config.embed_dim, config.mlp_dim, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n q e"], frame: FrameTables, is_full: bool) -> Float[Array, "n q e"]:
        """The layer's output for a batch of frames in window order."""
        x = x + self.attention(self.attention_norm(x), frame, is_full)
        return x + self.mlp(self.mlp_norm(x))


class Merger(nnx.Module):
    """A block of neighbouring patches to one token of the decoder's width."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
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

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        """Random weights; `dtype` holds for parameters and computation."""
        self.config = config
        self.dtype = dtype
        self.patch_embed = linear(config.patch_dim, config.embed_dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.layers = stack_layers(lambda rngs: VisionLayer(config, dtype=dtype, rngs=rngs), config.num_layers, rngs)
        self.merger = Merger(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        patches: Float[AnyArray, "p c"],
        grids: tuple[tuple[int, int, int], ...],
        *,
        attention: Implementation | None = None,
    ) -> Float[Array, "t o"]:
        """The tokens of every grid, in order of appearance.

        Frames of one size are encoded together, in batches of one length, so that a frame size compiles once however
        long the video; only two batches of patches are on the device at a time.
        """
        _check_patches(patches, grids, self.config)
        if not grids:
            return jnp.zeros((0, self.config.out_dim), self.dtype)
        starts = np.cumsum([0, *(math.prod(grid) for grid in grids)])
        tokens: dict[int, Array] = {}
        for size in dict.fromkeys(grid[1:] for grid in grids):
            members = [i for i, grid in enumerate(grids) if grid[1:] == size]
            first_patch = np.concatenate([starts[i] + math.prod(size) * np.arange(grids[i][0]) for i in members])
            encoded = self._encode_frames(patches, first_patch, size, attention)
            ends = np.cumsum([grids[i][0] for i in members])
            pieces = jnp.split(encoded, ends[:-1].tolist())
            tokens.update((i, piece.reshape(-1, piece.shape[-1])) for i, piece in zip(members, pieces, strict=True))
        return jnp.concatenate([tokens[i] for i in range(len(grids))])

    def encode(self, frames: Float[Array, "n p c"], size: tuple[int, int]) -> Float[Array, "n t o"]:
        """The tokens of frames of one size (rows and columns in patches), all in one call; differentiable."""
        return self.encoder(size)(frames)

    def encoder(
        self,
        size: tuple[int, int],
        attention: Implementation | None = None,
    ) -> Callable[[Float[AnyArray, "n p c"]], Float[Array, "n t o"]]:
        """A function from the patches of frames of one size to their tokens: one call of a compiled program."""
        graphdef, state = nnx.split(self)
        return lambda frames: encode_batch(graphdef, state, frames, size, attention)

    def batch_frames(self, num_frames: int, size: tuple[int, int]) -> int:
        """Frames that are encoded in one call, of a video of so many."""
        return batch_frames(num_frames, size)

    def frame_flops(self, size: tuple[int, int]) -> float:
        """Floating-point operations of one frame of a size."""
        return frame_flops(self.config, size)

    def _encode_frames(
        self,
        patches: AnyArray,
        first_patch: np.ndarray,
        size: tuple[int, int],
        attention: Implementation | None,
    ) -> Float[Array, "n t o"]:
        """All frames of one size, each given by its first patch, in batches of one length.

        Batches are dispatched ahead, so that the copy of one hides behind the work on another; the host waits only
        before a third would be on the device.
        """
        num_frames = len(first_patch)
        batch_len = batch_frames(num_frames, size)
        first_patch = np.pad(first_patch, (0, -num_frames % batch_len), mode="edge")
        graphdef, state = nnx.split(self)
        encoded = []
        for batch in first_patch.reshape(-1, batch_len):
            frames = _frames(patches, batch, math.prod(size))
            encoded.append(encode_batch(graphdef, state, frames, size, attention))
            if len(encoded) >= BATCHES_IN_FLIGHT:
                jax.block_until_ready(encoded[-BATCHES_IN_FLIGHT])
        return jnp.concatenate(encoded)[:num_frames]


def batch_frames(num_frames: int, size: tuple[int, int]) -> int:
    """Frames of one batch of a video: a power of two, or as many as `FRAME_BATCH_PATCHES` are."""
    largest = max(1, FRAME_BATCH_PATCHES // math.prod(size))
    return min(largest, 1 << (num_frames - 1).bit_length())


def frame_flops(config: VisionConfig, size: tuple[int, int]) -> float:
    """Floating-point operations of one frame: products and attention, two per multiply-add; holes of windows not."""
    num_patches, e = math.prod(size), config.embed_dim
    window_len = config.block_len * config.window_len**2
    num_full = len(config.full_attention_layers)
    keys = num_full * num_patches + (config.num_layers - num_full) * min(window_len, num_patches)
    layer = 4 * e * e + 3 * e * config.mlp_dim
    block_dim = config.block_len * e
    merger = (block_dim * block_dim + block_dim * config.out_dim) / config.block_len
    return 2.0 * num_patches * (config.num_layers * layer + config.patch_dim * e + merger + 2 * e * keys)


def _frames(patches: AnyArray, first_patch: np.ndarray, frame_len: int) -> AnyArray:
    """The patches `[n, q, c]` of some frames: a view where they follow each other, as those of a video do."""
    if (np.diff(first_patch) == frame_len).all():
        return patches[first_patch[0] : first_patch[-1] + frame_len].reshape(len(first_patch), frame_len, -1)
    return patches[first_patch[:, None] + np.arange(frame_len)]


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def encode_batch(
    graphdef: nnx.GraphDef,
    state: State,
    frames: Float[AnyArray, "n p c"],
    size: tuple[int, int],
    attention: Implementation | None = None,
) -> Float[Array, "n t o"]:
    """The tokens of frames of one size, `[rows, columns]` in patches: one program for a tower, a number and a size."""
    tower = nnx.merge(graphdef, state)
    config = tower.config
    frame = FrameTables(windows(*size, config), rotary(*size, config), config, attention)
    x = frame.to_window_order(tower.patch_embed(frames.astype(tower.dtype)))
    layer_def, layer_state = nnx.split(tower.layers)
    period, runs = _runs(config)

    def group(x, start):
        for first, end, is_full in runs:

            def layer(x, n, is_full=is_full):
                weights = _aligned(jax.tree.map(lambda a: a[start + n], layer_state), config)
                return nnx.merge(layer_def, weights)(x, frame, is_full), None

            with jax.named_scope("whole_frame_layers" if is_full else "window_layers"):
                x, _ = jax.lax.scan(layer, x, jnp.arange(first, end))
        return x, None

    x, _ = jax.lax.scan(group, x, jnp.arange(0, config.num_layers, period))
    return tower.merger(frame.to_frame_order(x))


def _runs(config: VisionConfig) -> tuple[int, list[tuple[int, int, bool]]]:
    """The layers after which the kinds repeat, and runs of one kind up to there: (first, end, attends to the frame).

    A loop for each run, not one over all layers with a branch inside: on a GPU the host would wait at each branch.
    """
    n = config.num_layers
    is_full = [layer in config.full_attention_layers for layer in range(n)]
    period = next(p for p in range(1, n + 1) if n % p == 0 and is_full == is_full[:p] * (n // p))
    starts = [m for m in range(period) if m == 0 or is_full[m] != is_full[m - 1]]
    return period, [(first, end, is_full[first]) for first, end in itertools.pairwise([*starts, period])]


def _aligned(weights: State, config: VisionConfig) -> State:
    """A layer's weights with zeros up to a hidden width of the MLP that Hopper's matrix products run well at.

    The published 3420 is no multiple of 8: measured, 9 ms of 30 for 8192 patches. Zeros add exactly nothing.
    """
    missing = -config.mlp_dim % MLP_MULTIPLE
    if not missing or weights["mlp"]["up"]["kernel"].dtype == jnp.float32:
        return weights

    def pad(path, a):
        name = jax.tree_util.keystr(path)
        if "mlp" not in name or "norm" in name:
            return a
        axis = a.ndim - 1 if "gate" in name or "up" in name else 0
        return (
            jnp.pad(a, [(0, missing if n == axis else 0) for n in range(a.ndim)])
            if a.shape[axis] == config.mlp_dim
            else a
        )

    return jax.tree_util.tree_map_with_path(pad, weights)


def _check_patches(patches, grids, config: VisionConfig) -> None:
    expected = (sum(math.prod(grid) for grid in grids), config.patch_dim)
    if tuple(patches.shape) != expected:
        raise ValueError(
            f"patches must have one row per patch of {grids=}: expected shape {expected}, got {patches.shape}"
        )
    uneven = [grid for grid in grids if min(grid) < 1 or grid[1] % config.merge_size or grid[2] % config.merge_size]
    if uneven:
        raise ValueError(f"grids need rows and columns in positive multiples of {config.merge_size=}, got {uneven}")
