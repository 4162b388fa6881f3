"""`mmi bench first-token` on a tiny preset: the parts are the whole, and dense stands beside it."""

import json

import pytest
from tiny_preset import TINY

from mmi_jax.cli import main
from models.qwen2_5_vl import presets


@pytest.fixture
def tiny_preset(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)


def test_the_parts_of_a_length_are_its_whole_time(tiny_preset, capsys):
    arguments = ["--preset", "tiny", "--layers", "1", "--tokens", "1536", "--host-limit", "2048", "--debug"]
    assert main(["bench", "first-token", *arguments]) == 0
    out = capsys.readouterr().out
    case = json.loads(out.strip().splitlines()[-1])["cases"][0]
    parts = case["parts"]
    assert (case["tokens"], case["pictures"], case["layers"]) == (1536, 6, 1) and case["file_bytes"] > 1000
    assert sum(parts[name] for name in ("prompt", "vision", "prefill", "rest")) == pytest.approx(case["seconds"], rel=0.01)
    assert 0 <= parts["waited"] < parts["prompt"] + parts["vision"] and case["decoding_alone"] > 0 < case["tower_alone"]
    whole = case["seconds"] - parts["prefill"] + case["dense_seconds"]
    assert case["dense_first_token"] == pytest.approx(whole, abs=1e-3)
    (by_host,) = case["others"]
    assert by_host["parts"]["waited"] == 0 < by_host["seconds"] and "patches made by the host" in out
