"""Fifty random prompts in one process: memory does not grow, and nothing is compiled beyond the buckets."""

import json

import numpy as np
import pytest

from mmi_jax import AShape, Buckets, Grid, PatternTable, prefill
from mmi_jax.bench.soak import growth, memory_in_use, soak
from mmi_jax.cli import main
from mmi_jax.cli.bench.commands.soak import figures
from mmi_jax.cli.bench.commands.soak import random_prompt as bench_prompt
from mmi_jax.cli.bench.synthetic_prompts import RepeatedPatches
from models.prompt import LazyPatches
from models.qwen2_5_vl import presets
from models.qwen2_5_vl.presets import PRESETS
from models.testing import BLOCKS, TINY_PRESET, prompt, tiny_model

BUCKETS = Buckets(smallest=64, largest=256, multiple=64)
MAX_GROWTH = 48 * 2**20
"""Bytes of the host that fifty prompts may add after the first third: the allocator's noise."""


def random_prompt(rng: np.random.Generator, number: int):
    """Text alone, an image, a video, or several of both; frames of two sizes."""
    pieces: list = [int(rng.integers(1, 60))]
    for _ in range(rng.integers(0, 4)):
        size = [(2, 4), (3, 2)][rng.integers(2)]
        pieces += [(int(rng.integers(1, 6)), *size), int(rng.integers(1, 20))]
    return prompt(number, *pieces)


def few(number: int):
    rng = np.random.default_rng(number)
    return [p for p in (random_prompt(rng, n) for n in range(60)) if p.tokens.shape[1] <= BUCKETS.largest][:50]


@pytest.mark.slow
def test_fifty_random_prompts_leave_nothing_behind(rng):
    prompts = few(0)
    table = Grid(local=8, sink=0, tail=4, last_q=8)

    def run(prompt):
        return prefill(tiny_model(), prompt, table=table, buckets=BUCKETS, blocks=BLOCKS)

    before = memory_in_use()
    rows = soak(run, prompts)
    assert len(prompts) == 50
    used = {BUCKETS.length_for(p.tokens.shape[1]) for p in prompts}
    assert rows[-1]["programs"] - before["programs"] == len(used), "one program for each bucket that came up"
    assert growth(rows, "array_bytes") == 0
    assert growth(rows, "host_bytes") < MAX_GROWTH
    again = soak(run, [prompts[n] for n in rng.permutation(50)])
    assert again[-1]["compilations"] == 0, "frame sizes, batches of frames and buckets are all that is compiled for"
    assert again[-1]["programs"] == rows[-1]["programs"] and growth(again, "host_bytes") < MAX_GROWTH


def test_growth_is_that_of_the_last_third_over_the_middle():
    rows = [
        dict(host_bytes=b, device_bytes=7, array_bytes=1, compilations=n, programs=2, seconds=0.5)
        for n, b in enumerate([9, 1, 2, 3, 2, 2, 5, 6, 5])
    ]
    assert growth(rows, "host_bytes") == 3 and growth(rows, "device_bytes") == 0
    summary = figures(rows, [600, 1000, 1024])
    assert (summary["host_bytes_growth"], summary["compilations_growth"], summary["programs"]) == (3, 3, 2)
    assert (
        summary["buckets"] == 2 and summary["log"] == rows and (summary["compilations"], summary["seconds"]) == (8, 4.5)
    )


def test_the_benchmark_s_prompts_are_of_every_kind_and_of_the_asked_length():
    prompts = [bench_prompt(PRESETS["7b"], 3000, seed) for seed in range(12)]
    kinds = {(bool(p.grids), len(p.grids) > 1, any(g[0] == 1 for g in p.grids)) for p in prompts}
    assert {(False, False, False), (True, True, True)} <= kinds
    for p in prompts:
        assert p.tokens.shape == (1, 3000) and p.patches.shape[0] == sum(np.prod(grid) for grid in p.grids)
        assert (p.layout.modality == 1).sum() * 4 == p.patches.shape[0]


def test_patches_that_repeat_are_the_same_on_device_and_host(rng):
    patches = RepeatedPatches(rng.normal(size=(5, 3)).astype(np.float32), 24)
    assert isinstance(patches, LazyPatches) and patches.shape == (24, 3)
    rows = patches.rows(np.array([4, 12, 12]), 4)
    np.testing.assert_array_equal(rows, np.asarray(patches)[[4, 5, 6, 7, *[12, 13, 14, 15] * 2]])


@pytest.mark.slow
def test_nothing_is_compiled_once_a_soak_has_begun(monkeypatch, tmp_path, capsys):
    """Text, images and videos of two sizes, in seven buckets."""
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY_PRESET)
    PatternTable(layers=((AShape(128, 256),) * 6,)).save(table := tmp_path / "table.json")
    arguments = ["--preset", "tiny", "--layers", "1", "--prompts", "9", "--min-tokens", "512", "--max-tokens", "2048"]
    assert main(["bench", "soak", *arguments, "--table", str(table), "--debug"]) == 0
    printed = capsys.readouterr()
    case = json.loads(printed.out.strip().splitlines()[-1])["cases"][0]
    assert case["compilations"] == 0 and {row["compilations"] for row in case["log"]} == {0}
    assert (case["prompts"], case["runs"], len(case["log"])) == (9, 18, 18), "each comes twice"
    assert case["buckets"] == 7 and {row["programs"] for row in case["log"]} == {case["programs"]}
    assert case["warmup"]["programs"] > 0 and case["warmup"]["embeddings"] > 0
    assert "warm-up: 7 buckets" in printed.err and "prompt 8, 1,087 tokens" in printed.err
