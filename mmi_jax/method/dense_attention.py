"""Plain prompts: positions are places, so that dense attention is causal attention and a vendor's kernel can run it."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mmi_jax.layout import TokenLayout
from pallas_kernels.device import has_hopper_gpu
from pallas_kernels.notation import Array, Float

CUDNN_TOKENS = 16_384
"""Up to here cuDNN's dense kernel is faster than ours with its plan; from 32K tokens ours is (bench/RESULTS.md)."""


def is_plain(layout: TokenLayout) -> bool:
    """Whether all tokens stand at their own place, padding last; False for a traced layout, which hides it."""
    if isinstance(layout.pos, Tracer):
        return False
    pos = np.asarray(layout.pos)
    is_real = np.asarray(layout.is_real)
    place = np.arange(pos.shape[-1])
    is_padded_last = is_real == (place < is_real.sum(axis=-1, keepdims=True))
    return bool(is_padded_last.all() and (pos == place)[is_real].all())


def cudnn_takes(q: Float[Array, "b t h d"]) -> bool:
    """Whether cuDNN serves dense attention of these queries, and is the faster choice."""
    is_16_bit = q.dtype in (jnp.bfloat16, jnp.float16)
    return has_hopper_gpu() and is_16_bit and q.shape[3] <= 128 and q.shape[3] % 8 == 0 and q.shape[1] <= CUDNN_TOKENS


def attend_densely(
    q: Float[Array, "b t h d"], k: Float[Array, "b s g d"], v: Float[Array, "b s g d"], *, layout: TokenLayout,
    scale: float, padding_is_finite: bool = False, implementation: Literal["cudnn", "xla"] = "cudnn",
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h t"]]:  # fmt: skip
    """Causal attention of a plain prompt from its first token on: output, and log-sum-exp.

    The log-sum-exp is float32, but JAX has rounded it to q's dtype before, and no gradient flows through it.

    Zeros and -inf at padding, as from a plan; where `padding_is_finite`, which saves two passes (5 % at 4K tokens),
    finite numbers instead of zeros. Keys past the last query are not read.
    """
    num_tokens = q.shape[1]
    k, v = k[:, :num_tokens], v[:, :num_tokens]
    is_query = jnp.atleast_2d(jnp.asarray(layout.is_real)[..., :num_tokens])
    if not padding_is_finite:
        k, v = (jnp.where(is_query[..., None, None], x, 0) for x in (k, v))
    out, lse = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, implementation=implementation, return_residual=True
    )
    if not padding_is_finite:
        out = jnp.where(is_query[..., None, None], out, 0)
    return out, jnp.where(is_query[..., None], lse.astype(jnp.float32), -jnp.inf).transpose(0, 2, 1)
