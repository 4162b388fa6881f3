"""`mmi bench batch`: prompts of different lengths through `prefill_many`, in one padded batch, and one by one."""

import functools
import gc
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich.table import Table

from mmi_jax.bench.timing.measurements import measurement
from mmi_jax.cli.bench.options import (
    BenchDTypeOption,
    JsonFileOption,
    LayersOption,
    PresetOption,
    RepeatsOption,
    StopOption,
    TableOption,
    bench_dtype,
)
from mmi_jax.cli.bench.presets import config_of, random_weights, table_of
from mmi_jax.cli.bench.runner import Case, run_cases
from mmi_jax.cli.bench.synthetic_prompts import video_prompt
from mmi_jax.cli.bench.tables import figures_table, measured_cases
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import NEARLY_ALL, take_memory
from mmi_jax.cli.protocols import ModelConfig
from mmi_jax.engine.batching import BATCH_TOKENS, batches, prefill_many
from mmi_jax.engine.prefill import prefill
from mmi_jax.engine.protocols import VisionLanguageModel
from mmi_jax.engine.settings.buckets import Buckets
from mmi_jax.engine.settings.options import PrefillOptions
from mmi_jax.engine.settings.request import PrefillRequest, request_for
from mmi_jax.engine.warmup import prepare_requests

ON_GPU = (2000, 2010, 2030, 2048, 8000, 8192, 32000, 32768)
ELSEWHERE = (1024, 1024, 1024, 2048)
"""Tokens of the prompts unless they are given."""


def batch(
    preset: PresetOption = "7b",
    layers: LayersOption = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1024, max=Buckets.largest, help="Tokens of a prompt; repeatable. Default: 2K to 32K on a GPU."
        ),
    ] = None,
    table: TableOption = "mix",
    dtype: BenchDTypeOption = None,
    repeats: RepeatsOption = 3,
    json_file: JsonFileOption = None,
    debug: StopOption = False,
) -> None:
    """Time batches of prompts of mixed lengths. From their embeddings to their logits, in three ways.

    Every way runs once before it is timed, so that its programs are compiled.
    """
    with one_line_errors(shows_traceback=debug):
        take_memory(NEARLY_ALL)
        on_gpu = jax.default_backend() == "gpu"
        config = config_of(preset, layers)
        chosen = table_of(table, config)
        dtype = bench_dtype(dtype)
        lengths = list(tokens or (ON_GPU if on_gpu else ELSEWHERE))

        def measure(_: None) -> dict[str, Any]:
            model = random_weights(config, dtype)
            prompts = [video_prompt(config, n) for n in lengths]
            options = PrefillOptions(table=chosen, measures_recall=False)
            prepare_requests(model, requests_of(config, lengths, options))
            return compare_ways(functools.partial(logits_of, model, prompts, options), lengths, repeats) | {
                "case": f"{preset}, {chosen.model}",
                "layers": config.num_layers,
            }

        view = batch_table
        run_cases([Case(preset, None)], measure, view, json_file, stops_at_error=debug, times_matmul=False)


def requests_of(config: ModelConfig, lengths: Sequence[int], options: PrefillOptions) -> list[PrefillRequest]:
    """What the three ways prefill: their programs are compiled side by side."""
    together = [(lengths[members[0]], len(members)) for members in batches(lengths, BATCH_TOKENS, Buckets())]
    sizes = [*together, (max(lengths), len(lengths)), *((length, 1) for length in lengths)]
    padded = {(Buckets().length_for(length), batch) for length, batch in sizes}
    return [request_for(config, length, options, batch=batch) for length, batch in sorted(padded)]


def logits_of(model: VisionLanguageModel, prompts: Sequence[Any], options: PrefillOptions, way: str) -> np.ndarray:
    """Logits of every prompt, by one of the three ways."""
    match way:
        case "many":
            return np.concatenate([result.logits for result in prefill_many(model, prompts, options=options)])
        case "padded":
            return np.asarray(prefill(model, type(prompts[0]).batch(prompts), options=options).logits)
        case "alone":
            return np.concatenate([np.asarray(prefill(model, prompt, options=options).logits) for prompt in prompts])
    raise ValueError(f"expected many, padded or alone, got {way}")


def compare_ways(run: Callable[[str], np.ndarray], lengths: Sequence[int], repeats: int) -> dict[str, Any]:
    """Seconds of the three ways, ours first, and how far its logits are from those of the others.

    Args:
      run: logits by a way.
      lengths: of the prompts; tokens.
    """
    buckets = Buckets()
    padded = [buckets.length_for(n) for n in lengths]
    groups = list(batches(lengths, BATCH_TOKENS, buckets))
    logits, ours = _timed(run, "many", repeats)
    others = {"one padded batch": ("padded", len(lengths) * max(padded)), "one by one": ("alone", sum(padded))}

    def compared(way: str, padded_tokens: int) -> dict[str, Any]:
        theirs, seconds = _timed(run, way, repeats)
        difference = float(np.linalg.norm(logits - theirs) / np.linalg.norm(theirs))
        figures = {"padded_tokens": padded_tokens, "logits_difference": difference}
        return figures | seconds | {"speedup": round(seconds["seconds"] / ours["seconds"], 3)}

    return {
        "lengths": list(lengths),
        "tokens": sum(lengths),
        "padded_tokens": sum(len(group) * padded[group[0]] for group in groups),
        "batches": [len(group) for group in groups],
        **ours,
        "others": [measurement(name, functools.partial(compared, *way)) for name, way in others.items()],
    }


def _timed(run: Callable[[str], np.ndarray], way: str, repeats: int) -> tuple[np.ndarray, dict[str, float]]:
    """Logits, and seconds of the fastest, median and slowest of the runs after the first."""
    logits, times = run(way), []
    if not np.isfinite(logits).all():
        raise RuntimeError(f"logits must be finite, got {logits}")
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        run(way)
        times.append(time.perf_counter() - start)
    names = {"seconds": np.median(times), "fastest_seconds": min(times), "slowest_seconds": max(times)}
    return logits, {name: round(float(value), 4) for name, value in names.items()}


def batch_table(result: dict[str, Any]) -> Table:
    """`prefill_many`, then the other ways: speed-up is ours over the other."""
    table = figures_table(
        result, "", "prompts", "tokens", "padded to", "logits differ", "s (fastest, slowest)", "tokens/s", "speed-up"
    )

    def times(figures: dict[str, Any], tokens: int) -> tuple[str, str]:
        spread = f"{figures['seconds']:.4g} ({figures['fastest_seconds']:.4g}, {figures['slowest_seconds']:.4g})"
        return spread, f"{tokens / figures['seconds']:,.0f}"

    for case in measured_cases(result):
        prompts = f"{len(case['lengths'])} in {len(case['batches'])} batches"
        sizes = (f"{case[name]:,}" for name in ("tokens", "padded_tokens"))
        table.add_row(case["case"], prompts, *sizes, "", *times(case, case["tokens"]))
        for other in case["others"]:
            if "error" in other:
                table.add_row(f"  {other['name']}: {other['error']}")
                continue
            figures = (f"{other['padded_tokens']:,}", f"{other['logits_difference']:.1e}")
            table.add_row(
                f"  {other['name']}", "", "", *figures, *times(other, case["tokens"]), f"{other['speedup']:.2f} x"
            )
    return table
