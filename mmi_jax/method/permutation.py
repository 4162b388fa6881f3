"""Permutation: query rows reordered, with gaps and repeats, and back."""

import jax.numpy as jnp

from pallas_kernels.notation import Array, Float, Int32
from pallas_kernels.pytree import pytree


@pytree
class Permutation:
    """Per head, which token each row holds, and where each token went.

    Rows of one part are padded to whole q blocks, so a row may be empty (-1); a token may stand in several views, each
    visiting other keys. Four tokens, the even ones first, q blocks of 4 rows:

        order    0 2 -1 -1  1 3 -1 -1
        inverse  0 4  1  5

    Args:
      order: token of each row, -1 for an empty row.
      inverse: row of each token in each of `n` views, -1 where the view does not hold it. Every real token stands in
        view 0.
    """

    order: Int32[Array, "h r"]
    inverse: Int32[Array, "h n t"]

    def apply(self, x: Float[Array, "h t d"]) -> Float[Array, "h r d"]:
        """Rows in permuted order; what an empty row holds is unspecified but finite where `x` is."""
        return _taken(x, self.order)

    def undo(self, x: Float[Array, "h r d"]) -> Float[Array, "h t d"]:
        """Tokens back in their places, read from view 0; zeros for tokens it does not hold."""
        return _rows(x, self.inverse[:, 0])

    def merge(self, out: Float[Array, "h r d"], lse: Float[Array, "h r"]) -> tuple[Array, Array]:
        """Tokens back in their places, with the softmax of several views joined into one.

        Each view holds softmax-weighted sums over disjoint keys; `exp(lse)` is a view's share of the denominator.

        Returns:
          `out [h, t, d]` in the dtype of `out`, and `lse [h, t]` in float32: zeros and -inf for a token no view holds.
        """
        num_views = self.inverse.shape[1]
        views = [_rows(out, self.inverse[:, n]) for n in range(num_views)]
        shares = [_lse_rows(lse, self.inverse[:, n]) for n in range(num_views)]
        if num_views == 1:
            return views[0], shares[0]
        total = shares[0]
        for share in shares[1:]:
            total = jnp.logaddexp(total, share)
        floor = jnp.where(jnp.isfinite(total), total, 0.0)
        merged = sum(
            jnp.exp(share - floor)[..., None] * view.astype(jnp.float32)
            for share, view in zip(shares, views, strict=True)
        )
        return jnp.asarray(merged).astype(out.dtype), total


def _rows(x, row):
    return jnp.where(row[..., None] >= 0, _taken(x, row), jnp.zeros((), x.dtype))


def _taken(x, row):
    """The rows, all of them in range: asking would cost a second select of every number."""
    return jnp.take_along_axis(x, jnp.maximum(row, 0)[..., None], axis=1, mode="promise_in_bounds")


def _lse_rows(lse, row):
    return jnp.where(row >= 0, jnp.take_along_axis(lse, jnp.maximum(row, 0), axis=1), -jnp.inf)
