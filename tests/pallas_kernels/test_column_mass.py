"""Attention mass per key and band: meaning in float64, vmap without copies, the Hopper kernel interpreted, lowered."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_same_up_to_order, attention_terms
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.device import has_hopper_gpu
from pallas_kernels.estimate import mosaic_gpu
from pallas_kernels.estimate.api import column_mass, line_mass
from pallas_kernels.notation import PAD_KV_POS

SCALE = 0.2
BAND = 16


def problem(rng, *, num_heads=3, num_queries=50, num_keys=512, num_kv_heads=2, head_dim=64, dtype="bfloat16"):
    """Arguments by name: a query that is not there, padded keys that hold NaN, positions and kv heads out of order."""
    q, k = (
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape in ((num_heads, num_queries, head_dim), (num_keys, num_kv_heads, head_dim))
    )
    q_pos = jnp.asarray(rng.integers(0, num_keys, (num_heads, num_queries)), jnp.int32).at[0, 3].set(-1)
    kv_pos = jnp.asarray(rng.permutation(num_keys)[None], jnp.int32).at[0, -12:].set(PAD_KV_POS)
    kv_head = jnp.asarray(rng.integers(0, num_kv_heads, num_heads), jnp.int32)
    return dict(q=q, k=k.at[-12:].set(jnp.nan), kv_head=kv_head, q_pos=q_pos, kv_pos=kv_pos)


def attention(q, k, kv_head, q_pos, kv_pos):
    """Attention of every query over every key [h, q, s] in float64, head by head; zeros for a query that sees none."""
    weights = np.zeros((*q.shape[:2], k.shape[0]))
    keys, queries = (np.asarray(x.astype(jnp.float32), np.float64) for x in (k, q))
    for h, (g, positions) in enumerate(zip(np.asarray(kv_head), np.asarray(q_pos), strict=True)):
        sees = np.asarray(kv_pos) <= positions[:, None]
        scores = np.where(sees, queries[h] @ np.where(sees.any(axis=0)[:, None], keys[:, g], 0.0).T * SCALE, -np.inf)
        above = np.exp(scores - np.where(sees.any(axis=1), scores.max(axis=1), 0.0)[:, None])
        weights[h] = above / np.maximum(above.sum(axis=1, keepdims=True), 1e-300)
    return weights


def terms_of(args) -> int:
    """Numbers added up for the mass of one key: attention of every query to it."""
    num_queries, head_dim = args["q"].shape[1:]
    return num_queries + attention_terms(args["k"].shape[0], head_dim)


def assert_close(got, args):
    want = attention(**args).sum(axis=1)
    assert_same_up_to_order(got, want, terms=terms_of(args))


def with_rows(args):
    """The problem with keys in order of position, as in a prompt, and the row of each query's own position."""
    kv_pos = jnp.arange(args["k"].shape[0], dtype=jnp.int32)[None].at[0, -12:].set(PAD_KV_POS)
    return args | dict(kv_pos=kv_pos, q_row=args["q_pos"])


def late(args):
    """The same queries at the end of the prompt, as estimates read them: most splits of the keys lie before all."""
    num_queries, last = args["q_pos"].shape[1], args["k"].shape[0] - 20
    q_pos = jnp.broadcast_to(jnp.arange(last - num_queries, last, dtype=jnp.int32), args["q_pos"].shape)
    return with_rows(args | dict(q_pos=q_pos))


def assert_lines_close(got, args):
    """Both masses, the bands counted pair by pair from the distances."""
    columns, bands = got
    weights = attention(**{name: x for name, x in args.items() if name != "q_row"})
    assert_same_up_to_order(columns, weights.sum(axis=1), terms=terms_of(args))
    want = np.zeros(bands.shape)
    for h, n in np.ndindex(args["q_row"].shape):
        row = int(args["q_row"][h, n])
        keys = np.arange(row + 1)
        np.add.at(want[h], (row - keys + BAND // 2) // BAND, weights[h, n, keys])
    assert_same_up_to_order(bands, want, terms=terms_of(args))


def test_lines_are_the_same_mass_by_distance(rng):
    args = with_rows(problem(rng, num_keys=128, num_queries=7))
    assert_lines_close(line_mass(**args, band=BAND, scale=SCALE, implementation="xla"), args)


def test_mass_is_the_softmax_summed_over_the_queries(rng):
    args = problem(rng)
    assert_close(column_mass(**args, scale=SCALE, implementation="xla"), args)


def test_mapped_heads_and_examples_join_the_heads(rng):
    examples = [problem(rng, num_heads=4, num_queries=5, num_keys=64, dtype="float32") for _ in range(3)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *examples)

    def head(q, kv_head, q_pos, k, kv_pos):
        return column_mass(q[None], k, kv_head[None], q_pos=q_pos[None], kv_pos=kv_pos, scale=SCALE)[0]

    over_heads = jax.vmap(head, (0, 0, 0, None, None))
    both = jax.vmap(over_heads)
    got = both(*(stacked[name] for name in ("q", "kv_head", "q_pos", "k", "kv_pos")))
    for out, args in zip(got, examples, strict=True):
        assert_close(out, args)


@pytest.mark.usefixtures("no_shape_checks")
def test_unknown_implementation_is_named(rng):
    with pytest.raises(ValueError, match="'cuda' is unknown"):
        column_mass(**problem(rng), scale=SCALE, implementation="cuda")  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_keys=0), "must not be empty: got .3, 50, 64., .0, 2, 64."),
        (dict(num_queries=0), "must not be empty"),
        (dict(q_pos=np.zeros((3, 49), np.int32)), "q_pos must be .3, 50., got .3, 49."),
        (dict(kv_head=np.zeros(2, np.int32)), "kv_head must be .3., got .2,."),
        (dict(kv_pos=np.zeros((1, 511), np.int32)), "512 positions in a row, got 511"),
        (dict(kv_pos=np.zeros((3, 512), np.int32)), "got 2 kv heads, 3 rows"),  # would read past the rows on a GPU
        (dict(scale=float("nan")), "scale must be finite, got nan"),
        (dict(q_row=np.zeros((3, 50), np.int32), band=0), "band=0 must be at least 1"),
        (dict(q_row=np.zeros((3, 49), np.int32), band=16), "q_row .3, 50. as q_pos, got .3, 49."),
    ],
)
def test_what_no_backend_could_honour_is_refused(change, message):
    sizes = {name: x for name, x in change.items() if name.startswith("num_")}
    q, k = jnp.zeros((3, sizes.get("num_queries", 50), 64)), jnp.zeros((sizes.get("num_keys", 512), 2, 64))
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)  # noqa: E731
    args: dict[str, Any] = dict(q=q, k=k, kv_head=zeros(3), q_pos=zeros(*q.shape[:2]), kv_pos=zeros(1, k.shape[0]))
    args |= dict(scale=SCALE) | {name: x for name, x in change.items() if name not in sizes}
    with pytest.raises(ValueError, match=message):
        (line_mass if "band" in args else column_mass)(**args)


def test_check_supported_refuses_a_scale_at_which_hidden_keys_would_count(rng):
    args = problem(rng)
    with pytest.raises(NotImplementedError, match="scale must be at least 1e-06, got 1e-12"):
        mosaic_gpu.check_supported(args["q"], args["k"], 1e-12)


@pytest.mark.skipif(has_hopper_gpu(), reason="there is a Hopper GPU")
def test_the_kernel_refuses_without_a_hopper_gpu(rng):
    with pytest.raises(NotImplementedError, match="compute capability 9"):
        column_mass(**problem(rng), scale=SCALE, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype="float32"), "both bfloat16 or both float16"),
        (dict(head_dim=80), "64, 128 or 256"),
        (dict(num_queries=65), "at most 64"),
        (dict(num_keys=500), "multiple of 64"),
    ],
)
def test_check_supported_names_the_limit(rng, change, message):
    args = problem(rng, **change)
    with pytest.raises(NotImplementedError, match=message):
        mosaic_gpu.check_supported(args["q"], args["k"], SCALE)


def test_check_supported_names_the_bands(rng):
    args = problem(rng)
    with pytest.raises(NotImplementedError, match="8, 16, 32 or 64 keys, got 12"):
        mosaic_gpu.check_supported(args["q"], args["k"], SCALE, 12)


@pytest.mark.parametrize("num_programs", [1, 7])
def test_interpreted_kernel_is_right_and_has_no_races(rng, num_programs, capfd):
    args = problem(rng)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        (got,) = mosaic_gpu.launch(**args, scale=SCALE, num_programs=num_programs)  # pyright: ignore[reportArgumentType]
    assert_close(got, args)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_interpreted_kernel_hides_nothing_where_all_is_seen(rng, capfd):
    args = late(problem(rng, num_queries=64, num_heads=4, num_kv_heads=3))
    args |= dict(kv_head=jnp.array([2, 0, 2, 2], jnp.int32))  # nobody reads kv head 1
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = mosaic_gpu.launch(**args, scale=SCALE, band=BAND, num_programs=12)
    assert_lines_close(got, args)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_shares_grow_with_the_prompt_and_divide_it():
    def keys(num_keys, num_kv_heads=4, head_dim=128):
        return mosaic_gpu.keys_per_split(jax.ShapeDtypeStruct((num_keys, num_kv_heads, head_dim), jnp.bfloat16), 264)

    assert [keys(n) for n in (1024, 16384, 32768, 131072)] == [64, 128, 256, 256]
    assert [keys(131072 + n) for n in (64, 128)] == [64, 128]
    assert [keys(131072, head_dim=d) for d in (64, 256)] == [512, 128]


@pytest.mark.parametrize("num_programs", [1, 7])
def test_interpreted_kernel_finds_the_bands_and_has_no_races(rng, num_programs, capfd):
    args = with_rows(problem(rng, num_keys=384, num_queries=20))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = mosaic_gpu.launch(**args, scale=SCALE, band=BAND, num_programs=num_programs)
    assert_lines_close(got, args)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernels_lower_for_cuda(rng, head_dim, dtype):
    args = with_rows(problem(rng, head_dim=head_dim, dtype=dtype))
    launch = functools.partial(mosaic_gpu.launch, scale=SCALE, band=BAND, num_programs=1)  # the largest splits
    lowered = jax.jit(launch).trace(**args)
    assert lowered.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu") == 2


@pytest.mark.skipif(not has_hopper_gpu(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("sizes", [dict(), dict(head_dim=128, num_keys=2**15, num_heads=28, num_kv_heads=4)], ids=str)
@pytest.mark.parametrize("place", [with_rows, late])
def test_kernels_are_right_on_the_device(rng, sizes, place):
    args = problem(rng, **sizes)
    assert_close(jax.jit(functools.partial(column_mass, scale=SCALE, implementation="mosaic_gpu"))(**args), args)
    args = place(problem(rng, num_queries=64, **sizes))
    run = jax.jit(functools.partial(line_mass, scale=SCALE, band=BAND, implementation="mosaic_gpu"))
    assert_lines_close(run(**args), args)
