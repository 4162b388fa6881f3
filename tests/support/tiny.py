"""A tiny random model and prompts for it, small enough that a test costs little more than its compilation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmi_jax import AShape, Blocks, Buckets
from mmi_jax.layout import stack
from models.prompt import Prompt
from models.qwen2_5_vl import Qwen2_5_VL, Qwen2_5_VLConfig, VisionConfig
from models.qwen2_5_vl.rope import mrope_positions, token_layout

BLOCKS = Blocks(q=16, kv=16, granule=16)
BUCKETS = Buckets(smallest=64, largest=256, multiple=16)
STATIC = AShape(sink=16, local=9)
VIDEO, START, END = 37, 38, 39
CONFIG = Qwen2_5_VLConfig(
    num_layers=3,
    embed_dim=16,
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=40,
    tie_embeddings=True,
    mrope_section=(2, 1, 1),
    rope_theta=100.0,
    image_token=36,
    video_token=VIDEO,
    vision_start_token=START,
    vision_end_token=END,
    vision=VisionConfig(
        num_layers=1,
        embed_dim=8,
        mlp_dim=8,
        num_heads=1,
        out_dim=16,
        full_attention_layers=(0,),
        patch_size=2,
        window_size=8,
    ),
)


@functools.cache
def tiny_model() -> Qwen2_5_VL:
    """Random weights and biases, large enough that attention is far from uniform; the same object every time."""
    abstract = nnx.eval_shape(lambda: Qwen2_5_VL(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        width = leaf.shape[-2] if "kernel" in name else 1 if "embedding" in name else 16
        values = rng.normal(size=leaf.shape) / np.sqrt(width)
        if "scale" in name:
            values = 1 + 0.2 * values
        return jnp.asarray(2 * values if ".q" in name or "'q'" in name else values, leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


def prompt(seed: int, *pieces: int | tuple[int, int, int]) -> Prompt:
    """One prompt: a number is so many random text tokens, a triple a video of (frames, rows, columns) of tokens."""
    rng = np.random.default_rng(seed)
    tokens, grids = [], []
    for piece in pieces:
        if isinstance(piece, int):
            tokens.append(rng.integers(0, 36, piece))
        else:
            tokens.append(np.concatenate([[START], np.full(np.prod(piece), VIDEO), [END]]))
            grids.append((piece[0], 2 * piece[1], 2 * piece[2]))
    ids = np.concatenate(tokens).astype(np.int32)
    num_patches = sum(int(np.prod(grid)) for grid in grids)
    return Prompt(
        tokens=ids[None],
        rope_pos=mrope_positions(ids, grids, [1.0] * len(grids), CONFIG)[:, None],
        layout=stack([token_layout(ids, grids, CONFIG)]),
        patches=rng.normal(size=(num_patches, CONFIG.vision.patch_dim)).astype(np.float32),
        grids=tuple(grids),
    )


def batch(*prompts: Prompt) -> Prompt:
    """Several prompts as one batch, padded on the right with tokens and positions that must not be read."""
    longest = max(p.tokens.shape[1] for p in prompts)
    padded = [pad(p, longest) for p in prompts]
    return Prompt(
        tokens=np.concatenate([p.tokens for p in padded]),
        rope_pos=np.concatenate([p.rope_pos for p in padded], axis=1),
        layout=jax.tree.map(lambda *rows: np.concatenate(rows), *[p.layout for p in padded]),
        patches=np.concatenate([p.patches for p in padded]),
        grids=sum((p.grids for p in padded), ()),
    )


def pad(prompt: Prompt, num_tokens: int) -> Prompt:
    """The prompt with padding appended up to `num_tokens`."""
    width = num_tokens - prompt.tokens.shape[1]
    return dataclasses.replace(
        prompt,
        tokens=np.pad(prompt.tokens, [(0, 0), (0, width)], constant_values=7),
        rope_pos=np.pad(prompt.rope_pos, [(0, 0), (0, 0), (0, width)], constant_values=99),
        layout=jax.tree.map(np.asarray, prompt.layout.pad_to(num_tokens)),
    )


def extend(prompt: Prompt, tokens) -> Prompt:
    """The single prompt followed by text tokens."""
    first = int(prompt.rope_pos.max()) + 1
    rope_pos = np.broadcast_to(np.arange(first, first + len(tokens), dtype=np.int32), (3, 1, len(tokens)))
    ids = np.concatenate([prompt.tokens[0], np.asarray(tokens, np.int32)])
    return dataclasses.replace(
        prompt,
        tokens=ids[None],
        rope_pos=np.concatenate([prompt.rope_pos, rope_pos], axis=2),
        layout=stack([token_layout(ids, prompt.grids, CONFIG)]),
    )


def join(*prompts: Prompt) -> Prompt:
    """One prompt of several single ones, one after another, placed and laid out as a whole."""
    ids = np.concatenate([p.tokens[0] for p in prompts])
    grids = sum((p.grids for p in prompts), ())
    return Prompt(
        tokens=ids[None],
        rope_pos=mrope_positions(ids, grids, [1.0] * len(grids), CONFIG)[:, None],
        layout=stack([token_layout(ids, grids, CONFIG)]),
        patches=np.concatenate([p.patches for p in prompts]),
        grids=grids,
    )


@jax.jit
def forward(model: Any, prompt: Prompt) -> jax.Array:
    """Logits of every token by the model's own dense forward pass; compiled once per shape."""
    return model(prompt)


def last_logits(model: Qwen2_5_VL, prompt: Prompt, num_tokens: int = 64) -> np.ndarray:
    """Logits after each prompt's last token, by the plain forward pass."""
    lengths = np.asarray(prompt.layout.is_real).sum(axis=1)
    return np.asarray(forward(model, pad(prompt, num_tokens)))[np.arange(len(lengths)), lengths - 1]
