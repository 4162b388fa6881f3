"""How much a prompt's answers change when a single head is cut down: what an error of that head is worth.

A head that nothing hangs on may lose half of its output and no answer changes; one that fetches what is asked for must
not. The error of its output tells neither, so each head is cut down alone and the logits of the answers are looked at.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax.engine.prompts import fit_prompt
from mmi_jax.engine.settings.buckets import Buckets
from mmi_jax.method.attention import attend_sparsely
from mmi_jax.method.dense_attention import is_plain
from mmi_jax.method.patterns import AShape, Dense, Pattern
from mmi_jax.search.capture import check_rows, check_single, num_tokens_of
from mmi_jax.search.measure import share_lost
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import Array, Bool, Float
from pallas_kernels.pytree import pytree

CUT = AShape(sink=128, local=256)
"""What a head is cut down to: it sees nothing far away any more."""


LEAST_ERROR = 0.01
"""Share of the mean error, below which a head's own says nothing any more."""


@pytree
class Sensitivity:
    """What cutting down each head alone does on one prompt.

    Args:
      logits: squared change of the logits of the answers, over their own square; both less their mean over the
        vocabulary.
      error: squared change of the head's output over its own square, in the rows of the answers and in all, half each.
    """

    logits: Float[np.ndarray, "l h"]
    error: Float[np.ndarray, "l h"]


def head_sensitivity(
    model: Any, prompt: Any, answer_rows: Sequence[int], *, blocks: Blocks, buckets: Buckets, cut: Pattern = CUT
) -> Sensitivity:
    """The sensitivity of all heads on one prompt, all heads of a layer at once: a batch in which each is cut once.

    Takes `l (l + 1) / 2` layers of a batch of `h + 1` prompts, so prompts should be short.

    Args:
      model: a `VisionLanguageModel`.
      prompt: a batch of one.
      answer_rows: the tokens whose logits answer a question; the last token when there are none.
      cut: what a head is cut down to.

    Raises:
      ValueError: the batch holds several prompts, or an answer row is none of the prompt's.
    """
    from flax import nnx  # here, as in `captured_layers`

    check_single(prompt)
    num_tokens, config = num_tokens_of(prompt), model.config
    check_rows(answer_rows, num_tokens)
    rows = np.asarray(answer_rows if len(answer_rows) else (num_tokens - 1,), np.int32)
    padded = fit_prompt(prompt, buckets.length_for(num_tokens))
    starts_plain = is_plain(padded.layout)
    is_answer = jnp.asarray(np.isin(np.arange(padded.tokens.shape[1]), rows))

    def copies(x: Any, axis: int) -> Any:
        return jnp.repeat(jnp.asarray(x), config.num_heads + 1, axis=axis)

    one = jax.tree.map(jnp.asarray, padded.layout)
    layout = jax.tree.map(lambda x: copies(x, 0), one)
    rotary = model.rotary(copies(padded.rope_pos, 1))
    graphdef, state = nnx.split(model.layers)

    def weights_of(n: int) -> Any:
        return jax.tree.map(lambda a: a[n], state)

    x, found = copies(model.embed(padded), 0), []
    for n in range(config.num_layers):
        copies_cut, error = _cut_layer(graphdef, blocks, starts_plain, cut, weights_of(n), x, rotary, one, is_answer)
        x = jnp.repeat(copies_cut[-1:], len(x), axis=0)  # the last copy is dense: it goes on to the next layer
        for later in range(n + 1, config.num_layers):
            copies_cut = _dense_layer(graphdef, blocks, starts_plain, weights_of(later), copies_cut, rotary, layout)
        logits = model.unembed(copies_cut[:, rows].reshape(-1, x.shape[-1]))
        found.append((_change(logits, len(rows)), error))
    logits, error = (np.stack(jax.device_get(values)) for values in zip(*found, strict=True))
    return Sensitivity(logits=logits, error=error)


def head_weights(found: Sequence[Sensitivity]) -> Float[np.ndarray, "l h"]:
    """How much an error of each head counts, 1 on average: half the same for all, half by its sensitivity.

    The sensitivity is the change of the logits for a change of the head's output, each summed over the prompts; a head
    that hardly changes when it is cut down has a sensitivity of nearly none, for its change of the logits is rounding.
    Half stays the same for all, because a few short prompts do not show all that a head is for.
    """
    change = np.sum([one.logits for one in found], axis=0)
    error = np.sum([one.error for one in found], axis=0)
    gain = change / np.maximum(error + LEAST_ERROR * error.mean(), np.finfo(np.float32).tiny)
    return 0.5 + 0.5 * gain / gain.mean() if gain.any() else np.ones_like(gain)  # else too short to cut anything


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _cut_layer(
    graphdef, blocks: Blocks, starts_plain: bool, pattern: Pattern, weights, x, rotary, layout,
    is_answer: Bool[Array, " t"],
):  # fmt: skip
    """A layer on equal copies of a prompt, head n of copy n cut down, the last copy dense; and the heads' errors."""
    from flax import nnx

    def attend(q, k, v):
        one = (q[:1], k[:1], v[:1])
        dense = attend_sparsely(*one, Dense(), layout=layout, blocks=blocks, starts_plain=starts_plain).out
        cut = attend_sparsely(*one, pattern, layout=layout, blocks=blocks).out
        number, head = jnp.arange(q.shape[0])[:, None], jnp.arange(q.shape[2])[None]
        out = jnp.where((number == head)[:, None, :, None], cut, dense)
        return out, _error(dense[0], cut[0], layout.is_real[0], is_answer)

    return nnx.merge(graphdef, weights)(x, rotary, attend)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _dense_layer(graphdef, blocks: Blocks, starts_plain: bool, weights, x, rotary, layout):
    """A layer on the copies."""
    from flax import nnx

    def attend(q, k, v):
        return attend_sparsely(q, k, v, Dense(), layout=layout, blocks=blocks, starts_plain=starts_plain).out, None

    return nnx.merge(graphdef, weights)(x, rotary, attend)[0]


def _error(
    dense: Float[Array, "t h d"], cut: Float[Array, "t h d"], is_real: Bool[Array, " t"], is_answer: Bool[Array, " t"]
) -> Float[Array, " h"]:
    """Of the squared output, the share lost in the prompt's rows, and in those of the answers: the mean of both."""
    lost, whole = (jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1) for x in (cut - dense, dense))
    return share_lost(jnp.stack([is_real, is_answer]), lost, whole).mean(axis=0)


@functools.partial(jax.jit, static_argnums=1)
def _change(logits: Float[Array, "copies_and_rows v"], num_rows: int) -> Float[Array, " h"]:
    """Squared distance of each copy's logits from the last copy's, over their own square, the mean over rows."""
    logits = logits.reshape(-1, num_rows, logits.shape[-1])
    logits -= logits.mean(axis=-1, keepdims=True)
    lost, whole = (jnp.square(x).sum(axis=-1) for x in (logits[:-1] - logits[-1:], logits[-1:]))
    return (lost / whole).mean(axis=1)
