"""sparse_attention: every pattern, backend, GQA ratio and head dim against masked dense attention in float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PATTERNS, QUICK_TO_COMPILE, SMALL, causal, mixed_prompt, plan_of, visit_counts
from closeness import (
    assert_attention_close,
    assert_close_to_reference,
    assert_heads_close,
    assert_same_up_to_order,
    attention_terms,
    exact_attention,
    plain_attention,
    score_ulp,
)

from mmi_jax import AShape, Dense, Grid, Pattern, VerticalSlash, sparse_attention
from mmi_jax.layout import concatenate, stack, text_tokens, vision_tokens
from mmi_jax.method.attention import attend_by_plan
from mmi_jax.method.dispatch import attend_sparsely
from mmi_jax.method.plan import batch_geometry, plan_batch
from mmi_jax.method.query_parts import Part, Runs, Scope
from pallas_kernels.block_lists import xla
from pallas_kernels.block_lists.block_sizes import Blocks

NAMES = tuple(PATTERNS)
HEADS = tuple(PATTERNS.values())
IMPLEMENTATIONS = ("reference", "xla")


# Plans of all patterns, each a query head: queries, GQA ratio of the estimate, dtype, tile sizes.
PLANS = {
    "prompt": (107, 2, "float32", SMALL),
    "chunk": (61, 7, "bfloat16", SMALL),
}
# Plan, GQA ratio, head dim, dtype: every ratio and every head dim in both dtypes.
RUNS = [
    ("prompt", 1, 64, "float32"), ("chunk", 2, 64, "bfloat16"), ("prompt", 7, 80, "bfloat16"),
    ("chunk", 2, 80, "float32"), ("prompt", 2, 96, "bfloat16"), ("chunk", 7, 96, "float32"),
    ("prompt", 1, 128, "bfloat16"), ("chunk", 7, 128, "float32"), ("chunk", 1, 256, "bfloat16"),
    ("prompt", 7, 256, "float32"),
]  # fmt: skip


def random_qkv(rng, *, batch, t, s, heads, kv_heads, head_dim, dtype="float32"):
    shapes = ((batch, t, heads, head_dim), *[(batch, s, kv_heads, head_dim)] * 2)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


@functools.partial(jax.jit, static_argnames=("patterns", "blocks"), compiler_options=QUICK_TO_COMPILE)
def plans_of(q, k, layout, *, patterns, blocks):
    kwargs = {"batch": q.shape[0], "num_queries": q.shape[1], "q_start": None, "blocks": blocks}
    return plan_batch(patterns, q, k, batch_geometry(layout, patterns, **kwargs), scale=0.125, blocks=blocks)


@functools.cache
def planned(name: str):
    """The plan [b = 1] of all patterns over the mixed prompt, and how often it visits each pair, [h, t, s]."""
    num_queries, ratio, dtype, blocks = PLANS[name]
    q, k, _ = inputs(num_queries, ratio, 64, dtype)
    plan = plans_of(q, k, mixed_prompt(), patterns=HEADS, blocks=blocks)
    counts = visit_counts(jax.tree.map(lambda x: x[0], plan))
    np.testing.assert_array_equal(np.asarray(jax.jit(jax.vmap(lambda plan: plan.coverage()))(plan))[0], counts)
    return plan, counts


def inputs(num_queries, ratio, head_dim, dtype):
    s, heads = mixed_prompt().num_tokens, len(HEADS)
    sizes = {"t": num_queries, "s": s, "heads": heads, "kv_heads": heads // ratio, "head_dim": head_dim, "dtype": dtype}
    return random_qkv(np.random.default_rng(head_dim), batch=1, **sizes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("plan", PLANS)
def test_no_pair_is_visited_twice_and_no_query_sees_its_future(plan, name):
    visits = planned(plan)[1][NAMES.index(name)]
    t, s = visits.shape
    allowed = causal(mixed_prompt())[-t:]
    assert visits.max() <= 1, "a pair is visited twice"
    assert not visits[~allowed].any(), "a query sees its future"
    assert visits.diagonal(s - t).all(), "a query does not see itself"
    is_dense = (visits == allowed).all()
    assert is_dense == (name == "dense"), "only dense keeps every pair"


@functools.cache
def expected(run):
    """`(out, lse)` of all heads, head-major, exactly and by the plain implementation; and an ulp of their scores."""
    name, *sizes = run
    q, k, v = (x[0].transpose(1, 0, 2) for x in inputs(PLANS[name][0], *sizes))
    mask, scale = planned(name)[1] > 0, q.shape[-1] ** -0.5
    return exact_attention(q, k, v, mask, scale), plain_attention(q, k, v, mask, scale), score_ulp(q, k, mask, scale)


@functools.cache
def attended(run, implementation):
    """Output and lse of all heads, head-major."""
    name, *sizes = run
    q, k, v = inputs(PLANS[name][0], *sizes)
    attend = functools.partial(attend_by_plan, scale=q.shape[-1] ** -0.5, implementation=implementation)
    out, lse = jax.jit(attend)(planned(name)[0], q, k, v)
    return out[0].transpose(1, 0, 2), lse[0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run)))
def test_every_pattern_is_masked_dense_attention(run, name, implementation):
    out, lse = got = attended(run, implementation)
    assert out.dtype == run[-1] and lse.dtype == jnp.float32
    assert_heads_close(got, *expected(run), [NAMES.index(name)])


@pytest.mark.slow
def test_the_default_blocks(rng):
    """Blocks of 128 tokens: four q blocks and a rest, several patterns in one call, all but one leaving out pairs."""
    patterns = (AShape(sink=8, local=30), VerticalSlash(vertical=130, slash=32, local=16), Dense(), Grid(local=40))
    layout = concatenate([text_tokens(9), vision_tokens(36, 3, 5), text_tokens(4)])
    q, k, v = random_qkv(rng, batch=1, t=553, s=553, heads=4, kv_heads=2, head_dim=16)
    attend = jax.jit(functools.partial(attend_sparsely, patterns=patterns, implementation="xla"))
    result = attend(q, k, v, layout=layout)
    visits = visit_counts(jax.tree.map(lambda x: x[0], result.plan))
    assert visits.max() == 1 and (visits[[0, 1, 3]].sum(axis=(1, 2)) < visits[2].sum()).all()
    q, k, v = (x[0].transpose(1, 0, 2) for x in (q, k, v))
    assert_attention_close((result.out[0].transpose(1, 0, 2), result.lse[0]), q, k, v, visits > 0, 0.25)


def test_examples_of_different_length_in_one_batch_are_as_if_alone(rng):
    patterns = (PATTERNS["grid_slashes"], PATTERNS["vertical_slash"])
    layouts = [mixed_prompt(), concatenate([text_tokens(5), vision_tokens(4, 4, 4), text_tokens(2)]), text_tokens(33)]
    q, k, v = random_qkv(rng, batch=3, t=107, s=107, heads=2, kv_heads=1, head_dim=16)
    attend = jax.jit(functools.partial(sparse_attention, patterns=patterns, blocks=SMALL))
    together = np.asarray(attend(q, k, v, layout=stack(layouts)))
    for n, layout in enumerate(layouts):
        alone = np.asarray(attend(*(x[n : n + 1] for x in (q, k, v)), layout=layout.pad_to(107)))[0]
        length = layout.num_tokens
        assert_same_up_to_order(together[n, :length], alone[:length], terms=attention_terms(107, 16))
        assert not together[n, length:].any() and np.abs(alone[:length]).min(axis=-1).max() > 0


def test_one_layout_serves_a_batch_and_bad_values_stay_in_their_example(rng):
    layout = text_tokens(40)
    q, k, v = random_qkv(rng, batch=2, t=40, s=40, heads=2, kv_heads=1, head_dim=16)
    attend = jax.jit(functools.partial(sparse_attention, patterns=AShape(sink=4, local=8), blocks=SMALL))
    clean = np.asarray(attend(q, k, v, layout=layout))
    spoilt = np.asarray(attend(q, k.at[1].set(jnp.nan), v, layout=layout))
    np.testing.assert_array_equal(clean[0], spoilt[0])
    assert np.isnan(spoilt[1]).all()


@pytest.mark.parametrize("name", ["grid_slashes", "boundary_2d"])
def test_gradients_are_those_of_masked_dense_attention(rng, name):
    layout, ratio = mixed_prompt(), 2
    q, k, v = random_qkv(rng, batch=1, t=107, s=107, heads=2, kv_heads=1, head_dim=16)
    weight = rng.normal(size=q.shape)

    def sparse(q, k, v):
        result = attend_sparsely(q, k, v, PATTERNS[name], layout=layout, blocks=SMALL, implementation="xla")
        return (result.out * weight.astype("f")).sum(), result.plan

    (_, plan), got = jax.jit(jax.value_and_grad(sparse, (0, 1, 2), has_aux=True))(q, k, v)
    mask = visit_counts(jax.tree.map(lambda x: x[0], plan)) > 0

    def dense(q, k, v):
        scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, ratio, axis=2)) * 0.25
        weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(q.dtype).min))
        out = jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, ratio, axis=2))
        return (out * weight.astype(out.dtype)).sum()

    plain = jax.jit(jax.grad(dense, (0, 1, 2)))(q, k, v)
    with jax.enable_x64(True):
        exact = jax.grad(dense, (0, 1, 2))(*(jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v)))
    for letter, a, b, c in zip("qkv", got, exact, plain, strict=True):
        assert_close_to_reference(a, b, c, dtype=jnp.float32, what=f"gradient of {letter}")


@dataclasses.dataclass(frozen=True)
class EveryOther(Pattern):
    """A researcher's pattern in one file: the q block itself and every second kv block before it."""

    max_blocks: int

    def parts(self, scope: Scope) -> list[Part]:
        def visits(q_blocks):
            blocks, view = scope.blocks, scope.view
            start = jnp.arange(scope.num_kv_blocks)[None] * blocks.kv
            here = view.rank(q_blocks.min_pos)[:, None] // blocks.kv * blocks.kv
            is_seen = (start == here) | ((start < here) & (start // blocks.kv % 2 == 0))
            return [
                Runs(start=view.offset + jnp.broadcast_to(start, is_seen.shape), num_blocks=is_seen.astype(jnp.int32))
            ]

        return [Part(member=scope.member, visits=visits, max_blocks=self.max_blocks)]


def every_other(num_tokens, block):
    at = np.arange(num_tokens) // block
    is_seen = (at[None] % 2 == 0) | (at[None] == at[:, None])
    return is_seen & np.tril(np.ones((num_tokens, num_tokens), bool))


def test_a_pattern_of_a_user_is_one_file(rng):
    q, k, v = random_qkv(rng, batch=1, t=75, s=75, heads=2, kv_heads=1, head_dim=16)
    out = sparse_attention(q, k, v, EveryOther(100), layout=text_tokens(75), blocks=SMALL)
    plan = plan_of(EveryOther(100), text_tokens(75))
    mask = visit_counts(plan) > 0
    assert (mask[0] == every_other(75, 16)).all()
    q, k, v = (x[0].transpose(1, 0, 2) for x in (q, k, v))
    exact, _ = exact_attention(q, k, v, np.repeat(mask, 2, axis=0), 0.25)
    assert_same_up_to_order(out[0], exact.transpose(1, 0, 2), terms=attention_terms(75, 16))


def test_lists_that_do_not_fit_make_their_head_dense_and_no_other():
    # Five q blocks visit 1 + 2 + 2 + 3 + 3 blocks.
    masks = visit_counts(plan_of([EveryOther(11), EveryOther(10)], text_tokens(75)))
    assert (masks[0] == every_other(75, 16)).all()
    assert (masks[1] == causal(text_tokens(75))).all()


@pytest.mark.parametrize("max_blocks", [60, 59, 15])
def test_lists_are_the_same_from_the_short_program_and_from_the_long_one(max_blocks, monkeypatch):
    monkeypatch.setattr(xla, "SHORT_PROGRAM_FROM", 0)
    # Six q blocks visit 1 + 2 + 2 + 3 + 3 + 4 blocks: a quarter of 60, more than a quarter of 59.
    masks = visit_counts(plan_of([EveryOther(max_blocks)] * 2, text_tokens(90)))
    assert (masks == every_other(90, 16)[None]).all()


def test_lists_that_do_not_fit_make_a_head_with_gathered_rows_and_passes_dense():
    class Tight(Grid):
        """Grid whose lists are bounded far too tightly."""

        def parts(self, scope):
            return [dataclasses.replace(part, max_blocks=1) for part in super().parts(scope)]

    tight = Tight(use_slash=True, local=12, sink=4, tail=8, last_q=8)
    visits = visit_counts(plan_of(tight, mixed_prompt()))[0]
    assert (visits == causal(mixed_prompt())).all()


def wrong_calls():
    """Each rule of sparse_attention: what breaks it, and its message."""
    three = lambda x: jnp.concatenate([x, x, x], axis=2)  # noqa: E731
    long = lambda x: jnp.concatenate([x, x], axis=1)  # noqa: E731
    return {
        "heads": ({"k": three, "v": three}, "num_q_heads=4 must be a positive multiple of num_kv_heads=3"),
        "v": ({"v": long}, "q, k, v must agree in batch and head dim"),
        "queries": ({"q": long}, "there are more queries than keys: q has 20 tokens, k has 10"),
        "layout": ({"layout": lambda x: x.pad_to(11)}, "the layout must describe every kv token: it has 11, k has 10"),
        "layout batch": ({"layout": lambda x: stack([x, x, x])}, "the layout must describe 1 example or 2, got 3"),
        "patterns": ({"patterns": lambda x: [x]}, "one pattern for each of the 4 query heads, got 1"),
        "q_start": ({"q_start": lambda x: 1}, "queries must lie among the keys: q_start=1 and 10 queries, 10 keys"),
    }


@pytest.mark.parametrize("rule", wrong_calls())
def test_bad_input_is_one_clear_value_error(rng, no_shape_checks, rule):
    q, k, v = random_qkv(rng, batch=2, t=10, s=10, heads=4, kv_heads=1, head_dim=8)
    arguments: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "patterns": Dense(),
        "layout": text_tokens(10),
        "q_start": None,
    }
    changes, message = wrong_calls()[rule]
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        sparse_attention(**arguments)


def test_blocks_refuse_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="kv a multiple of granule: got Blocks"):
        Blocks(q=16, kv=24, granule=16)
    with pytest.raises(ValueError, match="block sizes must be positive"):
        Blocks(q=0)
