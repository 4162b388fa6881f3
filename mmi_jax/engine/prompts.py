"""A batch of prompts: checked, padded to a bucket, and put behind what a cache holds."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax.engine.kv_cache import KVCache
from mmi_jax.layout import PADDING, TokenLayout
from pallas_kernels.notation import Array, Int32


def lengths_of(prompt: Any) -> np.ndarray:
    """Tokens of each prompt; raises ValueError for a batch that cannot be run."""
    is_real = np.asarray(prompt.layout.is_real)
    if is_real.ndim != 2:
        raise ValueError(f"the layout's fields must be [b, t], got shape {is_real.shape}")
    lengths = is_real.sum(axis=1)
    if not len(lengths) or lengths.min() < 1:
        raise ValueError(f"every prompt of a batch must have at least one token, got lengths {lengths.tolist()}")
    if (is_real != (np.arange(is_real.shape[1]) < lengths[:, None])).any():
        raise ValueError("prompts of a batch must be padded on the right only, got padding before a token")
    if prompt.tokens.shape != is_real.shape or prompt.rope_pos.shape != (3, *is_real.shape):
        raise ValueError(
            f"tokens and rope_pos must fit the layout {is_real.shape}: "
            f"got {prompt.tokens.shape} and {prompt.rope_pos.shape}"
        )
    return lengths


def wanted_tokens(lengths: np.ndarray, logits_at: Any) -> np.ndarray:
    """Tokens whose hidden states are wanted, `[b, 1 + n]`: each prompt's last, then those of `logits_at`."""
    last = lengths[:, None] - 1
    if logits_at is None:
        return last
    asked = np.asarray(logits_at)
    if asked.ndim != 2 or asked.shape[0] != len(lengths) or not np.issubdtype(asked.dtype, np.integer):
        raise ValueError(
            f"logits_at must be integers [b, n] with one row for each of the {len(lengths)} prompts: "
            f"got {asked.dtype} {asked.shape}"
        )
    if ((asked < 0) | (asked > last)).any():
        example, n = np.argwhere((asked < 0) | (asked > last))[0]
        raise ValueError(
            f"logits_at must name tokens of the prompt: prompt {example} has {lengths[example]}, "
            f"got token {asked[example, n]}"
        )
    return np.concatenate([last, asked], axis=1)


def fit_prompt(prompt: Any, num_tokens: int) -> Any:
    """The prompt cut, or padded at its end, to `num_tokens`, host arrays: what is made of it has a bucket's shapes.

    All padding is token 0, whatever the caller wrote there: its keys and values are then finite.
    """
    tokens = np.where(np.asarray(prompt.layout.is_real), np.asarray(prompt.tokens), 0).astype(np.int32)
    return dataclasses.replace(
        prompt,
        tokens=_fit(tokens, num_tokens, 0),
        rope_pos=_fit(prompt.rope_pos, num_tokens, 0),
        layout=fit_layout(prompt.layout, num_tokens),
    )


def fit_layout(layout: TokenLayout, num_tokens: int) -> TokenLayout:
    """The layout cut, or padded at its end, to `num_tokens`, host arrays."""
    return jax.tree.map(lambda x: _fit(x, num_tokens, PADDING), layout)


def _fit(x, num_tokens: int, value: int) -> np.ndarray:
    x = np.asarray(x)[..., :num_tokens]
    return np.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, num_tokens - x.shape[-1])], constant_values=value)


def held_tokens(cache: KVCache) -> int:
    """Tokens of each prompt in a cache that is to be continued.

    Raises:
      ValueError: the prompts hold different numbers of tokens, so that no chunk could be written in one place.
    """
    lengths = np.asarray(cache.lengths)
    if (lengths != lengths[0]).any():
        raise ValueError(
            "prompts that are continued together must hold equally many tokens, so that what follows has one place in "
            f"the cache: got {lengths.tolist()}; continue each on its own"
        )
    return int(lengths[0])


def check_cache(cache: KVCache, model: Any, *, batch: int) -> None:
    """Raises ValueError unless the cache is of this model and of as many prompts."""
    config = model.config
    expected = (config.num_layers, batch, cache.capacity, config.num_kv_heads, config.head_dim)
    if cache.k.shape != expected or cache.k.dtype != model.dtype:
        raise ValueError(
            "a cache that is continued must be of this model and as many prompts: "
            f"expected {model.dtype} {expected}, got {cache.k.dtype} {cache.k.shape}"
        )


@functools.partial(jax.jit, static_argnames="capacity")
def continued(
    held: TokenLayout, held_tokens: Int32[Array, ""], next_rope_pos: Int32[Array, " b"],
    rope_pos: Int32[Array, "3 b t"], layout: TokenLayout, *, capacity: int,
) -> tuple[Int32[Array, "3 b t"], TokenLayout, Int32[Array, " b"]]:  # fmt: skip
    """Positions and layout of tokens that follow those of a cache.

    What follows counts positions, rotary positions and videos from 0, as a prompt of its own does. Two tokens held, the
    second the only one of a video, then a token of another video and a word:

        held       pos 0 1       rope 0 1       video -1 0
        prompt     pos 0 1       rope 0 1       video 0 -1
        the whole  pos 0 1 2 3   rope 0 1 2 3   video -1 0 1 -1

    Args:
      held: layout of the cache.
      held_tokens: of each prompt.
      next_rope_pos: of the cache.
      rope_pos, layout: of what follows, padded.
      capacity: of the layout to return.

    Returns:
      Rotary positions of what follows, the layout of the whole `[b, capacity]`, and its next rotary position.
    """
    first_pos, first_video = (jnp.max(x, axis=1, keepdims=True) + 1 for x in (held.pos, held.video))
    rope_pos = rope_pos + next_rope_pos[None, :, None]
    shifted = dataclasses.replace(
        layout,
        pos=jnp.where(layout.is_real, layout.pos + first_pos, PADDING),
        video=jnp.where(layout.video >= 0, layout.video + first_video, layout.video),
    )
    place = (jnp.zeros((), jnp.int32), held_tokens)
    whole = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice(old, new, place), held.pad_to(capacity), shifted)
    last = jnp.max(jnp.where(layout.is_real[None], rope_pos, -1), axis=(0, 2))
    return rope_pos, whole, jnp.maximum(next_rope_pos, last + 1)
