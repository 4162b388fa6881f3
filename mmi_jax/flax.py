"""Sparse attention inside Flax: a drop-in `attention_fn` for nnx and linen, and an NNX attention module."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike

from mmi_jax.layout import TokenLayout, text_tokens
from mmi_jax.method.checks import check_heads, per_head
from mmi_jax.method.dispatch import sparse_attention
from mmi_jax.method.patterns import Pattern
from pallas_kernels.attention.api import Implementation
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import AnyArray, Array, Float


def attention_fn(
    patterns: Pattern | Sequence[Pattern],
    *,
    layout: TokenLayout | None = None,
    blocks: Blocks | None = None,
    implementation: Implementation | None = None,
) -> Callable[..., Array]:
    """An `attention_fn` for `flax.nnx.MultiHeadAttention` and `flax.linen.MultiHeadDotProductAttention`.

    What it attends is causal, with or without a mask; the queries are the last `t` of the `s` keys. It takes the
    arguments of Flax's function. Softmax is always float32. A mask is accepted when it is a concrete array that
    says what the layout says; padding is given by the layout. Everything else that would change the result raises:
    another mask, a traced mask, decode mode, a bias, dropout, a `precision`, sown weights, other einsums.

    Args:
      patterns, layout, blocks, implementation: as for `sparse_attention`; all text tokens when `layout` is None.
    """

    def attend(
        query: Float[Array, "*b t h d"],
        key: Float[Array, "*b s g d"],
        value: Float[Array, "*b s g d"],
        bias: object = None,
        mask: AnyArray | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: object = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: object = None,
        module: object = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: object = None,
        qk_attn_weights_einsum: object = None,
        attn_weights_value_einsum: object = None,
        is_causal: bool = False,
        input_positions: object = None,
    ) -> Float[Array, "*b t h d"]:
        _refuse(
            bias=bias,
            precision=None if precision in ("default", jax.lax.Precision.DEFAULT) else precision,
            module=module,
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
            input_positions=input_positions,
        )
        if dropout_rate > 0 and not deterministic:
            raise NotImplementedError(f"sparse attention has no dropout: expected deterministic, got {dropout_rate=}")
        num_queries, num_keys = query.shape[-3], key.shape[-3]
        if is_causal and num_queries != num_keys:
            raise NotImplementedError(
                "is_causal aligns the first query with the first key, sparse attention the last with the last: they "
                f"agree for as many queries as keys only, got {num_queries} and {num_keys}"
            )
        tokens = text_tokens(num_keys) if layout is None else layout
        _check_mask(mask, tokens, num_queries)
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        q, k, v = (x.astype(dtype).reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        out = sparse_attention(q, k, v, patterns, layout=tokens, blocks=blocks, implementation=implementation)
        return out.reshape(query.shape)

    return attend


def _refuse(**arguments: object) -> None:
    """Raises NotImplementedError for the first argument that is not None."""
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"sparse attention cannot honour {name}: expected None, got {type(value)}")


def _check_mask(mask: AnyArray | None, layout: TokenLayout, num_queries: int) -> None:
    """Raises unless the mask, `[..., h or 1, t or 1, s]`, is what sparse attention does at every real query anyway."""
    if mask is None:
        return
    if num_queries == 1 < layout.num_tokens:
        raise NotImplementedError("sparse attention is for prefill: use Flax's attention_fn in decode mode")
    if isinstance(mask, Tracer) or isinstance(layout.pos, Tracer):
        raise NotImplementedError(
            "a traced mask cannot be compared with the causal one: leave it out, attention is causal; "
            "padding is given by the layout"
        )
    pos, is_real = np.asarray(layout.pos), np.asarray(layout.is_real)
    q_pos, is_query = pos[..., -num_queries:], is_real[..., -num_queries:]
    expected = ((pos[..., None, :] <= q_pos[..., :, None]) & is_real[..., None, :])[..., None, :, :]
    given = np.asarray(mask).astype(bool)
    if any(n not in (1, m) for n, m in zip(given.shape[-2:], expected.shape[-2:], strict=True)):
        raise ValueError(f"a mask must broadcast to [..., t, s] = {expected.shape[-2:]}, got shape {given.shape}")
    differs = (given != expected) & is_query[..., None, :, None]
    if differs.any():
        raise ValueError(
            "a mask must be the causal one of the layout, nothing else can be honoured: "
            f"got mask of shape {given.shape} that differs from it in {int(differs.sum())} pairs"
        )


class MMIAttention(nnx.Module):
    """Causal self-attention with grouped queries in which every head visits only what its pattern keeps.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from mmi_jax import AShape, Grid
      >>> from mmi_jax.flax import MMIAttention
      >>> from mmi_jax.layout import concatenate, text_tokens, vision_tokens
      >>> layout = concatenate([text_tokens(5), vision_tokens(4, 6, 8), text_tokens(7)])
      >>> patterns = [Grid(), Grid(), AShape(sink=128, local=128), AShape(sink=128, local=128)]
      >>> attention = MMIAttention(patterns, in_features=32, num_heads=4, num_kv_heads=2, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (1, layout.num_tokens, 32))
      >>> nnx.jit(lambda attention, x, layout: attention(x, layout=layout))(attention, x, layout).shape
      (1, 204, 32)
    """

    def __init__(
        self,
        patterns: Pattern | Sequence[Pattern],
        *,
        in_features: int,
        num_heads: int,
        rngs: nnx.Rngs,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        use_bias: bool = False,
        rope: Callable[[Array, Any], Array] | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        blocks: Blocks | None = None,
        implementation: Implementation | None = None,
    ):
        """Random weights.

        Args:
          patterns: one pattern for all heads, or one for each query head.
          num_kv_heads: `num_heads` when None.
          head_dim: `in_features // num_heads` when None.
          use_bias: biases on all four projections.
          rope: `rope(x [b, t, h, d], rotary)` rotates queries and keys; `rotary` is given to each call.
          dtype, param_dtype: of the computation and the parameters, as for `nnx.Linear`.
          blocks, implementation: as for `sparse_attention`.

        Raises:
          ValueError: heads do not divide, or patterns are not one or one for each head.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_heads(num_heads, num_kv_heads)
        if head_dim is None and in_features % num_heads:
            raise ValueError(f"without head_dim, {in_features=} must be a multiple of {num_heads=}")
        self.patterns, self.rope, self.blocks = per_head(patterns, num_heads), rope, blocks
        self.implementation: Implementation | None = implementation
        self.head_dim = in_features // num_heads if head_dim is None else head_dim

        def linear(in_dim: int, out_dim: int) -> nnx.Linear:
            return nnx.Linear(in_dim, out_dim, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.q = linear(in_features, num_heads * self.head_dim)
        self.k = linear(in_features, num_kv_heads * self.head_dim)
        self.v = linear(in_features, num_kv_heads * self.head_dim)
        self.out = linear(num_heads * self.head_dim, in_features)

    def __call__(
        self, x: Float[Array, "b t e"], *, layout: TokenLayout, rotary: object = None
    ) -> Float[Array, "b t e"]:
        """The attention output before any residual.

        Args:
          layout: of the `t` tokens; fields [t], or [b, t] when the examples differ.
          rotary: what `rope` needs; given if and only if there is a `rope`.
        """
        if (self.rope is None) != (rotary is None):
            raise ValueError(f"rotary must be given if and only if there is a rope: {self.rope=}, {type(rotary)=}")
        q, k, v = (project(x).reshape(*x.shape[:2], -1, self.head_dim) for project in (self.q, self.k, self.v))
        if self.rope is not None:
            q, k = self.rope(q, rotary), self.rope(k, rotary)
        out = sparse_attention(
            q, k, v, self.patterns, layout=layout, blocks=self.blocks, implementation=self.implementation
        )
        return self.out(out.reshape(*x.shape[:2], -1))
