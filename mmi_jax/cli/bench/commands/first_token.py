"""`mmi bench first-token`: from a video file to the first token's logits, and its parts."""

import contextlib
import dataclasses
import functools
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.table import Table

from mmi_jax.bench.prefill import DenseBaseline, dense_seconds, is_all_dense, memory_figures
from mmi_jax.bench.timing.measurements import measurement
from mmi_jax.cli.bench.options import (
    BaselineOption,
    BenchDTypeOption,
    JsonFileOption,
    LayersOption,
    LengthsOption,
    PresetOption,
    StopOption,
    TableOption,
    bench_dtype,
)
from mmi_jax.cli.bench.presets import config_of, head_shapes, table_of, with_empty_cache
from mmi_jax.cli.bench.runner import Case, run_cases
from mmi_jax.cli.bench.synthetic_prompts import synthetic_prompt, video_pieces, video_prompt
from mmi_jax.cli.bench.tables import figures_table, measured_cases
from mmi_jax.cli.doctor.memory_plan import vision_bytes
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import NEARLY_ALL, take_memory
from mmi_jax.cli.protocols import Model, ModelConfig, Prompt
from mmi_jax.engine.prefill import prefill
from mmi_jax.engine.prompts import fit_prompt
from mmi_jax.engine.settings.buckets import Buckets
from mmi_jax.engine.warmup import prepare
from mmi_jax.files import check_target
from mmi_jax.method.tables.pattern_table import PatternTable

FPS = 2
"""Pictures per second, of the file and sampled: all of them are used, and a temporal patch is a second."""

ALL = 2**31
"""Pictures that are sampled at most."""

PatchSource = Callable[[Path, Any], tuple[Any, Callable[[], float]]]
"""From a file and a model's sizes to patches, and to the seconds that they were waited for."""


def first_token(
    preset: PresetOption = "7b",
    layers: LayersOption = None,
    tokens: LengthsOption = None,
    table: TableOption = "mix",
    dtype: BenchDTypeOption = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each length.")] = 1,
    baseline: BaselineOption = True,
    dense_limit: Annotated[int, typer.Option(min=2048, help="Longest dense prefill that is timed.")] = 2**17,
    host_limit: Annotated[int, typer.Option(min=0, help="Longest prompt whose patches are also made by the host.")] = 0,
    json_file: JsonFileOption = None,
    debug: StopOption = False,
) -> None:
    """Time a prompt from its video file to the first logits. Decoding, vision tower and prefill, whole and apart.

    The file is H.264, 448 x 448: a second of two pictures is 256 tokens. Decoding goes on while the tower works; each
    is also timed alone. The dense time is ours with the prefill's part replaced, extrapolated above --dense-limit. The
    prefills of all lengths are compiled first, in parallel.
    """
    with one_line_errors(shows_traceback=debug):
        if json_file is not None:
            check_target(json_file)  # here, since much is compiled and checked before the cases begin
        take_memory(NEARLY_ALL)
        on_gpu = jax.default_backend() == "gpu"
        config = config_of(preset, layers)
        suite = _Suite(
            config=config,
            table=table_of(table, config),
            dtype=bench_dtype(dtype),
            repeats=repeats,
            host_limit=host_limit,
        )
        if baseline and not is_all_dense(suite.table):
            suite.dense = DenseBaseline(measure=suite.dense_seconds, limit=dense_limit)
        lengths = sorted(tokens or [2**17 if on_gpu else 2048])
        with with_empty_cache():
            suite.warmup = measurement("warm-up", lambda: suite.warm_up(lengths))
            runs = [Case(f"{preset} {n}", n) for n in lengths]
            table_view = first_token_table
            run_cases(runs, suite.measure, table_view, json_file, stops_at_error=debug, times_matmul=False)


@dataclasses.dataclass
class _Suite:
    """The model, built once, and what is measured of it."""

    config: ModelConfig
    table: PatternTable
    dtype: str
    repeats: int
    host_limit: int
    dense: DenseBaseline | None = None
    warmup: dict[str, Any] | None = None

    @functools.cached_property
    def model(self) -> Model:
        from models.random_weights import random_model

        return random_model(self.config, shapes=head_shapes(self.config), dtype=jnp.dtype(self.dtype))

    def warm_up(self, lengths: Sequence[int]) -> dict[str, Any]:
        """Seconds until the prefills of all lengths are compiled in parallel; the weights are drawn before."""
        jax.block_until_ready(self.model)
        start = time.perf_counter()
        buckets = prepare(self.model, lengths, table=self.table, measures_recall=False)
        return {"seconds": round(time.perf_counter() - start, 2), "buckets": buckets}

    def measure(self, num_tokens: int) -> dict[str, Any]:
        """The figures of one length."""
        with self.video(num_tokens) as path:
            first = self.once(num_tokens, path, streamed_patches)
            runs = [self.once(num_tokens, path, streamed_patches) for _ in range(self.repeats)]
            runs.sort(key=lambda run: run["seconds"])
            figures = runs[len(runs) // 2] | {
                "case": self.table.model,
                "tokens": num_tokens,
                "pictures": 2 * video_pieces(self.config, num_tokens)[1].grid[0],
                "file_bytes": path.stat().st_size,
                "layers": self.config.num_layers,
                "fastest_seconds": runs[0]["seconds"],
                "slowest_seconds": runs[-1]["seconds"],
                "compile_seconds": round(first["seconds"] - runs[0]["seconds"], 3),
                "warmup": self.warmup,
                **self.alone(num_tokens, path),
                **memory_figures(self.model, self.table, num_tokens, embed_bytes=vision_bytes(self.config, num_tokens)),
                "others": [],
            }
            if num_tokens <= self.host_limit:
                by_host = lambda: [self.once(num_tokens, path, host_patches) for _ in range(2)][1]  # noqa: E731
                figures["others"].append(measurement("patches made by the host", by_host))
        return figures if self.dense is None else figures | with_dense_prefill(figures, self.dense.of(num_tokens))

    @contextlib.contextmanager
    def video(self, num_tokens: int) -> Iterator[Path]:
        """A file whose pictures make a prompt of so many tokens."""
        from models.media.moving_video import write_moving_video

        num_patches, rows, _ = video_pieces(self.config, num_tokens)[1].grid
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "video.mp4"
            side = rows * self.config.vision.patch_size
            write_moving_video(path, num_frames=2 * num_patches, side=side, fps=FPS)
            yield path

    def prompt(self, num_tokens: int, patches: Any) -> Prompt:
        """Text, the video, text."""
        return synthetic_prompt(self.config, video_pieces(self.config, num_tokens), patches, np.random.default_rng(0))

    def once(self, num_tokens: int, path: Path, source: PatchSource) -> dict[str, Any]:
        """Seconds from the file to the logits on the host, and those of each part."""
        gc.collect()
        start = time.perf_counter()
        patches, waited = source(path, self.config)
        prompt = self.prompt(num_tokens, patches)
        prompt_seconds = time.perf_counter() - start
        result = prefill(self.model, prompt, table=self.table, measures_recall=False)
        if not np.isfinite(np.asarray(result.logits)).all():
            raise RuntimeError(f"logits must be finite, got {result.logits}")
        seconds = time.perf_counter() - start
        stages = result.report.seconds
        parts = {"prompt": prompt_seconds, "vision": stages["vision"], "prefill": stages["prefill"]}
        parts |= {"rest": seconds - sum(parts.values()), "waited": waited()}
        return {"seconds": round(seconds, 4), "parts": {name: round(value, 4) for name, value in parts.items()}}

    def alone(self, num_tokens: int, path: Path) -> dict[str, float]:
        """Seconds of decoding without a tower, and of the tower with all pictures decoded."""
        from models import family_of

        start = time.perf_counter()
        stream = open_stream(path)
        stream.read()
        patches = family_of(self.config).pixel_patches(self.config, stream)
        decoded = time.perf_counter() - start
        padded = fit_prompt(self.prompt(num_tokens, patches), Buckets().length_for(num_tokens))
        start = time.perf_counter()
        jax.block_until_ready(self.model.embed(padded))
        return {"decoding_alone": round(decoded, 4), "tower_alone": round(time.perf_counter() - start, 4)}

    def dense_seconds(self, num_tokens: int) -> float:
        """Seconds of a dense prefill."""
        from models import family_of

        return dense_seconds(family_of(self.config).without_vision(self.model), video_prompt(self.config, num_tokens))


def with_dense_prefill(figures: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """The dense figures, and the whole time that they would make, with all parts but the prefill ours."""
    if "dense_seconds" not in dense:
        return dense
    whole = figures["seconds"] - figures["parts"]["prefill"] + dense["dense_seconds"]
    return dense | {"dense_first_token": round(whole, 4), "speedup": round(whole / figures["seconds"], 3)}


def streamed_patches(path: Path, config: ModelConfig) -> tuple[Any, Callable[[], float]]:
    """Patches cut on the device from pictures that a thread decodes, and for how many seconds these were waited for."""
    from models import family_of

    stream = open_stream(path)
    return family_of(config).pixel_patches(config, stream), lambda: stream.waited_seconds


def open_stream(path: Path) -> Any:
    """A `VideoStream` of all pictures of the file."""
    from models.media.video_stream import VideoStream

    return VideoStream(path, fps=float(FPS), max_frames=ALL)


def host_patches(path: Path, config: ModelConfig) -> tuple[Any, Callable[[], float]]:
    """Patches made by the host once all pictures are decoded: no waiting afterwards."""
    from models import family_of
    from models.media.video import read_video

    video = read_video(path, fps=float(FPS), max_frames=ALL)
    return np.asarray(family_of(config).pixel_patches(config, video)), lambda: 0.0


def first_token_table(result: dict[str, Any]) -> Table:
    """The whole time of each length, its parts in order, and decoding and the tower each alone; dense as elsewhere."""
    parts = ("prompt", "vision", "prefill", "rest")
    table = figures_table(
        result,
        "",
        "tokens",
        "pictures",
        "whole, s",
        *parts,
        "waited",
        "decoding alone",
        "tower alone",
        "dense prefill",
        "dense whole",
        "speed-up",
        "warm-up s, all",
        "first s more",
        "peak GiB",
    )
    for case in measured_cases(result):
        sign = "~" if case.get("is_dense_extrapolated") else ""
        dense = [f"{sign}{case[name]:.4g}" if name in case else "" for name in ("dense_seconds", "dense_first_token")]
        table.add_row(
            case["case"],
            f"{case['tokens']:,}",
            f"{case['pictures']:,}",
            f"{case['seconds']:.4g}",
            *(f"{case['parts'][name]:.4g}" for name in (*parts, "waited")),
            f"{case['decoding_alone']:.4g}",
            f"{case['tower_alone']:.4g}",
            *dense,
            f"{case['speedup']:.2f} x" if "speedup" in case else case.get("dense_error", ""),
            f"{case['warmup']['seconds']:.1f}" if "seconds" in case["warmup"] else case["warmup"]["error"],
            f"{case['compile_seconds']:.1f}",
            f"{case['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in case else "",
        )
        for other in case["others"]:
            if "error" in other:
                table.add_row(f"  {other['name']}: {other['error']}")
            else:
                times = (f"{other['parts'][name]:.4g}" for name in parts)
                table.add_row(f"  {other['name']}", "", "", f"{other['seconds']:.4g}", *times)
    return table
