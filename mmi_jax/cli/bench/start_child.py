"""A process that makes one prefill's programs ready and says how long that took, for `mmi bench prefill --start`."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
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


def ready(*, preset: str, layers: int | None, table: str, dtype: str, tokens: int, directory: str) -> dict[str, float]:
    """Seconds until all programs for so many tokens are compiled or read back, those of all its threads together, and
    the number of different layers.
    """
    import jax

    from mmi_jax.bench.prefill import prefill_program
    from mmi_jax.cli import compile_cache
    from mmi_jax.cli.bench.prefill import config_of, table_of
    from mmi_jax.engine.programs.compilation import compiled_chunk
    from models import family_of

    config = config_of(preset, layers)
    family = family_of(config)
    model = family.without_vision(family.abstract_model(config, dtype=jax.numpy.dtype(dtype)))
    with compile_cache.kept_programs(Path(directory)):
        jax.block_until_ready(jax.numpy.zeros(1))  # the device is open
        start, cpu_start = time.perf_counter(), time.process_time()
        program, shapes = prefill_program(model, table_of(table, config), tokens)
        chunk = compiled_chunk(program, *shapes)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 1), "programs": len(chunk.layers)}


if __name__ == "__main__":
    print(json.dumps(ready(**json.loads(sys.argv[1]))))
