"""`mmi bench first-token` on a tiny preset: the parts are the whole, compared with dense."""

import json

import pytest

from mmi_jax.cli import main
from mmi_jax.cli.bench.commands.first_token import with_dense_prefill
from models.qwen2_5_vl import presets
from models.testing import TINY_PRESET


@pytest.fixture
def tiny_preset(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY_PRESET)


@pytest.mark.slow
def test_the_parts_of_a_length_are_its_whole_time(tiny_preset, capsys):
    arguments = ["--preset", "tiny", "--layers", "1", "--table", "dense", "--tokens", "1536", "--host-limit", "2048"]
    assert main(["bench", "first-token", *arguments, "--debug"]) == 0
    out = capsys.readouterr().out
    case = json.loads(out.strip().splitlines()[-1])["cases"][0]
    parts, (by_host,) = case["parts"], case["others"]
    assert (case["tokens"], case["pictures"], case["layers"]) == (1536, 6, 1) and case["file_bytes"] > 1000
    whole = sum(parts[name] for name in ("prompt", "vision", "prefill", "rest"))
    assert whole == pytest.approx(case["seconds"], abs=1e-3)
    assert 0 <= parts["waited"] < parts["prompt"] + parts["vision"] and case["decoding_alone"] > 0 < case["tower_alone"]
    assert case["warmup"]["seconds"] > 0 and case["warmup"]["buckets"] == [1536]
    assert by_host["parts"]["waited"] == 0 < by_host["seconds"] and "patches made by the host" in out


def test_the_dense_time_is_ours_with_another_prefill():
    ours = {"seconds": 5.0, "parts": {"prefill": 2.0}}
    dense = with_dense_prefill(ours, {"dense_seconds": 7.0, "is_dense_extrapolated": True})
    assert (dense["dense_first_token"], dense["speedup"], dense["is_dense_extrapolated"]) == (10.0, 2.0, True)
    assert with_dense_prefill(ours, {"dense_error": "no memory"}) == {"dense_error": "no memory"}
