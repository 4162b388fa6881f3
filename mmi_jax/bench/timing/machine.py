"""The machine that a figure was measured on."""

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import jax

COMMIT_VARIABLE = "MMI_COMMIT"
"""Environment variable that names the commit where the code runs outside a git checkout."""


def machine() -> dict[str, Any]:
    """Device, version of JAX, commit and date."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _cpu_name(),
        "jax": jax.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return f"{' '.join(sorted(names)) or platform.processor()}, {os.cpu_count()} cores"


def _commit() -> str:
    """The commit of the checkout this package runs from; else what `MMI_COMMIT` says; else "unknown"."""
    root = Path(__file__).parents[3]
    if (root / ".git").exists():  # a wheel may lie inside somebody else's checkout
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no git here, or it refuses the directory
            pass
    return os.environ.get(COMMIT_VARIABLE) or "unknown"
