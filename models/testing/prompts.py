"""Prompts for the tiny model, and tiles, buckets and a pattern that suit them."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mmi_jax import AShape, Blocks, Buckets
from models.families import family_of
from models.interface import Grid, MediumSize
from models.prompt import LazyPatches, Prompt, collate
from models.testing.configs import TINY_CONFIG
from pallas_kernels.notation import AnyArray

BLOCKS = Blocks(q=16, kv=16, granule=16)
BUCKETS = Buckets(smallest=64, largest=256, multiple=16)
STATIC = AShape(sink=16, local=9)
"""Reads no scores: a program without an estimate."""


def prompt(seed: int, *pieces: int | tuple[int, int, int]) -> Prompt:
    """One prompt: a number is so many random text tokens, a triple a video of (frames, rows, columns) of tokens."""
    rng, family = np.random.default_rng(seed), family_of(TINY_CONFIG)
    ids, grids = [], []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(rng.integers(0, TINY_CONFIG.image_token, piece))
        else:
            grids.append((piece[0], 2 * piece[1], 2 * piece[2]))
            ids.append(family.medium_tokens(TINY_CONFIG, MediumSize(grids[-1])))
    num_patches = sum(int(np.prod(grid)) for grid in grids)
    patches = rng.normal(size=(num_patches, TINY_CONFIG.vision.patch_dim)).astype(np.float32)
    return _prompt(np.concatenate(ids).astype(np.int32), grids, patches)


def _prompt(ids: np.ndarray, grids: Sequence[Grid], patches: AnyArray | LazyPatches) -> Prompt:
    """The prompt of these ids, whose videos have a second from frame to frame."""
    tokenized = family_of(TINY_CONFIG).tokenized(TINY_CONFIG, ids, [MediumSize(grid) for grid in grids])
    return collate([tokenized], patches)


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
    whole = _prompt(np.concatenate([prompt.tokens[0], np.asarray(tokens, np.int32)]), prompt.grids, prompt.patches)
    return dataclasses.replace(whole, rope_pos=np.concatenate([prompt.rope_pos, rope_pos], axis=2))


def join(*prompts: Prompt) -> Prompt:
    """One prompt of several single ones, one after another, with positions and layout of the whole."""
    ids = np.concatenate([p.tokens[0] for p in prompts])
    return _prompt(ids, sum((p.grids for p in prompts), ()), np.concatenate([p.patches for p in prompts]))
