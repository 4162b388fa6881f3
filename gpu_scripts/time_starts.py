"""Cold and warm starts of tables, each in a process of its own, and prefills from the programs that they compiled.

    python3 gpu_scripts/time_starts.py --preset 7b --tokens 4096 32768 --dtype bfloat16 mix TABLE.json

A start compiles the programs of the longest length; prefills of it then read them back. One line of JSON for each
measurement; a failure is reported and the rest goes on.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 300


def main() -> None:
    """All starts, then all prefills, the longest first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--preset", default="7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        prefill_times(options, Path(options.one))
        return
    with tempfile.TemporaryDirectory() as directory:
        for table in options.tables:
            for start in ("cold", "warm"):
                report(f"{start} start, {table}", lambda table=table: started(options, table, directory))
        for tokens in sorted(options.tokens, reverse=True):
            for table in options.tables:
                command = [sys.executable, __file__, table, "--preset", options.preset, "--dtype", options.dtype]
                command += ["--tokens", str(tokens), "--repeats", str(options.repeats), "--one", directory]
                command += [] if options.layers is None else ["--layers", str(options.layers)]
                report(f"{tokens} tokens, {table}", lambda command=command: child(command))


def started(options: argparse.Namespace, table: str, directory: str) -> dict[str, Any]:
    """Seconds until the programs of the longest length are compiled."""
    child_options = dict(preset=options.preset, layers=options.layers, table=table, dtype=options.dtype)
    child_options |= dict(tokens=max(options.tokens), directory=directory)
    return child([sys.executable, "-m", "mmi_jax.cli.bench.start_child", json.dumps(child_options)])


def child(command: list[str]) -> dict[str, Any]:
    """The last line that the command prints."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {done.stderr[-1500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"process_seconds": round(time.perf_counter() - start, 1)}


def report(name: str, measure: Callable[[], dict[str, Any]]) -> None:
    """One line: the figures, or why there are none."""
    try:
        figures = measure()
    except Exception as error:  # one that fails must not cost the others
        figures = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"what": name} | figures), flush=True)


def prefill_times(options: argparse.Namespace, directory: Path) -> None:
    """Compile seconds, median and fastest seconds of one table's prefills at one length."""
    from mmi_jax.bench.prefill import bench_prefill
    from mmi_jax.cli import compile_cache
    from mmi_jax.cli.bench.presets import config_of, random_weights, table_of
    from mmi_jax.cli.bench.synthetic_prompts import video_prompt
    from mmi_jax.cli.gpu_memory import NEARLY_ALL, take_memory

    take_memory(NEARLY_ALL)
    config, (tokens,), (table,) = config_of(options.preset, options.layers), options.tokens, options.tables
    with compile_cache.compilation_cache_in(directory):
        model, prompt = random_weights(config, options.dtype), video_prompt(config, tokens)
        figures = bench_prefill(model, prompt, table_of(table, config), repeats=options.repeats)
    names = ("compile_seconds", "seconds", "fastest_seconds", "slowest_seconds", "density", "planned_bytes")
    print(json.dumps({name: figures[name] for name in names} | {"peak_bytes": figures.get("peak_bytes")}))


if __name__ == "__main__":
    main()
