"""Synthetic heads for benchmarks and tests: queries and keys with the structure of trained heads, at known places.

On isotropic random inputs no sparse pattern exists and a dynamic method's time means nothing. Here every key carries a
few features and every query weights them, so that softmax attention has, above noise:

- locality: a smooth peak around the query, from Fourier features of the position;
- sinks: the first four tokens;
- vertical lines: all tokens at one place of their frame;
- slashes: the tokens at the query's place in other frames;
- columns: a few tokens anywhere that everyone attends to.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax.layout import TokenLayout, concatenate, text_tokens, vision_tokens
from mmi_jax.method.token_groups import NO_GROUP, FramePlace
from pallas_kernels.notation import Array, Float

NUM_FREQUENCIES = 8
PLACE_DIM = 24
NUM_SINKS = 4
"""Tokens at the start that act as sinks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadStructure:
    """Scores, in nats above noise, that a head's structures reach; 0 for none.

    Args:
      local: at distance 0; it falls off over a few hundred tokens.
      sink: on the first four tokens.
      vertical: on the tokens at place `phase` of their frame.
      slash: on the tokens at the query's place.
      column: on the chosen columns.
      phase: place in a frame, row-major.
    """

    local: float = 10.0
    sink: float = 12.0
    vertical: float = 0.0
    slash: float = 0.0
    column: float = 0.0
    phase: int = 0


GRID = HeadStructure(vertical=9.0, phase=7)
GRID_SLASH = HeadStructure(vertical=8.0, slash=9.0, phase=7)
VERTICAL_SLASH = HeadStructure(column=10.0)
LOCAL = HeadStructure(local=14.0, sink=14.0)


def video_prompt(
    num_tokens: int, *, rows: int = 16, columns: int = 16, head_text: int = 64, tail_text: int = 448
) -> TokenLayout:
    """Text, as many whole frames as fit, text: `num_tokens` tokens in all."""
    num_frames = (num_tokens - head_text - tail_text) // (rows * columns)
    if num_frames < 1:
        raise ValueError(f"num_tokens must hold one frame of {rows * columns}, got {num_tokens=}")
    tail = num_tokens - head_text - num_frames * rows * columns
    return concatenate([text_tokens(head_text), vision_tokens(num_frames, rows, columns), text_tokens(tail)])


def synthetic_qkv(
    layout: TokenLayout,
    heads: tuple[HeadStructure, ...],
    *,
    num_kv_heads: int,
    head_dim: int,
    dtype="bfloat16",
    seed: int = 0,
    num_columns: int = 64,
) -> tuple[Float[Array, "t h d"], Float[Array, "t g d"], Float[Array, "t g d"]]:
    """Queries, keys and values of one example; scores are meant for scale `head_dim ** -0.5`.

    Args:
      layout: one example, fields [t].
      heads: structure of each query head.
      head_dim: at least 64; what the features leave is noise.
    """
    num_features = 2 * NUM_FREQUENCIES + PLACE_DIM + 2
    if head_dim < num_features + 8:
        raise ValueError(f"head_dim must be at least {num_features + 8} to hold the features, got {head_dim}")
    rng = np.random.default_rng(seed)
    codes = rng.standard_normal((4096, PLACE_DIM))
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    columns = rng.choice(layout.num_tokens, min(num_columns, layout.num_tokens), replace=False)
    weights = np.array([(x.local, x.sink, x.vertical, x.slash, x.column, x.phase) for x in heads])
    return _build(
        jax.tree.map(jnp.asarray, layout),
        jnp.asarray(codes, jnp.float32),
        jnp.asarray(columns),
        jnp.asarray(weights),
        jax.random.key(seed),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=jnp.dtype(dtype),
    )


def _build(layout, codes, columns, weights, key, *, num_kv_heads: int, head_dim: int, dtype):
    num_tokens, num_heads = layout.num_tokens, weights.shape[0]
    place = FramePlace().of(layout)
    code = jnp.where((place != NO_GROUP)[:, None], codes[place % codes.shape[0]], 0.0)
    waves = _waves(layout.pos)
    is_sink = (layout.pos < NUM_SINKS).astype(jnp.float32)[:, None]
    is_column = jnp.zeros((num_tokens, 1)).at[columns].set(1.0)
    features = jnp.concatenate([waves, code, is_sink, is_column], axis=1)
    noise_dim = head_dim - features.shape[1]
    q_key, k_key, v_key = jax.random.split(key, 3)

    def kv_head(key):
        return jnp.concatenate([features, jax.random.normal(key, (num_tokens, noise_dim))], axis=1).astype(dtype)

    def q_head(weight, key):
        local, sink, vertical, slash, column, phase = weight
        target = vertical * codes[phase.astype(jnp.int32)][None] + slash * code
        ones = jnp.ones((num_tokens, 1))
        parts = [local * waves, target, sink * ones, column * ones]
        noise = jax.random.normal(key, (num_tokens, noise_dim)) / noise_dim**0.5
        return (jnp.concatenate([*parts, noise], axis=1) * head_dim**0.5).astype(dtype)

    keys = jax.vmap(kv_head)(jax.random.split(k_key, num_kv_heads))
    queries = jax.lax.map(lambda x: q_head(*x), (weights, jax.random.split(q_key, num_heads)))
    values = jax.random.normal(v_key, (num_kv_heads, num_tokens, head_dim), dtype)
    return queries.transpose(1, 0, 2), keys.transpose(1, 0, 2), values.transpose(1, 0, 2)


def _waves(pos):
    """Fourier features of norm 1 whose inner product falls from 1 at distance 0 towards noise at a few hundred."""
    periods = (jnp.geomspace(64.0, 4096.0, NUM_FREQUENCIES) * jnp.sqrt(2.0))[None]
    angle = 2 * jnp.pi * jnp.mod(pos[:, None].astype(jnp.float32), periods) / periods
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1) / NUM_FREQUENCIES**0.5
