"""Step 8 of 9, permutation: query rows reordered, with gaps and repeats, and back."""

import functools

import jax.numpy as jnp

from pallas_kernels.notation import Array, Float, Int32
from pallas_kernels.pytree import pytree


@pytree
class Permutation:
    """Per head, which token each row holds, and where each token went.

    Rows of one part are padded to whole q blocks, so a row may be empty (-1); a token may have a row in several
    passes, each over other keys. Four tokens, the even ones first, q blocks of 4 rows:

        order    0 2 -1 -1  1 3 -1 -1
        inverse  0 4  1  5

    Args:
      order: token of each row, -1 for an empty row.
      inverse: row of each token in each of `n` passes, -1 where the pass does not hold it. Pass 0 holds every token
        that is not padding.
    """

    order: Int32[Array, "h r"]
    inverse: Int32[Array, "h n t"]

    def apply(self, x: Float[Array, "h t d"]) -> Float[Array, "h r d"]:
        """Rows in permuted order; what an empty row holds is unspecified but finite where `x` is."""
        return _take_rows(x, self.order)

    def undo(self, x: Float[Array, "h r d"]) -> Float[Array, "h t d"]:
        """Tokens back in their places, read from pass 0; zeros for tokens it does not hold."""
        return _rows(x, self.inverse[:, 0])

    def merge(self, out: Float[Array, "h r d"], lse: Float[Array, "h r"]) -> tuple[Array, Array]:
        """Tokens back in their places, with the softmax of several passes joined into one.

        Each pass holds softmax-weighted sums over disjoint keys; `exp(lse)` is its part of the denominator.

        Returns:
          `out [h, t, d]` in the dtype of `out`, and `lse [h, t]` in float32: zeros and -inf for a token no pass holds.
        """
        num_passes = self.inverse.shape[1]
        outs = [_rows(out, self.inverse[:, n]) for n in range(num_passes)]
        lses = [_lse_rows(lse, self.inverse[:, n]) for n in range(num_passes)]
        if num_passes == 1:
            return outs[0], lses[0]
        total = functools.reduce(jnp.logaddexp, lses)
        floor = jnp.where(jnp.isfinite(total), total, 0.0)
        merged = sum(
            jnp.exp(pass_lse - floor)[..., None] * pass_out.astype(jnp.float32)
            for pass_lse, pass_out in zip(lses, outs, strict=True)
        )
        return jnp.asarray(merged).astype(out.dtype), total


def _rows(x: Float[Array, "h r d"], row: Int32[Array, "h t"]) -> Float[Array, "h t d"]:
    return jnp.where(row[..., None] >= 0, _take_rows(x, row), jnp.zeros((), x.dtype))


def _take_rows(x: Float[Array, "h r d"], row: Int32[Array, "h t"]) -> Float[Array, "h t d"]:
    """The rows, all of them in range: a bounds check would cost a second select of every number."""
    return jnp.take_along_axis(x, jnp.maximum(row, 0)[..., None], axis=1, mode="promise_in_bounds")


def _lse_rows(lse: Float[Array, "h r"], row: Int32[Array, "h t"]) -> Float[Array, "h t"]:
    return jnp.where(row >= 0, jnp.take_along_axis(lse, jnp.maximum(row, 0), axis=1), -jnp.inf)
