"""`mmi bench`: figures of small cases, and what it refuses."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mmi_jax import bench
from mmi_jax.bench_plans import PLAN_CASES
from mmi_jax.cli import main
from mmi_jax.layout import TEXT, VISION
from mmi_jax.patterns import Grid
from mmi_jax.planted import GRID, planted_qkv, video_prompt
from pallas_kernels.attention.cases import CASES, AttentionCase, RandomShare

SMALL = AttentionCase(
    name="small", num_tokens=512, lists=RandomShare(share=0.3), num_q_heads=4, num_kv_heads=2, head_dim=64,
    dtype="float32",
)  # fmt: skip


def test_a_case_has_its_figures_and_the_baseline_beside_them():
    figures = bench.bench_attention(SMALL, implementation="xla", with_baseline=True, repeats=2)
    tiles = 4 * sum(max(1, int(0.3 * n)) for n in range(1, 5))
    assert figures["flops"] == 4.0 * tiles * 128 * 128 * 64
    assert figures["relative_error"] < 1e-6
    assert figures["fastest_ms"] <= figures["median_ms"] <= figures["slowest_ms"]
    assert figures["speedup"] == pytest.approx(figures["baseline_median_ms"] / figures["median_ms"], rel=0.02)


def test_a_wrong_output_is_not_timed():
    inputs = SMALL.inputs()
    with pytest.raises(RuntimeError, match="relative error against float64 must be at most 1e-05"):
        bench.relative_error(inputs, np.asarray(inputs.q))


def test_rows_in_float64_follow_the_lists():
    inputs = SMALL.inputs()
    out = bench.block_sparse_attention(
        inputs.q, inputs.k, inputs.v, inputs.index, q_pos=inputs.q_pos, kv_pos=inputs.kv_pos, implementation="reference"
    )[0]
    rows = np.array([0, 127, 128, 511])
    np.testing.assert_allclose(bench.rows_in_float64(inputs, 3, rows), np.asarray(out[3])[rows], rtol=2e-5, atol=2e-6)


def test_plans_command_prints_a_table_and_a_json_line_last(capsys, tmp_path):
    path = tmp_path / "plans.json"
    arguments = ["bench", "plans", "--case", "a-shape", "--tokens", "1024", "--heads", "2", "--kv-heads", "1"]
    assert main([*arguments, "--repeats", "1", "--json-file", str(path)]) == 0
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert line == json.loads(path.read_text())
    assert line["cases"][0]["case"] == "a-shape"
    assert set(line["machine"]) == {"device", "jax", "commit", "date"}
    assert [p.name for p in tmp_path.iterdir()] == ["plans.json"]


@pytest.mark.parametrize("command", ["attention", "plans"])
def test_an_unknown_case_lists_the_known_ones(capsys, command):
    assert main(["bench", command, "--case", "nosuch"]) == 2
    known = CASES if command == "attention" else PLAN_CASES
    assert f"unknown case nosuch: known cases are {', '.join(known)}" in capsys.readouterr().err


def test_the_video_prompt_is_text_whole_frames_and_text():
    layout = video_prompt(2048, rows=8, columns=16)
    modality = np.asarray(layout.modality)
    assert layout.num_tokens == 2048
    assert (modality == VISION).sum() == 12 * 128
    assert modality[0] == TEXT and modality[-448:].tolist() == [TEXT] * 448
    with pytest.raises(ValueError, match="room for one frame of 256, got num_tokens=600"):
        video_prompt(600)


def test_planted_lines_hold_the_attention_they_were_given():
    layout = video_prompt(2048)
    q, k, _ = planted_qkv(layout, (GRID,), num_kv_heads=1, head_dim=64, dtype="float32")
    scores = np.asarray(q[-1, 0] @ k[:, 0].T) * 64**-0.5
    weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    on_line = (np.asarray(layout.row) * 16 + np.asarray(layout.column) == GRID.phase) & (np.asarray(layout.frame) >= 0)
    assert weights[on_line].sum() / on_line.sum() > 20 * weights[np.asarray(layout.frame) >= 0].mean()


def test_planted_inputs_need_room_for_their_features():
    with pytest.raises(ValueError, match="head_dim must be at least 50"):
        planted_qkv(video_prompt(1024), (GRID,), num_kv_heads=1, head_dim=32)


def test_a_third_of_the_heads_each():
    patterns, structures = PLAN_CASES["mix"].per_head(28)
    assert [type(p) for p in patterns].count(Grid) == 19 and len(structures) == 28
    assert dataclasses.is_dataclass(patterns[0])


def test_timings_are_ordered():
    _, timing = bench.time_function(lambda x: x + 1, jax.numpy.ones(8), repeats=3)
    assert 0 < timing.fastest_ms <= timing.median_ms <= timing.slowest_ms
