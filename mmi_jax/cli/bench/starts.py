"""Cold and warm starts of a prefill, each in its own process, for `mmi bench prefill --start`."""

import json
import subprocess
import sys
import tempfile
from typing import Any

TIMEOUT_SECONDS = 300


def start_seconds(options: dict[str, Any]) -> dict[str, Any]:
    """Seconds to trace, lower and compile the programs from an empty cache (cold), then from the filled one (warm).

    Args:
      options: arguments of `warm_up`, but the directory.

    Raises:
      RuntimeError: a process failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        cold, warm = (_run(options | {"directory": directory}) for _ in range(2))
    return {"cold_start": cold, "warm_start": warm}


def _run(options: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, "-m", "mmi_jax.cli.bench.start_child", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
