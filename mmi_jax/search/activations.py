"""Activations of a prompt's attention, layer by layer: queries, keys, values, dense output; one layer at a time."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax.engine.programs.single_layer import run_layer, split_layers
from mmi_jax.engine.prompts import fit_prompt
from mmi_jax.engine.protocols import VisionLanguageModel
from mmi_jax.engine.settings.buckets import Buckets
from mmi_jax.layout import TokenLayout
from mmi_jax.method.dispatch import attend_sparsely, position_equals_index
from mmi_jax.method.patterns import Dense
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import AnyArray, Array, Bool, Float
from pallas_kernels.pytree import pytree


@pytree
class LayerActivations:
    """One layer's attention on one prompt, which is padded to its bucket.

    Args:
      q, k, v: after rotation.
      out: dense attention.
      layout: fields [1, t].
      is_answer: whether an answer is read from the row.
    """

    q: Float[Array, "1 t h d"]
    k: Float[Array, "1 t g d"]
    v: Float[Array, "1 t g d"]
    out: Float[Array, "1 t h d"]
    layout: TokenLayout
    is_answer: Bool[AnyArray, "1 t"]


def layer_activations(
    model: VisionLanguageModel,
    prompt: Any,
    *,
    blocks: Blocks,
    buckets: Buckets | None = None,
    num_layers: int | None = None,
    answer_rows: Sequence[int] = (),
) -> Iterator[LayerActivations]:
    """Each layer's attention on one prompt, from the first on; every layer reads the DENSE output of the one before.

    Args:
      prompt: a batch of one.
      num_layers: stop after so many; all when None.
      answer_rows: the prompt's tokens whose logits answer a question.

    Raises:
      ValueError: the batch holds several prompts, or an answer row is not one of the prompt's.
    """
    num_tokens = check_prompt(prompt, answer_rows)
    padded = fit_prompt(prompt, (buckets or Buckets()).length_for(num_tokens))
    is_answer = np.isin(np.arange(padded.tokens.shape[1]), np.asarray(answer_rows, np.int64))[None]
    x, rotary = model.embed(padded), model.rotary(jnp.asarray(padded.rope_pos))
    position_is_index, layout = position_equals_index(padded.layout), jax.tree.map(jnp.asarray, padded.layout)
    graphdef, weights = split_layers(model)
    for n in range(model.config.num_layers if num_layers is None else num_layers):
        x, (q, k, v, out) = _dense_layer(graphdef, blocks, position_is_index, weights(n), x, rotary, layout)
        yield LayerActivations(q=q, k=k, v=v, out=out, layout=layout, is_answer=is_answer)


def num_tokens_of(prompt: Any) -> int:
    """Tokens of a batch of one, padding left out; of anything with its layout."""
    return int(np.asarray(prompt.layout.is_real).sum())


def check_prompt(prompt: Any, answer_rows: Sequence[int]) -> int:
    """The prompt's tokens; raises ValueError for a batch of several prompts, or rows that none of its tokens has."""
    if prompt.tokens.shape[0] != 1:
        raise ValueError(f"layers are captured for one prompt at a time, got a batch of {prompt.tokens.shape[0]}")
    num_tokens = num_tokens_of(prompt)
    check_answer_rows(answer_rows, num_tokens)
    return num_tokens


def check_answer_rows(rows: Sequence[int], num_tokens: int) -> None:
    """Raises ValueError for a row that is no token of a prompt of so many."""
    if outside := [int(row) for row in rows if not 0 <= row < num_tokens]:
        raise ValueError(f"answers are read from rows of the prompt: expected 0 to {num_tokens - 1}, got {outside}")


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _dense_layer(graphdef, blocks: Blocks, position_is_index: bool, weights, x, rotary, layout):
    """The layer's output, and what its attention read and gave."""

    def attend(q, k, v):
        out = attend_sparsely(q, k, v, Dense(), layout=layout, blocks=blocks, position_is_index=position_is_index).out
        return out, (q, k, v, out)

    return run_layer(graphdef, weights, x, rotary, attend)
