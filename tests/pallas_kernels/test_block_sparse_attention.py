"""block_sparse_attention: its meaning in 0/1 matrices, every backend against float64, and what it refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_attention_close, assert_close_to_reference
from problems import random_problem

from pallas_kernels import BlockIndex, block_sparse_attention, coverage
from pallas_kernels.attention import api
from pallas_kernels.block_index import NO_LIMIT, index_from_block_mask
from pallas_kernels.device import has_hopper_gpu
from pallas_kernels.notation import PAD_KV_POS, PAD_Q_POS

HOPPER = pytest.param("mosaic_gpu", marks=pytest.mark.skipif(not has_hopper_gpu(), reason="needs a Hopper GPU"))
IMPLEMENTATIONS = ("reference", "xla", HOPPER)
HOPPER_SIZES: dict[str, Any] = dict(
    head_dim=64, t=640, s=448, x=128, block_q=128, block_kv=64, granule=16, dtype="bfloat16"
)
"""The same problem, in the smallest blocks, the starts and the types that the Hopper kernel takes."""

# head dim, query heads, kv heads, dtype: every head dim and every GQA ratio in both dtypes.
SIZES = [(64, 2, 2, "float32"), (80, 4, 2, "float32"), (96, 7, 1, "float32"), (128, 4, 2, "float32"),
         (256, 2, 2, "float32"), (64, 7, 1, "bfloat16"), (80, 2, 2, "bfloat16"), (96, 4, 2, "bfloat16"),
         (128, 7, 1, "bfloat16"), (256, 4, 2, "bfloat16")]  # fmt: skip


def problem_for(implementation, rng, **sizes: Any):
    """A random problem of a size and type that the backend takes: float16 stands in for float32 on Hopper."""
    if implementation != "mosaic_gpu":
        return random_problem(rng, **sizes)
    dtype: dict[str, Any] = {"dtype": "float16"} if sizes.get("dtype") == "float32" else {}
    return random_problem(rng, **(HOPPER_SIZES | sizes | dtype))


def exp_error(implementation):
    """Relative error of the backend's exponential and logarithm: ex2.approx and lg2.approx, 2^-22 each (PTX ISA)."""
    return 2.0**-21 if implementation == "mosaic_gpu" else 0.0


attention = jax.jit(block_sparse_attention, static_argnames=("scale", "implementation"))


def small_index(first, num_full, count, start, interval=None, intervals=((0, NO_LIMIT),)):
    """One head, q and kv blocks of 2 tokens."""
    as_rows = lambda x: np.asarray([x], np.int32)  # noqa: E731
    return BlockIndex(
        first=as_rows(first), num_full=as_rows(num_full), count=as_rows(count), start=as_rows(start),
        interval=as_rows(interval or [0] * len(start)), intervals=as_rows(intervals), pos_row=as_rows([0] * len(first)),
        block_q=2, block_kv=2,
    )  # fmt: skip


def mask_of(index, q_pos, kv_pos):
    return np.asarray(coverage(index, jnp.asarray([q_pos], jnp.int32), jnp.asarray([kv_pos], jnp.int32)))[0].tolist()


def test_the_docstrings_example():
    index = small_index([0, 0], [0, 1], [1, 2], [0, 2])
    assert mask_of(index, [0, 1, 2, 3], [0, 1, 2, 3]) == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_a_distance_interval_is_exact_to_the_token():
    index = small_index([0, 1], [0, 0], [1, 2], [0, 0, 2], [1, 1, 1], ((0, NO_LIMIT), (1, 3)))
    assert mask_of(index, [0, 1, 2, 3], [0, 1, 2, 3]) == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]]


def test_shared_positions_attend_to_each_other():
    index = small_index([0, 0], [0, 0], [2, 2], [0, 2])
    assert mask_of(index, [0, 1, 1, 2], [0, 1, 1, 2]) == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_padding_attends_nothing_and_is_not_attended():
    index = small_index([0, 0], [0, 0], [2, 2], [0, 2])
    mask = mask_of(index, [PAD_Q_POS, 0, 1, PAD_Q_POS], [PAD_KV_POS, 0, 1, PAD_KV_POS])
    assert mask == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_coverage_counts_a_pair_as_often_as_it_is_visited():
    index = small_index([0, 0], [0, 1], [1, 2], [0, 0])
    assert mask_of(index, [0, 1, 2, 3], [0, 1, 2, 3]) == [[1, 0, 0, 0], [1, 1, 0, 0], [2, 2, 0, 0], [2, 2, 0, 0]]


def test_coverage_is_the_mask_of_random_problems(rng):
    for _ in range(5):
        problem = random_problem(rng)
        visits = coverage(problem.index, jnp.asarray(problem.kwargs["q_pos"]), jnp.asarray(problem.kwargs["kv_pos"]))
        np.testing.assert_array_equal(np.asarray(visits), problem.mask())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads", "dtype"), SIZES)
def test_against_float64(rng, implementation, head_dim, heads, kv_heads, dtype):
    problem = problem_for(implementation, rng, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    got = attention(problem.q, problem.k, problem.v, problem.index, **problem.kwargs, implementation=implementation)
    k, v = problem.keys_per_head()
    mask = problem.mask()
    assert_attention_close(got, problem.q, k, v, mask, head_dim**-0.5, exp_error=exp_error(implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_scale_and_no_extra_rows(rng, implementation):
    problem = problem_for(implementation, rng, x=0)
    kwargs = {name: problem.kwargs[name] for name in ("q_pos", "kv_pos")}
    got = attention(problem.q, problem.k, problem.v, problem.index, **kwargs, scale=0.7, implementation=implementation)
    mask = problem.mask()
    assert_attention_close(got, problem.q, problem.k, problem.v, mask, 0.7, exp_error=exp_error(implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_attend_nothing_are_exact_zeros(rng, implementation):
    problem = problem_for(implementation, rng)
    out, lse = attention(
        problem.q, problem.k, problem.v, problem.index, **problem.kwargs, implementation=implementation
    )
    sees_nothing = ~problem.mask().any(axis=2)
    assert sees_nothing.sum() >= 20
    assert (np.asarray(out)[sees_nothing] == 0).all() and (np.asarray(lse)[sees_nothing] == -np.inf).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_blocks_visited_is_dense_causal_attention(rng, implementation):
    block, d, dtype = (128, 64, "bfloat16") if implementation == "mosaic_gpu" else (16, 16, "float32")
    t = 3 * block
    q, k, v = (jnp.asarray(rng.normal(size=(2, t, d)), dtype) for _ in range(3))
    is_visited = np.ones((2, 3, 3), bool)
    index = index_from_block_mask(is_visited, np.tril(is_visited, -1), block_q=block, block_kv=block)
    pos = np.arange(t, dtype=np.int32)
    got = attention(q, k, v, index, q_pos=np.stack([pos, pos]), kv_pos=pos[None], implementation=implementation)
    mask = np.tril(np.ones((2, t, t), bool))
    assert_attention_close(got, q, k, v, mask, d**-0.5, exp_error=exp_error(implementation))
    dense = jax.nn.dot_product_attention(*(x.transpose(1, 0, 2)[None] for x in (q, k, v)), is_causal=True)[0]
    exact = np.asarray(dense, np.float64).transpose(1, 0, 2)
    ulp = float(jnp.finfo(dtype).eps) * np.abs(exact).max()  # each of the two rounds its weights and its output
    np.testing.assert_allclose(np.asarray(got[0], np.float64), exact, rtol=0, atol=4 * ulp)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_nobody_attends_may_be_nan(rng, implementation):
    problem = problem_for(implementation, rng)
    ratio, s = 2, problem.k.shape[1]
    mask = problem.mask()
    is_padding = (problem.kwargs["kv_pos"] == PAD_KV_POS).all(axis=0)
    is_visited = mask.any(axis=1)
    shared = is_visited[:, :s].reshape(-1, ratio, s).any(axis=1)
    poison = ~shared & (is_padding[:s] | ~_in_a_visited_block(problem)[:, :s].reshape(-1, ratio, s).any(axis=1))
    extra_poison = is_padding[s:] | ~_in_a_visited_block(problem)[:, s:]
    assert poison.any() and extra_poison.any()
    spoil = lambda x, where: np.where(where[..., None], np.nan, x).astype(x.dtype)  # noqa: E731
    kwargs = problem.kwargs | {name: spoil(problem.kwargs[name], extra_poison) for name in ("k_extra", "v_extra")}
    clean = attention(problem.q, problem.k, problem.v, problem.index, **problem.kwargs, implementation=implementation)
    k, v = spoil(problem.k, poison), spoil(problem.v, poison)
    poisoned = attention(problem.q, k, v, problem.index, **kwargs, implementation=implementation)
    for a, b in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert np.isfinite(np.asarray(poisoned[0], np.float64)).all()


def _in_a_visited_block(problem):
    """True for the rows of each head's kv view that lie in a block of one of its lists, [h, s + x]."""
    index = problem.index
    seen = np.zeros((index.num_heads, problem.kwargs["kv_pos"].shape[1]), bool)
    for h, i in np.ndindex(*index.count.shape):
        for start in index.start[h, index.first[h, i] :][: index.count[h, i]]:
            seen[h, start : start + index.block_kv] = True
    return seen


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_order_of_visited_blocks_does_not_matter(rng, implementation):
    problem = problem_for(implementation, rng)
    index = problem.index
    start, interval = index.start.copy(), index.interval.copy()
    for h, i in np.ndindex(*index.count.shape):
        partial = slice(index.first[h, i] + index.num_full[h, i], index.first[h, i] + index.count[h, i])
        start[h, partial], interval[h, partial] = index.start[h, partial][::-1], index.interval[h, partial][::-1]
    reversed_index = dataclasses.replace(index, start=start, interval=interval)
    assert not np.array_equal(start, index.start)
    got = attention(problem.q, problem.k, problem.v, reversed_index, **problem.kwargs, implementation=implementation)
    k, v = problem.keys_per_head()
    scale = problem.q.shape[-1] ** -0.5
    assert_attention_close(got, problem.q, k, v, problem.mask(), scale, exp_error=exp_error(implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_are_bit_equal(rng, implementation):
    problem = problem_for(implementation, rng, dtype="bfloat16")
    arguments = (problem.q, problem.k, problem.v, problem.index)
    runs = [attention(*arguments, **problem.kwargs, implementation=implementation) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_xla_are_those_of_masked_dense_attention(rng, dtype):
    problem = random_problem(rng, heads=6, kv_heads=2, dtype=dtype)
    mask, arrays = problem.mask(), problem.arrays()
    sees = mask.any(axis=2)
    weight, lse_weight = rng.normal(size=arrays[0].shape), rng.normal(size=sees.shape)

    def loss(out, lse):
        lse = jnp.where(sees, lse, 0.0)  # rows that attend nothing: -inf
        return (out.astype(lse.dtype) * weight.astype(lse.dtype)).sum() + (lse * lse_weight.astype(lse.dtype)).sum()

    def sparse(q, k, v, k_extra, v_extra):
        kwargs: dict[str, Any] = {n: jnp.asarray(x) for n, x in problem.kwargs.items()}
        kwargs |= {"k_extra": k_extra, "v_extra": v_extra}
        return loss(*block_sparse_attention(q, k, v, problem.index, **kwargs, implementation="xla"))

    def dense(q, k, v, k_extra, v_extra):
        accumulate = jnp.promote_types(q.dtype, jnp.float32)
        k, v = (jnp.concatenate([jnp.repeat(x, 3, axis=0), e], axis=1) for x, e in ((k, k_extra), (v, v_extra)))
        scores = jnp.einsum("htd,hsd->hts", q, k, preferred_element_type=accumulate) * 0.25
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jnp.where(mask, jax.nn.softmax(scores), 0.0).astype(v.dtype)
        out = jnp.einsum("hts,hsd->htd", weights, v, preferred_element_type=accumulate).astype(q.dtype)
        return loss(out, jax.nn.logsumexp(scores, axis=-1))

    every = (0, 1, 2, 3, 4)
    got, plain = (jax.jit(jax.grad(f, every))(*arrays) for f in (sparse, dense))
    with jax.enable_x64(True):
        exact = jax.grad(dense, every)(*(jnp.asarray(np.asarray(x, np.float64)) for x in arrays))
    for name, a, b, c in zip(("q", "k", "v", "k_extra", "v_extra"), got, exact, plain, strict=True):
        assert_close_to_reference(a, b, c, dtype=dtype, what=f"gradient of {name}")


def wrong_inputs():
    """Each rule of the api, what breaks it, and its message."""
    change = lambda **new: lambda a: a | {k: f(a[k]) for k, f in new.items()}  # noqa: E731
    twice = lambda axis: lambda x: np.concatenate([x, x], axis=axis)  # noqa: E731
    bf16 = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16))  # noqa: E731
    fewer = lambda x: x[:2]  # noqa: E731
    three_kv_heads = change(k=lambda x: x[[0, 0, 0]], v=lambda x: x[[0, 0, 0]])
    two_q_heads = change(q=fewer, q_pos=fewer, k_extra=fewer, v_extra=fewer)
    return {
        "heads": (three_kv_heads, "num_q_heads=4 must be a multiple of num_kv_heads=3"),
        "no kv heads": (change(k=lambda x: x[:0], v=lambda x: x[:0]), "heads and queries, got .*num_kv_heads=0, t=40"),
        "no queries": (change(q=lambda x: x[:, :0], q_pos=lambda x: x[:, :0]), "heads and queries, got .*t=0"),
        "head_dim": (change(k=twice(2), v=twice(2)), "q and k must have one head dim: q has 16, k has 32"),
        "v": (change(v=twice(1)), "v must have k's shape"),
        "dtype": (change(v=bf16), "q, k and v must have one dtype: got float32, float32, bfloat16"),
        "one extra": (change(k_extra=lambda x: None), "k_extra and v_extra come together"),
        "extra": (change(v_extra=fewer), "k_extra and v_extra must be"),
        "extra dtype": (change(v_extra=bf16), "k_extra and v_extra must have q's dtype float32, got float32, bfloat16"),
        "index heads": (two_q_heads, "the index has 4 heads, q has 2"),
        "tokens": (
            change(q=lambda x: x[:, :32], q_pos=lambda x: x[:, :32]),
            "q must have num_q_blocks . block_q = 40 tokens, got 32",
        ),
        "q_pos": (change(q_pos=lambda x: x[:, :32]), r"q_pos must be \[4, 40\]"),
        "kv_pos": (change(kv_pos=lambda x: x[:, 1:]), "kv_pos must have s . x = 72 positions, got 71"),
        "name": (lambda a: a | {"implementation": "cuda"}, "implementation='cuda' is unknown: expected one of"),
    }


@pytest.mark.parametrize("rule", wrong_inputs())
def test_bad_input_is_one_clear_value_error(rng, no_shape_checks, rule):
    problem = random_problem(rng)
    spoil, message = wrong_inputs()[rule]
    arguments = spoil({"q": problem.q, "k": problem.k, "v": problem.v} | problem.kwargs)
    q, k, v = (jnp.asarray(arguments.pop(name)) for name in "qkv")
    as_array = lambda x: x if x is None or isinstance(x, str) else jnp.asarray(x)  # noqa: E731
    arguments: dict[str, Any] = {name: as_array(x) for name, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(q, k, v, problem.index, **arguments)


def test_lists_without_room_for_an_entry_are_refused(rng, no_shape_checks):
    problem = random_problem(rng)
    none = {name: getattr(problem.index, name)[:, :0] for name in ("start", "interval")}
    index = dataclasses.replace(problem.index, **none)
    q, k, v = (jnp.asarray(x) for x in (problem.q, problem.k, problem.v))
    kwargs: dict[str, Any] = {name: jnp.asarray(x) for name, x in problem.kwargs.items()}
    with pytest.raises(ValueError, match="room for an entry, got index.start .4, 0."):
        block_sparse_attention(q, k, v, index, **kwargs)


def test_when_every_backend_refuses_each_reason_is_told(rng, monkeypatch):
    def refuse(inputs):
        raise NotImplementedError("head_dim=16 is not a multiple of 64")

    problem = random_problem(rng)
    monkeypatch.setitem(api._BACKENDS, "xla", refuse)
    monkeypatch.setattr(api, "DEFAULT_ORDER", ("xla",))
    q, k, v, *_ = problem.arrays()
    kwargs: dict[str, Any] = {name: jnp.asarray(x) for name, x in problem.kwargs.items()}
    with pytest.RaisesGroup(pytest.RaisesExc(NotImplementedError, match="head_dim=16 is not")):
        block_sparse_attention(q, k, v, problem.index, **kwargs)
    with pytest.raises(NotImplementedError, match="head_dim=16 is not"):
        block_sparse_attention(q, k, v, problem.index, **kwargs, implementation="xla")
