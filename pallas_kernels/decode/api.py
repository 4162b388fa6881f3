"""decode_attention: one new token of each prompt attends to everything before it, straight from the whole cache."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp

from pallas_kernels.decode import mosaic_gpu, xla
from pallas_kernels.decode.inputs import DecodeInputs, check_inputs
from pallas_kernels.dispatch import run_backend
from pallas_kernels.notation import Array, Float, Int32

Implementation = Literal["xla", "mosaic_gpu"]

_BACKENDS: dict[Implementation, Callable[[DecodeInputs], Array]] = {"xla": xla.attend, "mosaic_gpu": mosaic_gpu.attend}

DEFAULT_ORDER: tuple[Implementation, ...] = ("mosaic_gpu", "xla")
"""What `implementation=None` tries, in this order, until one does not refuse."""


def decode_attention(
    q: Float[Array, "b h d"],
    k: Float[Array, "layers b s g d"],
    v: Float[Array, "layers b s g d"],
    *,
    layer: Int32[Array, ""] | int,
    lengths: Int32[Array, " b"],
    k_new: Float[Array, "layers b n g d"],
    v_new: Float[Array, "layers b n g d"],
    num_new: Int32[Array, ""] | int,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "b h d"]:
    """Softmax attention of one token of each prompt over its prompt and over the tokens decoded since; in q's dtype.

    The keys lie in two places, so that decoding reads a prompt's cache and never writes, copies or slices it. Of a
    prompt of three tokens in a cache with room for five, when two tokens are new (`x`: never looked at, may be NaN):

        k, v          0 1 2 x x
        k_new, v_new  3 4 x x x x x x      the query is token 4

    Args:
      q: the queries, one token of each prompt; query head `i` reads kv head `i // (h // g)`.
      k, v: of all layers; the first `lengths` rows of a prompt are its tokens.
      layer: which layer is read.
      lengths: tokens of each prompt, at most `s`.
      k_new, v_new: of all layers; the first `num_new` rows are the tokens after the prompt, that of the query last.
      num_new: new tokens, the same for all prompts, at most `n`; 0 where the prompt is all there is.
      scale: factor on the scores, `d ** -0.5` when None.
      implementation: a named backend runs or raises; None walks `DEFAULT_ORDER`.

    Returns:
      The output; exact zeros for a prompt of no tokens.

    Raises:
      ValueError: the arguments do not fit each other, or the implementation's name is unknown.
      NotImplementedError: the named backend cannot take this input; the message names the limit.
    """
    inputs = DecodeInputs(
        q=q,
        k=k,
        v=v,
        layer=jnp.asarray(layer, jnp.int32),
        lengths=lengths,
        k_new=k_new,
        v_new=v_new,
        num_new=jnp.asarray(num_new, jnp.int32),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
    check_inputs(inputs)
    return run_backend(_BACKENDS, DEFAULT_ORDER, implementation, inputs)
