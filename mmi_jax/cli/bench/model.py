"""`mmi bench decode` and `mmi bench vision`: parts of a model with random weights of a published size."""

from typing import Annotated, Any, Literal

import jax
import typer

from mmi_jax.bench.decode import DecodeSizes, bench_decode
from mmi_jax.cli.bench import tables
from mmi_jax.cli.bench.command import DebugOption, JsonFileOption, RepeatsOption, check_known
from mmi_jax.cli.bench.run import Run, run_all
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import ALONE, take_memory
from mmi_jax.cli.options import BenchDTypeOption, PresetOption, bench_dtype

XlaOption = Annotated[bool, typer.Option("--baseline/--no-baseline", help="Also time the same by XLA.")]


def decode(
    preset: PresetOption = "7b",
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens in the cache; may be repeated. 128K unless given.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts of that length.")] = 1,
    dtype: BenchDTypeOption = None,
    repeats: RepeatsOption = 5,
    baseline: XlaOption = True,
    json_file: JsonFileOption = None,
    debug: DebugOption = False,
) -> None:
    """New tokens from a random cache. Time of a token, and the share of the device's copy rate that it reads at."""

    def measure(num_tokens: int) -> dict[str, Any]:
        sizes = DecodeSizes(num_tokens=num_tokens, batch=batch, weight_bytes=_bytes_per_token(model))
        return bench_decode(model, f"{preset} {num_tokens}", sizes, with_baseline=baseline, repeats=repeats)

    with one_line_errors(shows_traceback=debug):
        take_memory(ALONE)
        model = _random_model(preset, dtype, "decoder")
        runs = [Run(f"{preset} {n}", n) for n in tokens or [2**17]]
        run_all(runs, measure, tables.decode_table, json_file, stops_at_error=debug, times_matmul=False)


def vision(
    preset: PresetOption = "7b",
    grid: Annotated[
        list[str] | None,
        typer.Option(help="Tokens of a frame, as in 16x16; may be repeated. 12x12, 16x16 and 20x36 unless given."),
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of the video, two pictures each.")] = 128,
    dtype: BenchDTypeOption = None,
    repeats: RepeatsOption = 5,
    baseline: XlaOption = True,
    json_file: JsonFileOption = None,
    debug: DebugOption = False,
) -> None:
    """The vision tower on a video in host memory. Frames and tokens per second, and the rate of its operations."""

    def measure(run: tuple[str, tuple[int, int]]) -> dict[str, Any]:
        from mmi_jax.cli.bench.vision import bench_vision

        name, size = run
        return bench_vision(tower, name, size, num_frames=frames, with_baseline=baseline, repeats=repeats)

    with one_line_errors(shows_traceback=debug):
        take_memory(ALONE)
        grids = [(text, _grid(text)) for text in grid or ["12x12", "16x16", "20x36"]]
        tower = _random_model(preset, dtype, "vision")
        merge = tower.config.merge_size
        runs = [Run(f"{preset} {text}", (f"{preset} {text}", (merge * r, merge * c))) for text, (r, c) in grids]
        run_all(runs, measure, tables.vision_table, json_file, stops_at_error=debug)


def _random_model(preset: str, dtype: str | None, part: Literal["decoder", "vision"]) -> Any:
    """The model without its vision tower, or the tower alone, with random weights on the device."""
    from models import family_of, presets
    from models.random_weights import random_model, with_random_weights

    known = presets()
    check_known("--preset", preset, known)
    config, chosen = known[preset], bench_dtype(dtype, ("float32", "bfloat16", "float16"))
    if part == "vision":
        return with_random_weights(family_of(config).abstract_model(config, dtype=chosen).vision)
    return random_model(config, dtype=chosen, has_vision=False)


def _bytes_per_token(model: Any) -> int:
    """Weights that a token reads: all layers, the last norm, the head."""
    from flax import nnx

    head = model.embedding if model.head is None else model.head
    return sum(a.nbytes for part in (model.layers, model.norm, head) for a in jax.tree.leaves(nnx.state(part)))


def _grid(text: str) -> tuple[int, int]:
    """Rows and columns from "16x16"."""
    numbers = text.split("x")
    if len(numbers) != 2 or not all(n.isdecimal() and int(n) for n in numbers):
        raise ValueError(f"--grid must be rows x columns in tokens, as in 16x16: got {text!r}")
    return int(numbers[0]), int(numbers[1])
