"""Importance of heads: how much a prompt's answers change when a single head is ablated.

An unimportant head may lose half of its output and no answer changes; one that fetches what a question is about must
not. The error of its output tells neither, so each head is ablated alone and the logits of the answers are compared.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax.engine.programs.single_layer import run_layer, split_layers
from mmi_jax.engine.prompts import fit_prompt
from mmi_jax.engine.protocols import VisionLanguageModel
from mmi_jax.engine.settings.buckets import Buckets
from mmi_jax.method.dispatch import attend_sparsely, position_equals_index
from mmi_jax.method.patterns import AShape, Dense, Pattern
from mmi_jax.search.activations import check_prompt
from mmi_jax.search.trials.measurement import relative_error
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import Array, Bool, Float
from pallas_kernels.pytree import pytree

ABLATED = AShape(sink=128, local=256)
"""The pattern of an ablated head: it attends to nothing far away."""

MIN_ERROR = 0.01
"""Fraction of the mean error that is added to that of a head: below it a change of the logits is rounding (docs/log.md,
2026-11-26)."""


@pytree
class AblationEffect:
    """The change of one prompt's forward pass by the ablation of each head alone.

    Args:
      logits: squared change of the logits of the answers, relative to their square; both less their mean over the
        vocabulary.
      error: squared change of the head's output, relative to its square, half from the rows of the answers and half
        from all rows.
    """

    logits: Float[np.ndarray, "l h"]
    error: Float[np.ndarray, "l h"]


def ablate_heads(
    model: VisionLanguageModel,
    prompt: Any,
    answer_rows: Sequence[int],
    *,
    blocks: Blocks,
    buckets: Buckets,
    ablated: Pattern = ABLATED,
) -> AblationEffect:
    """The effect of each head on one prompt, a layer at a time: a batch of copies, in each of which one is ablated.

    Takes `l (l + 1) / 2` layers of a batch of `h + 1` prompts, so prompts should be short.

    Args:
      prompt: a batch of one.
      answer_rows: the tokens whose logits answer a question; the last token when there are none.
      ablated: the pattern of an ablated head.

    Raises:
      ValueError: the batch holds several prompts, or an answer row is not one of the prompt's.
    """
    num_tokens, config = check_prompt(prompt, answer_rows), model.config
    rows = np.asarray(answer_rows if len(answer_rows) else (num_tokens - 1,), np.int32)
    padded = fit_prompt(prompt, buckets.length_for(num_tokens))
    position_is_index = position_equals_index(padded.layout)
    is_answer = jnp.asarray(np.isin(np.arange(padded.tokens.shape[1]), rows))

    def copies(x: Array | np.ndarray, axis: int) -> Array:
        return jnp.repeat(jnp.asarray(x), config.num_heads + 1, axis=axis)

    prompt_layout = jax.tree.map(jnp.asarray, padded.layout)
    layout = jax.tree.map(lambda x: copies(x, 0), prompt_layout)
    rotary = model.rotary(copies(padded.rope_pos, 1))
    graphdef, weights = split_layers(model)
    x, effects = copies(model.embed(padded), 0), []
    for n in range(config.num_layers):
        ablations, error = _ablated_layer(
            graphdef, blocks, position_is_index, ablated, weights(n), x, rotary, prompt_layout, is_answer
        )
        x = jnp.repeat(ablations[-1:], len(x), axis=0)  # the last copy is dense: it goes on to the next layer
        for later in range(n + 1, config.num_layers):
            ablations = _dense_layer(graphdef, blocks, position_is_index, weights(later), ablations, rotary, layout)
        logits = model.unembed(ablations[:, rows].reshape(-1, x.shape[-1]))
        effects.append((_change(logits, len(rows)), error))
    logits, error = (np.stack(jax.device_get(values)) for values in zip(*effects, strict=True))
    return AblationEffect(logits=logits, error=error)


def head_weights(effects: Sequence[AblationEffect]) -> Float[np.ndarray, "l h"]:
    """How much an error of each head counts, 1 on average: half the same for all, half by its importance.

    The importance is the change of the logits for a change of the head's output, each summed over the prompts; a head
    that hardly changes when it is ablated has an importance of nearly none, for its change of the logits is rounding.
    Half stays the same for all, because a few short prompts do not show all that a head is for.
    """
    change = np.sum([effect.logits for effect in effects], axis=0)
    error = np.sum([effect.error for effect in effects], axis=0)
    gain = change / np.maximum(error + MIN_ERROR * error.mean(), np.finfo(np.float32).tiny)
    return 0.5 + 0.5 * gain / gain.mean() if gain.any() else np.ones_like(gain)  # else too short to ablate anything


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _ablated_layer(
    graphdef, blocks: Blocks, position_is_index: bool, ablated: Pattern, weights, x, rotary, layout, is_answer
):
    """A layer on equal copies of a prompt, head n of copy n ablated, the last copy dense; and the heads' errors."""

    def attend(q, k, v):
        qkv = (q[:1], k[:1], v[:1])
        dense = attend_sparsely(*qkv, Dense(), layout=layout, blocks=blocks, position_is_index=position_is_index).out
        sparse = attend_sparsely(*qkv, ablated, layout=layout, blocks=blocks).out
        number, head = jnp.arange(q.shape[0])[:, None], jnp.arange(q.shape[2])[None]
        out = jnp.where((number == head)[:, None, :, None], sparse, dense)
        return out, _output_error(dense[0], sparse[0], layout.is_real[0], is_answer)

    return run_layer(graphdef, weights, x, rotary, attend)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _dense_layer(graphdef, blocks: Blocks, position_is_index: bool, weights, x, rotary, layout):
    """A layer on the copies."""

    def attend(q, k, v):
        return attend_sparsely(
            q, k, v, Dense(), layout=layout, blocks=blocks, position_is_index=position_is_index
        ).out, None

    return run_layer(graphdef, weights, x, rotary, attend)[0]


def _output_error(
    dense: Float[Array, "t h d"],
    sparse: Float[Array, "t h d"],
    is_real: Bool[Array, " t"],
    is_answer: Bool[Array, " t"],
) -> Float[Array, " h"]:
    """Relative squared error of the output in the prompt's rows, and in those of the answers: the mean of both."""
    error, whole = (jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1) for x in (sparse - dense, dense))
    return relative_error(jnp.stack([is_real, is_answer]), error, whole).mean(axis=0)


@functools.partial(jax.jit, static_argnums=1)
def _change(logits: Float[Array, "copies_and_rows v"], num_rows: int) -> Float[Array, " h"]:
    """Squared distance of each copy's logits from the last copy's, relative to their square, the mean over rows."""
    logits = logits.reshape(-1, num_rows, logits.shape[-1])
    logits -= logits.mean(axis=-1, keepdims=True)
    change, whole = (jnp.square(x).sum(axis=-1) for x in (logits[:-1] - logits[-1:], logits[-1:]))
    return (change / whole).mean(axis=1)
