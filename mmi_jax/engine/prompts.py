"""A batch of prompts: checked, padded to a bucket, and appended to a prior cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from mmi_jax.engine.kv_cache import KVCache
from mmi_jax.engine.protocols import Prompt, VisionLanguageModel
from mmi_jax.engine.settings.padded_lengths import NO_CACHE, PriorCache
from mmi_jax.layout import PADDING, TokenLayout
from pallas_kernels.notation import AnyArray, Array, Int32


def lengths_of(prompt: Prompt) -> np.ndarray:
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


def logit_tokens(lengths: np.ndarray, logits_at: Int[AnyArray, "b n"] | None) -> np.ndarray:
    """Tokens after which logits are computed, `[b, 1 + n]`: each prompt's last, then those of `logits_at`."""
    last = lengths[:, None] - 1
    if logits_at is None:
        return last
    tokens = np.asarray(logits_at)
    if tokens.ndim != 2 or tokens.shape[0] != len(lengths) or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"logits_at must be integers [b, n] with one row for each of the {len(lengths)} prompts: "
            f"got {tokens.dtype} {tokens.shape}"
        )
    is_outside = (tokens < 0) | (tokens > last)
    if is_outside.any():
        example, n = np.argwhere(is_outside)[0]
        raise ValueError(
            f"logits_at must name tokens of the prompt: prompt {example} has {lengths[example]}, "
            f"got token {tokens[example, n]}"
        )
    return np.concatenate([last, tokens], axis=1)


def fit_prompt[AnyPrompt: Prompt](prompt: AnyPrompt, num_tokens: int) -> AnyPrompt:
    """The prompt cut, or padded at its end, to `num_tokens`, host arrays: what is made of it has a bucket's shapes.

    All padding is token 0, whatever the caller wrote there: its keys and values are then finite.
    """
    tokens = np.where(np.asarray(prompt.layout.is_real), np.asarray(prompt.tokens), 0).astype(np.int32)
    return dataclasses.replace(
        prompt,  # pyright: ignore[reportArgumentType]  a dataclass, which a protocol cannot say
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


def prior_cache(cache: KVCache | None) -> PriorCache:
    """The sizes of a cache that is to be continued.

    Raises:
      ValueError: the prompts hold different numbers of tokens, so that no chunk could be written in one place.
    """
    if cache is None:
        return NO_CACHE
    lengths = np.asarray(cache.lengths)
    if (lengths != lengths[0]).any():
        raise ValueError(
            "prompts that are continued together must hold equally many tokens, so that what follows has one place in "
            f"the cache: got {lengths.tolist()}; continue each separately"
        )
    return PriorCache(tokens=int(lengths[0]), capacity=cache.capacity)


def check_cache(cache: KVCache, model: VisionLanguageModel, *, batch: int) -> None:
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
    prior: TokenLayout,
    prior_tokens: Int32[Array, ""],
    next_rope_pos: Int32[Array, " b"],
    rope_pos: Int32[Array, "3 b t"],
    layout: TokenLayout,
    *,
    capacity: int,
) -> tuple[Int32[Array, "3 b t"], TokenLayout, Int32[Array, " b"]]:
    """Positions and layout of tokens that follow those of a cache.

    What follows counts positions, rotary positions and videos from 0, as a separate prompt does. Two tokens in
    the prior cache, the second the only one of a video, then a token of another video and a word:

        prior      pos 0 1       rope 0 1       video -1 0
        prompt     pos 0 1       rope 0 1       video 0 -1
        the whole  pos 0 1 2 3   rope 0 1 2 3   video -1 0 1 -1

    Args:
      prior: layout of the cache.
      prior_tokens: of each prompt in it.
      next_rope_pos: of the cache.
      rope_pos, layout: of what follows, padded.
      capacity: of the layout to return.

    Returns:
      Rotary positions of what follows, the layout of the whole `[b, capacity]`, and its next rotary position.
    """
    first_pos, first_video = (jnp.max(x, axis=1, keepdims=True) + 1 for x in (prior.pos, prior.video))
    rope_pos = rope_pos + next_rope_pos[None, :, None]
    shifted = dataclasses.replace(
        layout,
        pos=jnp.where(layout.is_real, layout.pos + first_pos, PADDING),
        video=jnp.where(layout.video >= 0, layout.video + first_video, layout.video),
    )
    place = (jnp.zeros((), jnp.int32), prior_tokens)
    whole = jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice(old, new, place), prior.pad_to(capacity), shifted
    )
    last = jnp.max(jnp.where(layout.is_real[None], rope_pos, -1), axis=(0, 2))
    return rope_pos, whole, jnp.maximum(next_rope_pos, last + 1)
