"""scripts/make_accuracy.py from a model to the page; and from the results alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mmi_jax import AShape, Dense, PatternTable
from models.testing.random_checkpoint import write_random_checkpoint

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import make_accuracy  # noqa: E402  # pyright: ignore[reportMissingImports]


def test_recall_is_measured_again_for_another_length_or_table_and_else_kept(tmp_path, monkeypatch):
    lengths = []

    def prefill(model, prompt, *, table, may_run_dense):
        lengths.append(prompt.tokens.shape[1])
        figures = np.full((1, 1), float(len(lengths)))
        return SimpleNamespace(report=SimpleNamespace(density=figures, recall=figures))

    monkeypatch.setattr(make_accuracy, "prefill", prefill)
    for num_tokens, pattern, measured in ((8, Dense(), 1), (8, Dense(), 1), (16, Dense(), 2), (16, AShape(), 3)):
        prompt = SimpleNamespace(tokens=np.zeros((1, num_tokens), np.int32))
        recall = make_accuracy.measure_recall(tmp_path, None, prompt, PatternTable(layers=((pattern,),)))
        assert recall["recall"] == [[measured]] and recall["tokens"] == num_tokens == lengths[-1]
    assert lengths == [8, 16, 16]


@pytest.mark.slow
def test_the_whole_script_writes_the_page_and_again_from_results_alone(tmp_path):
    write_random_checkpoint(tmp_path / "model")
    candidates = tmp_path / "candidates.json"
    candidates.write_text(json.dumps([{"pattern": "AShape", "sink": 128, "local": 64}]))
    options = [
        "--model",
        tmp_path / "model",
        "--work",
        tmp_path / "work",
        "--output",
        tmp_path / "docs" / "accuracy.md",
    ]
    options += ["--task", "v-niah", "--tokens", 900, "--target-density", 0.95, "--depths", 1, "--samples-per-cell", 1]
    options += ["--candidates", candidates, "--dtype", "float32", "--picture-tokens", 900, "--costs", "tiles"]
    command = [sys.executable, ROOT / "scripts" / "make_accuracy.py", *map(str, options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    page = (tmp_path / "docs" / "accuracy.md").read_text()
    assert "| MInference (VerticalSlash only) |" in page and "### QBoundary: layer" in page
    pictures = tmp_path / "docs" / "accuracy"
    named = {line.partition("](accuracy/")[2].rstrip(")") for line in page.splitlines() if line.startswith("![")}
    assert named == {path.name for path in pictures.glob("*.png")} and len(named) >= 6
    subprocess.run([*command, "--page-only"], check=True, env=environment, cwd=tmp_path)
    assert (tmp_path / "docs" / "accuracy.md").read_text() == page
