"""`mmi bench`: figures of small cases, what is checked before it is timed, and what it refuses."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import fake_torch
import jax
import numpy as np
import pytest
from closeness import assert_same_up_to_order, attention_terms

from mmi_jax.bench.attention import bench_attention
from mmi_jax.bench.baselines import dense_attention, torch_attention
from mmi_jax.bench.checks import sampled_rows
from mmi_jax.bench.checks.kernel_rules import RULE_CASES, check_rules
from mmi_jax.bench.plans import PLAN_CASES, PlanSizes, bench_plan
from mmi_jax.bench.synthetic import GRID, synthetic_qkv, video_prompt
from mmi_jax.bench.timing import machine, measurements, wall_time
from mmi_jax.cli import main
from mmi_jax.layout import TEXT, VISION
from mmi_jax.method.patterns import Grid
from mmi_jax.method.tables.cost_model import CostModel
from pallas_kernels.attention import reference
from pallas_kernels.attention.cases import CASES, AllVisited, AttentionCase, RandomFraction, RandomLists, mixed_inputs

SMALL = AttentionCase(
    name="small", num_tokens=512, lists=RandomFraction(fraction=0.3), num_q_heads=4, num_kv_heads=2, head_dim=64,
    dtype="float32",
)  # fmt: skip
SIZES = PlanSizes(num_tokens=1024, num_q_heads=2, num_kv_heads=1, head_dim=64, dtype="float32")


@pytest.fixture
def small_case(monkeypatch):
    monkeypatch.setitem(CASES, "small", SMALL)
    monkeypatch.setattr(wall_time, "matmul_tflops_per_s", lambda: 1.0)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def figures_of(case):
    return bench_attention(case, implementation="xla", with_dense=True, with_peers=False, repeats=2)


def test_a_case_has_its_figures_and_dense_attention_beside_them():
    figures = figures_of(SMALL)
    tiles = 4 * sum(max(1, int(0.3 * n)) for n in range(1, 5))
    assert figures["flops"] == 4.0 * tiles * 128 * 128 * 64
    assert figures["relative_error"] < 1e-6 and figures["lse_error"] < 1e-5 and figures["is_bit_equal"]
    assert figures["fastest_ms"] <= figures["median_ms"] <= figures["slowest_ms"]
    timed, masked = figures["others"]
    assert "error" not in timed, timed
    assert timed["speedup"] == pytest.approx(timed["median_ms"] / figures["median_ms"], rel=0.02)
    assert timed["tflops_per_s"] == pytest.approx(2 * 4 * 512**2 * 64 / timed["median_ms"] / 1e9, abs=1e-3)
    assert masked["name"] == "xla masked, jax" and masked["relative_error"] < 1e-6 and "median_ms" not in masked


@pytest.mark.parametrize("spoil", ["out", "lse"])
def test_a_wrong_output_is_not_timed(monkeypatch, spoil):
    def wrong(inputs, implementation):
        out, lse = reference.attend(inputs)
        return (out * 1.01, lse) if spoil == "out" else (out, lse + 0.01)

    monkeypatch.setattr("mmi_jax.bench.attention.attend_inputs", wrong)
    monkeypatch.setattr(wall_time.Program, "time", lambda *_, **__: pytest.fail("timed a wrong output"))
    message = {"out": "relative error against float64 must be at most 1e-05", "lse": "log-sum-exp must be within"}
    with pytest.raises(RuntimeError, match=message[spoil]):
        figures_of(SMALL)


def test_sampled_rows_follow_the_lists():
    inputs = mixed_inputs(num_q_blocks=2, num_shared=256, dtype="float32")
    out, lse = reference.attend(inputs)
    rows = np.array([0, 127, 128, 255])
    expected, expected_lse = sampled_rows.rows_in_float64(inputs, 1, rows)
    terms = attention_terms(inputs.k.shape[1], inputs.q.shape[-1])
    assert_same_up_to_order(np.asarray(out[1])[rows], expected, terms=terms)
    assert_same_up_to_order(np.asarray(lse[1])[rows], expected_lse, terms=terms)


def test_a_row_that_visits_nothing_is_minus_infinity_exactly():
    rows = sampled_rows.SampledRows(
        heads=np.zeros(2, int), rows=np.arange(2), out=np.array([[0.0], [1.0]]), lse=np.array([-np.inf, 2.0])
    )
    assert rows.check(rows.out, rows.lse, dtype="float32") == {"relative_error": 0.0, "lse_error": 0.0}
    for wrong in (np.array([-1e9, 2.0]), np.array([np.nan, 2.0]), np.array([-np.inf, np.inf])):
        with pytest.raises(RuntimeError, match="log-sum-exp must be within"):
            rows.check(rows.out, wrong, dtype="float32")


def test_dense_rows_see_what_stands_before_them():
    inputs = SMALL.inputs()
    rows = sampled_rows.sample_dense(inputs.q, inputs.k, inputs.v, scale=inputs.scale)
    plain = jax.nn.dot_product_attention(*(x.transpose(1, 0, 2)[None] for x in (inputs.q, inputs.k, inputs.v)),
                                         scale=inputs.scale, is_causal=True)[0]  # fmt: skip
    terms = attention_terms(inputs.k.shape[1], inputs.q.shape[-1])
    assert_same_up_to_order(np.asarray(plain)[rows.rows, rows.heads], rows.out, terms=terms)
    assert 511 in rows.rows and {0, 3} <= set(rows.heads)


def test_without_torch_every_peer_gives_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    peers = peers_of("float32")
    assert [row["name"] for row in peers] == [*torch_attention.DENSE, torch_attention.FLEX]
    assert all(row["error"].startswith("torch is not installed") for row in peers)


def peers_of(dtype):
    case = dataclasses.replace(SMALL, dtype=dtype)
    return bench_attention(case, implementation="xla", with_dense=False, with_peers=True, repeats=1)["others"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("takes_gqa", [True, False])
def test_peers_get_our_arrays_and_lists_and_are_checked(monkeypatch, dtype, takes_gqa):
    fake_torch.install(monkeypatch, takes_gqa=takes_gqa)
    peers = peers_of(dtype)
    assert [row["name"] for row in peers] == [*torch_attention.DENSE, torch_attention.FLEX]
    assert all(row["relative_error"] < 1e-6 and row["median_ms"] > 0 and "speedup" in row for row in peers)
    assert [row.get("note") for row in peers] == [None if takes_gqa else "kv heads repeated"] * 2 + [None]
    visited = SMALL.flops(SMALL.lists.index(SMALL.num_q_heads, SMALL.num_tokens, SMALL.block))
    for row, flops in zip(peers, (2.0 * 4 * 512**2 * 64, 2.0 * 4 * 512**2 * 64, visited), strict=True):
        assert row["tflops_per_s"] == pytest.approx(flops / row["median_ms"] / 1e9, abs=6e-4)


def test_a_wrong_peer_is_a_row_with_the_reason(monkeypatch):
    fake_torch.install(monkeypatch, error=0.1)
    assert all("relative error against float64 must be at most" in row["error"] for row in peers_of("float32"))


def test_a_failing_row_keeps_its_reason_on_one_line():
    def fail():
        raise KeyError("no kernel\nfor this")

    assert measurements.measurement("peer", fail) == {"name": "peer", "error": "KeyError: 'no kernel\\nfor this'"}
    group = ExceptionGroup("no backend", [ValueError("a"), NotImplementedError("b")])
    assert measurements.reason(group) == "no backend: a; b"


def test_flex_tables_hold_the_lists_partial_and_full_apart():
    index = RandomLists(blocks_per_row=3).index(2, 1024, 128)
    (partial_count, full_count), (partial, full) = torch_attention.flex_tables(index)
    assert (partial_count == 1).all() and full_count.sum() == index.num_full.sum()
    for h, i in np.ndindex(2, 8):
        blocks = [*full[0, h, i, : full_count[0, h, i]], *partial[0, h, i, : partial_count[0, h, i]]]
        first = index.first[h, i]
        assert [128 * n for n in blocks] == index.start[h, first : first + index.count[h, i]].tolist()


def test_flex_tables_refuse_what_would_not_fit():
    index = AllVisited().index(1, 2**22, 128)
    with pytest.raises(NotImplementedError, match="at most 4294967296 bytes, got 8589934592"):
        torch_attention.flex_tables(index)


@pytest.mark.slow
def test_a_plan_has_its_parts_and_the_whole():
    figures = bench_plan("grid", SIZES, implementation="xla", repeats=1)
    assert figures["relative_error"] < 1e-5
    parts = {f"{name}_ms" for name in ("views", "plan", "permute", "attend", "undo")}
    assert all(figures[name] > 0 for name in parts)
    assert figures["overhead_fraction"] == pytest.approx(1 - figures["attend_ms"] / figures["median_ms"], abs=1e-3)


@pytest.mark.slow
def test_a_whole_that_differs_from_its_parts_is_not_timed(monkeypatch):
    monkeypatch.setattr("mmi_jax.bench.plans.attend_sparsely", lambda q, *_, **__: SimpleNamespace(out=2 * q))
    with pytest.raises(RuntimeError, match=r"the whole must equal its parts within 0.1"):
        bench_plan("a-shape", SIZES, implementation="xla", repeats=1)


@pytest.mark.slow
def test_heads_that_run_dense_are_counted_and_checked_as_dense(monkeypatch):
    dense_is_free = CostModel(
        dense_ms=0.0, dense_ns_per_tile=0.0, sparse_ms=1.0, plan_ms=1.0, sparse_ns_per_tile=1.0, move_ns=1.0,
        estimate_ns=1.0,
    )  # fmt: skip
    monkeypatch.setattr("mmi_jax.bench.plans.costs_of_device", lambda: dense_is_free)
    figures = bench_plan("a-shape", SIZES, implementation="xla", repeats=1)
    assert figures["dense_heads"] == SIZES.num_q_heads
    monkeypatch.setattr("mmi_jax.bench.plans.attend_sparsely", lambda q, *_, **__: SimpleNamespace(out=2 * q))
    with pytest.raises(RuntimeError, match="relative error against float64"):
        bench_plan("a-shape", SIZES, implementation="xla", repeats=1)


def test_dense_is_measured_up_to_the_limit_and_extrapolated_by_the_square(monkeypatch):
    measured = []

    def measure(num_tokens, *sizes, **_):
        measured.append(num_tokens)
        return (
            {"name": "slow", "median_ms": 9.0},
            {"name": "failed", "error": "why"},
            {"name": "fast", "median_ms": 3.0},
        )

    monkeypatch.setattr(dense_attention, "measure_synthetic_dense", measure)
    figures = dense_attention.best_dense(8192, 4, 2, 64, "float32", limit=2048, repeats=1, with_peers=False)
    assert (figures["dense"], figures["dense_ms"], figures["is_dense_extrapolated"]) == ("fast", 48.0, True)
    figures = dense_attention.best_dense(1024, 4, 2, 64, "float32", limit=2048, repeats=1, with_peers=False)
    assert (figures["dense_ms"], figures["is_dense_extrapolated"]) == (3.0, False)
    assert measured == [2048, 1024]


@pytest.mark.slow
def test_plans_command_prints_a_table_and_a_json_line_last(capsys, tmp_path):
    path = tmp_path / "plans.json"
    arguments = ["bench", "plans", "--case", "a-*", "--tokens", "1024", "--tokens", "1280", "--heads", "2/1"]
    assert main([*arguments, "--dense-limit", "1024", "--repeats", "1", "--json-file", str(path)]) == 0
    line = last_line(capsys)
    assert line == json.loads(path.read_text())
    assert [(case["case"], case["tokens"]) for case in line["cases"]] == [("a-shape", 1024), ("a-shape", 1280)]
    assert [case["is_dense_extrapolated"] for case in line["cases"]] == [False, True]
    assert set(line["machine"]) == {"device", "jax", "commit", "date"} and line["matmul_tflops_per_s"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["plans.json"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.setattr("mmi_jax.cli.bench.runner.matmul_tflops_per_s", lambda: pytest.fail("timed a matrix product"))
    monkeypatch.setattr("mmi_jax.cli.bench.runner._figures", lambda *_: pytest.fail("measured a case"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("nodir/x.json", "must be in a directory that exists"), (".", "must be a file, got a directory")],
)
@pytest.mark.parametrize("command", ["attention", "plans", "check"])
def test_a_json_file_that_cannot_be_written_is_refused_first(capsys, tmp_path, nothing_runs, command, name, message):
    assert main(["bench", command, "--json-file", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["attention", "plans", "check"])
def test_an_unknown_implementation_is_refused_once_and_first(capsys, nothing_runs, command):
    assert main(["bench", command, "--implementation", "foo"]) == 2
    known = "reference, xla, mosaic_gpu, mosaic_tpu"
    assert capsys.readouterr().err == f"error: --implementation must be one of {known}, got 'foo'\n"


def test_an_unknown_dtype_is_refused_once_and_first(capsys, nothing_runs):
    assert main(["bench", "plans", "--dtype", "foo"]) == 2
    assert capsys.readouterr().err == "error: --dtype must be one of float32, bfloat16, float16, got 'foo'\n"


def test_a_case_that_fails_is_a_row_and_the_others_are_measured(capsys, small_case, monkeypatch):
    monkeypatch.setitem(CASES, "bad", dataclasses.replace(SMALL, name="bad", num_q_heads=3))
    arguments = ["--case", "bad", "--case", "small", "--no-isolate", "--repeats", "1"]
    assert main(["bench", "attention", *arguments]) == 1
    bad, good = last_line(capsys)["cases"]
    assert bad == {"case": "bad", "error": "num_q_heads=3 must be a multiple of num_kv_heads=2"}
    assert good["case"] == "small" and good["median_ms"] > 0


@pytest.mark.parametrize("command", ["attention", "plans", "check"])
def test_an_unknown_case_lists_the_known_ones(capsys, command):
    assert main(["bench", command, "--case", "nosuch"]) == 2
    known = {"attention": CASES, "plans": PLAN_CASES, "check": RULE_CASES}[command]
    assert f"unknown case nosuch: known cases are {', '.join(known)}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("heads", "message"),
    [("28", "as in 28/4: got '28'"), ("4/0", "as in 28/4: got '4/0'"), ("5/2", "query heads must be a multiple")],
)
def test_plans_refuses_heads_that_are_none(capsys, heads, message):
    assert main(["bench", "plans", "--heads", heads]) == 2
    assert message in capsys.readouterr().err


def test_check_holds_every_rule_against_the_reference(capsys):
    assert main(["bench", "check", "--case", "tiny"]) == 0
    (case,) = last_line(capsys)["cases"]
    assert case["relative_error"] < 2**-7 and case["num_empty_rows"] > 128


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out, lse: (out + 0.5, lse), "rows that visit nothing must be exact zeros"),
        (lambda out, lse: (out, lse.at[0, 0].set(-1e9)), "must have a log-sum-exp of -inf"),
        (lambda out, lse: (out * 1.1, lse), "relative error must be at most"),
        (lambda out, lse: (out, lse + 1), "log-sum-exp must be within"),
    ],
)
def test_check_names_the_rule_that_is_broken(monkeypatch, spoil, message):
    monkeypatch.setattr(
        "mmi_jax.bench.checks.kernel_rules.attend_inputs", lambda inputs, _: spoil(*reference.attend(inputs))
    )
    with pytest.raises(RuntimeError, match=message):
        check_rules("tiny", implementation="xla")


def test_the_commit_comes_from_git_or_else_from_the_environment(monkeypatch):
    def no_git(*_, **__):
        raise FileNotFoundError("git")

    assert machine.machine()["commit"] != "unknown"
    monkeypatch.setattr(subprocess, "run", no_git)
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "abc123")
    assert machine.machine()["commit"] == "abc123"
    monkeypatch.delenv(machine.COMMIT_VARIABLE)
    assert machine.machine()["commit"] == "unknown"


def test_bench_imports_neither_models_nor_what_they_need():
    heavy = ("flax", "av", "matplotlib", "models", "tokenizers", "torch")
    code = f"import sys, mmi_jax.cli; sys.exit(str([name for name in {heavy} if name in sys.modules] or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_the_video_prompt_is_text_whole_frames_and_text():
    layout = video_prompt(2048, rows=8, columns=16)
    modality = np.asarray(layout.modality)
    assert layout.num_tokens == 2048
    assert (modality == VISION).sum() == 12 * 128
    assert modality[0] == TEXT and modality[-448:].tolist() == [TEXT] * 448
    with pytest.raises(ValueError, match="hold one frame of 256, got num_tokens=600"):
        video_prompt(600)


def test_synthetic_lines_hold_the_attention_they_were_given():
    layout = video_prompt(2048)
    q, k, _ = synthetic_qkv(layout, (GRID,), num_kv_heads=1, head_dim=64, dtype="float32")
    scores = np.asarray(q[-1, 0] @ k[:, 0].T) * 64**-0.5
    weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    on_line = (np.asarray(layout.row) * 16 + np.asarray(layout.column) == GRID.phase) & (np.asarray(layout.frame) >= 0)
    assert weights[on_line].sum() / on_line.sum() > 20 * weights[np.asarray(layout.frame) >= 0].mean()


def test_synthetic_inputs_need_room_for_their_features():
    with pytest.raises(ValueError, match="head_dim must be at least 50"):
        synthetic_qkv(video_prompt(1024), (GRID,), num_kv_heads=1, head_dim=32)


def test_a_third_of_the_heads_each():
    patterns, structures = PLAN_CASES["mix"].per_head(28)
    assert [type(p) for p in patterns].count(Grid) == 19 and len(structures) == 28
    assert dataclasses.is_dataclass(patterns[0])


def test_a_measurement_queues_as_many_calls_as_fill_it(monkeypatch):
    log = []
    clock = iter([0.0, 0.010, 1.0, 1.050, 2.0, 2.045])
    monkeypatch.setattr(wall_time.time, "perf_counter", lambda: next(clock))
    times = wall_time.time_calls(lambda: log.append("call"), lambda _: log.append("wait"), repeats=2, fill_ms=50.0)
    assert log == ["call", "wait"] * 2 + (["call"] * 5 + ["wait"]) * 2
    assert times == pytest.approx([10.0, 9.0])
    timing = wall_time.summary([3.0, 1.0, 2.0], compile_ms=7.0)
    assert timing.figures() == {"median_ms": 2.0, "fastest_ms": 1.0, "slowest_ms": 3.0, "compile_ms": 7.0}
