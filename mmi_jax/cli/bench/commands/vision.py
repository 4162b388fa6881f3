"""`mmi bench vision`: a vision tower with random weights on a video in host memory."""

from typing import Annotated, Any

import typer
from rich.table import Table

from mmi_jax.cli.bench.options import (
    BenchDTypeOption,
    JsonFileOption,
    PresetOption,
    RepeatsOption,
    StopOption,
    XlaBaselineOption,
    bench_dtype,
)
from mmi_jax.cli.bench.presets import config_of
from mmi_jax.cli.bench.runner import Case, run_cases
from mmi_jax.cli.bench.tables import figures_table, kernel_cells, measured_cases
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import ALONE, take_memory

DTYPES = ("float32", "bfloat16", "float16")


def vision(
    preset: PresetOption = "7b",
    grid: Annotated[
        list[str] | None,
        typer.Option(help="Tokens of a frame, as in 16x16; repeatable. Default: 12x12, 16x16 and 20x36."),
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of the video, two pictures each.")] = 128,
    dtype: BenchDTypeOption = None,
    repeats: RepeatsOption = 5,
    baseline: XlaBaselineOption = True,
    json_file: JsonFileOption = None,
    debug: StopOption = False,
) -> None:
    """Time the vision tower on a video in host memory. Frames and tokens per second, and TFLOP/s."""

    def measure(run: tuple[str, tuple[int, int]]) -> dict[str, Any]:
        from mmi_jax.cli.bench.vision_tower import bench_vision

        name, size = run
        return bench_vision(tower, name, size, num_frames=frames, with_baseline=baseline, repeats=repeats)

    with one_line_errors(shows_traceback=debug):
        take_memory(ALONE)
        grids = [(text, _grid(text)) for text in grid or ["12x12", "16x16", "20x36"]]
        tower = random_tower(preset, dtype)
        merge = tower.config.merge_size
        cases = [Case(f"{preset} {text}", (f"{preset} {text}", (merge * r, merge * c))) for text, (r, c) in grids]
        run_cases(cases, measure, vision_table, json_file, stops_at_error=debug)


def random_tower(preset: str, dtype: str | None) -> Any:
    """The vision tower alone, with random weights on the device."""
    from models import family_of
    from models.random_weights import with_random_weights

    config = config_of(preset)
    return with_random_weights(family_of(config).abstract_model(config, dtype=bench_dtype(dtype, DTYPES)).vision)


def _grid(text: str) -> tuple[int, int]:
    """Rows and columns from "16x16"."""
    numbers = text.split("x")
    if len(numbers) != 2 or not all(n.isdecimal() and int(n) for n in numbers):
        raise ValueError(f"--grid must be rows x columns in tokens, as in 16x16: got {text!r}")
    return int(numbers[0]), int(numbers[1])


def vision_table(result: dict[str, Any]) -> Table:
    """The whole call from host memory, then one batch on the device."""
    table = figures_table(
        result,
        "",
        "frames",
        "rel. error (xla's)",
        "ms (fastest, slowest)",
        "TFLOP/s",
        "% of matmul",
        "frames/s",
        "tokens/s",
    )
    for case in measured_cases(result):
        errors = f"{case['relative_error']:.1e} ({case['relative_error_xla']:.1e})"
        rates = f"{case['frames_per_s']:.4g}", f"{case['tokens_per_s']:.5g}"
        table.add_row(case["case"], str(case["frames"]), errors, *kernel_cells(case, result)[2:], *rates)
        for other in case["others"]:
            if "error" in other:
                table.add_row(f"  {other['name']}: {other['error']}")
            else:
                table.add_row(f"  {other['name']}", str(other["frames"]), "", *kernel_cells(other, result)[2:])
    return table
