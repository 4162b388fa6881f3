"""scripts/train_small.py: killed in the middle it goes on as if nothing had been; it stops if nothing is learnt."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def start(tmp_path):
    """Starts the script's toy run in a directory; programs are compiled once and kept for the next run."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | cache | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    fixed = ["--tiny", "--num-workers", "0", "--save-seconds", "0"]

    def started(name: str, *options: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "scripts/train_small.py"), str(tmp_path / name), *fixed, *options]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return started


def measured(directory: Path) -> dict[int, tuple]:
    """Step, and all that was measured in it but the time."""
    path = directory / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line.pop("step"): tuple(value for name, value in line.items() if name != "seconds") for line in lines}


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_curve(start, tmp_path):
    whole = start("whole")
    said, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    killed = start("killed")
    while len(measured(tmp_path / "killed")) < 3:
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    before = measured(tmp_path / "killed")
    assert 5 in before and max(before) < 9, "not killed within the first length"
    stopped = start("killed", "--stop-below", "0.6")
    said, _ = stopped.communicate(timeout=300)
    assert stopped.returncode == 1 and "of digits right after 128 tokens, less than --stop-below 60%" in said, said
    assert "10 of 16 steps done" in said
    assert list((tmp_path / "killed" / "model").glob("*.safetensors"))
    last = start("killed")
    said, _ = last.communicate(timeout=300)
    assert last.returncode == 0 and "16 of 16 steps done" in said, said
    assert measured(tmp_path / "killed") == measured(tmp_path / "whole")
    assert sorted(measured(tmp_path / "whole")) == list(range(1, 16, 2))
    weights = [
        (tmp_path / name / "model/model-00001-of-00001.safetensors").read_bytes() for name in ("whole", "killed")
    ]
    assert weights[0] == weights[1]
