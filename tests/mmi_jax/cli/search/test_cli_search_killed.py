"""`mmi search`, killed at any moment, resumes to the same table."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from models.testing.random_checkpoint import write_random_checkpoint

ROOT = Path(__file__).parents[4]
TOKENS = "700"  # 64 of them for every two frames
TELL_THE_DAY = ("date", "seconds of this run")


@pytest.fixture
def start(tmp_path):
    """Starts the search of a small model, with a table and a work file of this name."""
    write_random_checkpoint(tmp_path / "model")
    candidates = [{"pattern": "AShape", "sink": 128, "local": local} for local in (64, 128)]
    (tmp_path / "candidates.json").write_text(json.dumps(candidates))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "cache")
    options = ["--model", str(tmp_path / "model"), "--candidates", str(tmp_path / "candidates.json")]
    options += ["--task", "v-niah", "--tokens", TOKENS, "--held-out-samples", "1", "--dtype", "float32"]
    options += ["--cost-model", "tiles", "--target-density", "0.9"]

    def started(name: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "mmi_jax.cli", "search", *options, "--output", str(tmp_path / f"{name}.json")]
        return subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return started


def finished(process: subprocess.Popen) -> None:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


def table(path: Path) -> dict:
    """The file but for what tells the day."""
    value = json.loads(path.read_text())
    assert set(TELL_THE_DAY) <= set(value["provenance"])
    value["provenance"] = {name: text for name, text in value["provenance"].items() if name not in TELL_THE_DAY}
    return value


@pytest.mark.slow
def test_a_killed_search_finds_the_same_table(start, tmp_path, rng):
    finished(start("whole"))
    whole = (tmp_path / "whole.work.jsonl").read_bytes()
    num_pieces = whole.count(b"\n")
    assert num_pieces > 4
    work = tmp_path / "killed.work.jsonl"
    for num_done in np.sort(rng.choice(np.arange(1, num_pieces - 1), 2, replace=False)):
        killed = start("killed")
        while not work.exists() or work.read_bytes().count(b"\n") <= num_done:
            assert killed.poll() is None, killed.communicate()[0]
            time.sleep(0.002)
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=60)
        assert killed.returncode == -signal.SIGKILL
        assert not (tmp_path / "killed.json").exists()
    finished(start("killed"))
    assert table(tmp_path / "killed.json") == table(tmp_path / "whole.json")
    assert work.read_bytes() == whole
