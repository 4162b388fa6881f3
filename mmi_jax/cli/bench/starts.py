"""Cold and warm starts of a prefill, each in a process of its own, for `mmi bench prefill --start`."""

import json
import subprocess
import sys
import tempfile
from typing import Any

TIMEOUT_SECONDS = 300


def start_seconds(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds to trace, lower and compile the programs with nothing kept (cold), and from what that kept (warm).

    Args:
      task: arguments of `ready`, but the directory.

    Raises:
      RuntimeError: a process failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        cold, warm = (_run(task | {"directory": directory}) for _ in range(2))
    return {"cold_start": cold, "warm_start": warm}


def _run(task: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, "-m", "mmi_jax.cli.bench.start_child", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
