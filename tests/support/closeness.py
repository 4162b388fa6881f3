"""Tolerances, derived from what is compared: its size, its dtype and the number of roundings; never tuned.

Where float64 says what is right, an error may be twice that of the plain implementation in the same dtype, plus an ulp.
Where two programs of one dtype are compared, neither is right: each may round wherever it adds, in an order of its own,
which depends on the shapes and on the vector instructions of the processor.
"""

import jax
import jax.numpy as jnp
import numpy as np


def exact_attention(q, k, v, mask, scale):
    """Masked dense attention in float64: out [h, t, d] and lse [h, t]; zeros and -inf where nothing is attended.

    Args:
      q, k, v: head-major, [h, t, d] and [g, s, d].
      mask: True where a pair is attended, [h, t, s].
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    ratio = q.shape[0] // k.shape[0]
    scores = np.einsum("htd,hsd->hts", q, np.repeat(k, ratio, axis=0)) * scale
    scores = np.where(mask, scores, -np.inf)
    top = np.max(scores, axis=-1, keepdims=True)
    weights = np.where(mask, np.exp(scores - np.where(np.isfinite(top), top, 0)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    out = np.einsum("hts,hsd->htd", weights / np.where(total > 0, total, 1), np.repeat(v, ratio, axis=0))
    with np.errstate(divide="ignore"):
        return out, (np.where(np.isfinite(top), top, 0) + np.log(total))[..., 0]


@jax.jit
def _plain(q, k, v, mask, scale):
    ratio = q.shape[0] // k.shape[0]
    k, v = jnp.repeat(k, ratio, axis=0), jnp.repeat(v, ratio, axis=0)
    scores = jnp.einsum("htd,hsd->hts", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("hts,hsd->htd", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)
    return jnp.where(mask.any(axis=-1)[..., None], out, 0), jax.nn.logsumexp(scores, axis=-1)


def plain_attention(q, k, v, mask, scale):
    """What anyone would write: dense scores in float32, weights in the inputs' dtype. Arguments as above."""
    return _plain(q, k, v, mask, scale)


def score_ulp(q, k, mask, scale):
    """One float32 ulp of the largest sum that a score is accumulated in, [h].

    Matrix products of different shapes add up in different orders, so two right implementations differ by this much.
    """
    ratio = q.shape[0] // k.shape[0]
    q, k = (np.abs(np.asarray(x, np.float64)) for x in (q, k))
    sums = np.einsum("htd,hsd->hts", q, np.repeat(k, ratio, axis=0)) * scale
    return float(jnp.finfo(jnp.float32).eps) * np.where(mask, sums, 0).max(axis=(1, 2))


def model_terms(config, num_keys: int) -> int:
    """Numbers added up on the way to one logit: products of each layer, its softmax and the residual stream.

    Args:
      config: of a language model: its numbers of layers and heads and its dimensions.
      num_keys: tokens of the prompt, or of the bucket.
    """
    attention = config.embed_dim + config.head_dim + 2 * num_keys + config.num_heads * config.head_dim
    norms, residuals = 2 * config.embed_dim, 2
    return config.num_layers * (attention + config.embed_dim + config.mlp_dim + norms + residuals) + config.embed_dim


def attention_terms(num_keys: int, head_dim: int) -> int:
    """Numbers added up for one output of attention: a score, the sum of the weights and the weighted values."""
    return head_dim + 2 * num_keys


def reordering_error(want, terms: int, dtype=jnp.float32) -> float:
    """Largest difference expected of two programs that add up the same `terms` numbers in different orders.

    Each addition rounds by up to half an ulp, evenly spread: rms eps / sqrt(12) of the largest value. Over `terms`
    additions of two programs these wander sqrt(2 * terms) as far, and of the thousands of values compared the worst
    lies within five deviations: 5 / sqrt(6) * sqrt(terms) * eps, about 2 * sqrt(terms) * eps.
    """
    want = np.abs(np.asarray(want, np.float64))
    largest = float(want[np.isfinite(want)].max(initial=0.0))
    return 2 * float(np.sqrt(terms)) * float(jnp.finfo(dtype).eps) * largest


def squared_error_rtol(want, terms: int, dtype=jnp.float32) -> float:
    """Relative tolerance for fractions of squared output lost, |sparse - dense|^2 / |dense|^2, `want`.

    The difference is a root of `want` as large as what is rounded, and squaring doubles its relative error.
    """
    return 2 * reordering_error(1.0, terms, dtype) / float(np.sqrt(np.min(want)))


def assert_same_up_to_order(got, want, *, terms: int, dtype=jnp.float32, of_scores=0.0, what: str = "result") -> None:
    """Two results of the same arithmetic in another order; what is not finite must be equal.

    Args:
      got, want: arrays of one shape.
      terms: numbers added up for each value, see `model_terms` and `attention_terms`.
      dtype: that the programs compute in.
      of_scores: what `score_ulp` says, where scores of attention are large.
    """
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert got.shape == want.shape, f"{what}: {got.shape=} {want.shape=}"
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=f"{what}: where it is not finite")
    error = float(np.abs(got[finite] - want[finite]).max(initial=0.0)) if np.isfinite(got[finite]).all() else np.nan
    largest = float(np.abs(want[finite]).max(initial=0.0))
    allowed = reordering_error(want, terms, dtype) + float(of_scores) * largest
    # A NaN compares false, so it fails here too.
    assert error <= allowed, f"{what}: {error=:.3e} > {allowed=:.3e} for {terms=} of at most {largest:.3e}"


def assert_close_to_reference(got, exact, plain, *, dtype, of_scores=0.0, what: str = "out") -> None:
    """Error against float64 at most twice the plain implementation's, plus an ulp of the result and one of its scores.

    Args:
      got, plain: the two results in `dtype`.
      exact: the same in float64; -inf must be met exactly.
      dtype: of the results; its epsilon times the largest exact value is the ulp.
      of_scores: what `score_ulp` says; an error in a score changes a weight, and so the result, by that part.
    """
    got, exact, plain = (np.asarray(x, np.float64) for x in (got, exact, plain))
    finite = np.isfinite(exact)
    assert np.array_equal(got[~finite], exact[~finite]), f"{what}: differs where the exact value is not finite"
    if not finite.any():
        return
    error, plain_error = (np.max(np.abs(x[finite] - exact[finite])) for x in (got, plain))
    ulp = (float(jnp.finfo(dtype).eps) + of_scores) * np.max(np.abs(exact[finite]))
    allowed = 2 * plain_error + ulp
    # A NaN compares false, so it fails here too.
    assert error <= allowed, f"{what}: {error=:.3e} > {allowed=:.3e} = 2 * {plain_error:.3e} + {ulp=:.3e}"


def assert_attention_close(got, q, k, v, mask, scale, *, exp_error=0.0) -> None:
    """`got = (out, lse)`, head-major, is masked dense attention, head by head. Keys nobody attends may hold NaN.

    Args:
      got, q, k, v, mask, scale: as above.
      exp_error: relative error of one exponential, on hardware that approximates it; 0 where it is rounded as usual.
    """
    is_attended = np.asarray(mask).any(axis=1).reshape(k.shape[0], -1, k.shape[1]).any(axis=1)[..., None]
    k, v = (jnp.where(is_attended, x, 0) for x in (k, v))
    assert got[0].dtype == q.dtype and got[1].dtype == jnp.float32
    exact, plain = exact_attention(q, k, v, mask, scale), plain_attention(q, k, v, mask, scale)
    assert_heads_close(got, exact, plain, score_ulp(q, k, mask, scale) + exp_error, range(q.shape[0]))


def assert_heads_close(got, exact, plain, ulps, heads) -> None:
    """The named heads of `(out, lse)` are close; arguments as above, all heads of each."""
    for h in heads:
        (out, lse), (exact_out, exact_lse), (plain_out, plain_lse) = (
            (x[h] for x in pair) for pair in (got, exact, plain)
        )
        assert_close_to_reference(
            out, exact_out, plain_out, dtype=out.dtype, of_scores=ulps[h], what=f"out of head {h}"
        )
        assert_close_to_reference(
            lse, exact_lse, plain_lse, dtype=jnp.float32, of_scores=ulps[h], what=f"lse of head {h}"
        )
