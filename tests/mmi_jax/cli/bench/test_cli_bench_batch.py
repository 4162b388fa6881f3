"""`mmi bench batch`: three ways to the same logits, timed."""

import json
import time

import numpy as np
import pytest

from mmi_jax import AShape, PatternTable
from mmi_jax.cli import main
from mmi_jax.cli.bench.commands.batch import compare_ways, requests_of
from mmi_jax.engine.settings.options import PrefillOptions
from models.qwen2_5_vl import presets
from models.testing import TINY_PRESET


@pytest.mark.slow
def test_the_three_ways_give_the_same_logits(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY_PRESET)
    PatternTable(layers=((AShape(128, 256),) * 6,)).save(table := tmp_path / "table.json")
    arguments = ["--preset", "tiny", "--layers", "1", "--table", str(table), "--repeats", "1", "--debug"]
    arguments += [text for n in (1024, 1800, 1024) for text in ("--tokens", str(n))]
    assert main(["bench", "batch", *arguments]) == 0
    out = capsys.readouterr().out
    case = json.loads(out.strip().splitlines()[-1])["cases"][0]
    assert case["batches"] == [1, 2] and case["tokens"] == 3848
    assert all(other["logits_difference"] < 1e-5 for other in case["others"]) and "one padded batch" in out


def test_all_that_the_ways_run_is_compiled_before():
    requests = requests_of(
        TINY_PRESET, [1024, 1800, 1000], PrefillOptions(table=AShape(128, 256), measures_recall=False)
    )
    assert {(request.lengths.padded_tokens, request.batch) for request in requests} == {
        (1024, 1),
        (1024, 2),
        (1920, 1),
        (1920, 3),
    }
    assert len(requests) == 4 and not any(request.options.measures_recall for request in requests)


def test_figures_of_the_ways_are_compared_with_ours():
    ways = []

    def run(way):
        ways.append(way)
        time.sleep(1e-3)
        return np.full((3, 2), 2.0 if way == "many" else 1.0)

    figures = compare_ways(run, [1024, 1800, 1000], 2)
    assert ways == [way for way in ("many", "padded", "alone") for _ in range(3)]
    assert (figures["tokens"], figures["padded_tokens"], figures["batches"]) == (3824, 2 * 1024 + 1920, [1, 2])
    padded, alone = figures["others"]
    assert padded["padded_tokens"] == 3 * 1920 and alone["padded_tokens"] == figures["padded_tokens"]
    assert padded["logits_difference"] == pytest.approx(1.0) and padded["speedup"] > 0
    failing = compare_ways(lambda way: run(way) * (np.nan if way == "padded" else 1.0), [1024], 1)
    assert "logits must be finite" in failing["others"][0]["error"] and "error" not in failing["others"][1]
