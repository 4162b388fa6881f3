"""`mmi bench prefill`: whole prefills with random weights, compared with dense attention in the same engine."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Group

from mmi_jax.bench.baselines.transformers_model import measure_transformers
from mmi_jax.bench.prefill import (
    DenseBaseline,
    bench_prefill,
    check_kernel,
    dense_seconds,
    is_all_dense,
    profile_stages,
    projection_flops,
)
from mmi_jax.bench.timing.measurements import measurement
from mmi_jax.cli.bench.options import (
    BenchDTypeOption,
    JsonFileOption,
    LayersOption,
    LengthsOption,
    PresetOption,
    StopOption,
    TableOption,
    bench_dtype,
)
from mmi_jax.cli.bench.presets import config_of, random_weights, table_of, with_empty_cache
from mmi_jax.cli.bench.runner import Case, run_cases
from mmi_jax.cli.bench.starts import start_seconds
from mmi_jax.cli.bench.synthetic_prompts import video_prompt
from mmi_jax.cli.bench.tables import figures_table, measured_cases
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import NEARLY_ALL, take_memory
from mmi_jax.cli.protocols import ModelConfig
from mmi_jax.engine.protocols import VisionLanguageModel
from mmi_jax.files import check_target
from mmi_jax.method.tables.pattern_table import PatternTable


def prefill(
    preset: PresetOption = "7b",
    layers: LayersOption = None,
    tokens: LengthsOption = None,
    table: TableOption = "mix",
    dtype: BenchDTypeOption = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed prefills of each length.")] = 1,
    check: Annotated[bool, typer.Option(help="Compare one layer with masked dense attention first.")] = True,
    check_tokens: Annotated[int, typer.Option(min=1024, help="Longest prompt of that comparison.")] = 2**15,
    baseline: Annotated[bool, typer.Option(help="Also time dense attention.")] = True,
    dense_limit: Annotated[int, typer.Option(min=2048, help="Longest dense prefill that is timed.")] = 2**17,
    peers: Annotated[bool, typer.Option("--peers", help="Also time transformers, where torch is installed.")] = False,
    peers_limit: Annotated[int, typer.Option(min=1024, help="Longest prompt for transformers.")] = 2**18,
    start: Annotated[bool, typer.Option("--start", help="Also time cold and warm starts.")] = False,
    profile: Annotated[
        Path | None, typer.Option(help="Directory for profiler traces of one more prefill per length.")
    ] = None,
    json_file: JsonFileOption = None,
    debug: StopOption = False,
) -> None:
    """Time whole prefills of a video with text around it. Frames have 256 tokens; the vision tower is left out.

    Random weights, with biases of queries and keys that let heads look at what is near or at the same place of a frame.
    Above --dense-limit the dense time is extrapolated, and labelled so. The peak is that of the process so far.
    """
    with one_line_errors(shows_traceback=debug):
        if json_file is not None:
            check_target(json_file)  # here, since much is compiled and checked before the cases begin
        take_memory(NEARLY_ALL)
        on_gpu = jax.default_backend() == "gpu"
        lengths = sorted(tokens or [2**17 if on_gpu else 2048])
        config = config_of(preset, layers)
        chosen = table_of(table, config)
        dtype = bench_dtype(dtype)
        rows = measure_transformers(config, [n for n in lengths if n <= peers_limit]) if peers else []
        options = dict(preset=preset, layers=layers, table=table, dtype=dtype, tokens=lengths[-1])
        started = measurement("start", lambda: start_seconds(options)) if start else None
        with with_empty_cache():
            runs = [Case(f"{preset} {n}", n) for n in lengths]
            suite = _Suite(
                config=config, table=chosen, dtype=dtype, repeats=repeats, peers=rows, profile=profile, start=started
            )
            if baseline and not is_all_dense(chosen):
                suite.dense = DenseBaseline(measure=suite.dense_seconds, limit=dense_limit)
            if check:
                suite.check = measurement(
                    "one layer against masked dense attention", lambda: suite.checked(min(check_tokens, lengths[0]))
                )
            run_cases(runs, suite.measure, prefill_table, json_file, stops_at_error=debug)


@dataclasses.dataclass
class _Suite:
    """The model, built once, and what is measured of it."""

    config: ModelConfig
    table: PatternTable
    dtype: str
    repeats: int
    peers: list[dict[str, Any]]
    profile: Path | None
    start: dict[str, Any] | None
    dense: DenseBaseline | None = None
    check: dict[str, Any] | None = None

    @functools.cached_property
    def model(self) -> VisionLanguageModel:
        return random_weights(self.config, self.dtype)

    def measure(self, num_tokens: int) -> dict[str, Any]:
        """The figures of one length."""
        prompt = video_prompt(self.config, num_tokens)
        figures = bench_prefill(self.model, prompt, self.table, repeats=self.repeats)
        figures |= {"case": self.table.model, "heads": f"{self.config.num_heads}/{self.config.num_kv_heads}"}
        figures |= {"dtype": self.dtype, "projection_flops": projection_flops(self.config, num_tokens)}
        if self.profile is not None:
            figures["stages"] = profile_stages(self.model, prompt, self.table, self.profile / str(num_tokens)).to_json()
        if self.dense is not None:
            figures |= self.dense.of(num_tokens)
        if "dense_seconds" in figures:
            figures["speedup"] = round(figures["dense_seconds"] / figures["seconds"], 3)
        figures["others"] = [
            {"name": "transformers, sdpa"} | peer for peer in self.peers if peer.get("tokens") == num_tokens
        ]
        figures["others"] += [{"name": "transformers, sdpa"} | peer for peer in self.peers if "tokens" not in peer]
        if self.start is not None:
            figures["start"] = self.start
        if self.check is not None:
            figures["check"] = self.check
        return figures

    def dense_seconds(self, num_tokens: int) -> float:
        """Seconds of a dense prefill."""
        return dense_seconds(self.model, video_prompt(self.config, num_tokens))

    def checked(self, num_tokens: int) -> dict[str, Any]:
        """One layer against masked dense attention."""
        config = dataclasses.replace(self.config, num_layers=1)
        first = dataclasses.replace(self.table, layers=self.table.layers[:1])
        return check_kernel(
            random_weights(config, self.dtype), video_prompt(config, num_tokens), first, dtype=self.dtype
        )


def prefill_table(result: dict[str, Any]) -> Group:
    """Each length: ours, dense with ~ where it is extrapolated, memory planned and measured, then the peers; below the
    table the stages and the check.
    """
    table = figures_table(
        result,
        "",
        "tokens",
        "layers",
        "density",
        "s (fastest, slowest)",
        "dense s",
        "speed-up",
        "tokens/s",
        "projections at the matmul rate, s",
        "compile s",
        "planned GiB",
        "peak GiB",
    )
    for case in measured_cases(result):
        dense = (
            f"{'~' if case['is_dense_extrapolated'] else ''}{case['dense_seconds']:.4g}" if "speedup" in case else ""
        )
        ideal = case["projection_flops"] / result["matmul_tflops_per_s"] / 1e12
        table.add_row(
            case["case"],
            f"{case['tokens']:,}",
            str(case["layers"]),
            f"{case['density']:.4f}",
            f"{case['seconds']:.4g} ({case['fastest_seconds']:.4g}, {case['slowest_seconds']:.4g})",
            dense or case.get("dense_error", ""),
            f"{case['speedup']:.2f} x" if "speedup" in case else "",
            f"{case['tokens'] / case['seconds']:,.0f}",
            f"{ideal:.4g}",
            f"{case['compile_seconds']:.1f}",
            f"{case['planned_bytes'] / 2**30:.2f}",
            f"{case['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in case else "",
        )
        for other in case["others"]:
            time = f"{other['seconds']:.4g}" if "seconds" in other else other["error"]
            peak = f"{other['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in other else ""
            table.add_row(f"  {other['name']}", "", "", "", time, *[""] * 6, peak)
    return Group(table, *(note for case in measured_cases(result) for note in _prefill_notes(case)))


def _prefill_notes(case: dict[str, Any]) -> Iterator[str]:
    """Density by pattern, device time by stage, and the check, each on a line."""
    label = f"{case['case']} {case['tokens']:,}"
    yield f"{label}, density: " + ", ".join(f"{name} {x:.4f}" for name, x in case["density_by_pattern"].items())
    if "stages" in case:
        stages = case["stages"]["seconds"]
        yield f"{label}, stages: " + ", ".join(f"{name} {1e3 * seconds:.4g} ms" for name, seconds in stages.items())
    if "start" in case:
        yield f"{label}, start: " + (case["start"].get("error") or ", ".join(_starts(case["start"])))
    if "check" in case:
        check = case["check"]
        verdict = check.get("error") or (
            f"{check['tokens']:,} tokens, relative error {check['relative_error']:.1e} "
            f"(dense attention's own {check['relative_error_of_dense']:.1e})"
        )
        yield f"{label}, {check['name']}: {verdict}"


def _starts(start: dict[str, Any]) -> Iterator[str]:
    """Cold and warm, and how many programs of layers."""
    for name in ("cold", "warm"):
        times = start[f"{name}_start"]
        yield f"{name} {times['seconds']} s for {times['programs']} different layers"
