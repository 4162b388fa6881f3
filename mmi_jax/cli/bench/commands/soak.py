"""`mmi bench soak`: random prompts through a random model in one process, and the growth of its memory."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.table import Table

from mmi_jax.bench.soak import growth, memory_in_use, soak
from mmi_jax.cli.bench.options import (
    BenchDTypeOption,
    JsonFileOption,
    PresetOption,
    StopOption,
    TableOption,
    bench_dtype,
)
from mmi_jax.cli.bench.presets import config_of, table_of
from mmi_jax.cli.bench.runner import Case, run_cases
from mmi_jax.cli.bench.synthetic_prompts import RepeatedPatches, synthetic_prompt
from mmi_jax.cli.bench.tables import figures_table, measured_cases
from mmi_jax.cli.console import stderr_console
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import NEARLY_ALL, take_memory
from mmi_jax.cli.protocols import Model, ModelConfig, Prompt
from mmi_jax.engine.prefill import prefill
from mmi_jax.engine.settings.buckets import Buckets
from mmi_jax.engine.warmup import prepare
from mmi_jax.method.tables.pattern_table import PatternTable

type Grid = tuple[int, int, int]
"""Frames, rows and columns of an image or a video, in patches."""

ROUNDS = 2
"""How often every prompt comes."""

FRAME_SIDES = (8, 16)
"""Tokens along the side of a frame or image."""

FEW_PATCHES = 4096
"""Random patches of a prompt, which its frames repeat: a million would take the host longer than all else."""


def soak_command(
    preset: PresetOption = "3b",
    layers: Annotated[int, typer.Option(min=1, help="Run the first layers only.")] = 4,
    prompts: Annotated[int, typer.Option(min=9, help="Random prompts: text, images, videos, several of them.")] = 50,
    min_tokens: Annotated[int, typer.Option(min=512, help="Length of the shortest prompt.")] = 2**12,
    max_tokens: Annotated[int, typer.Option(min=1024, max=Buckets.largest, help="Length of the longest prompt.")] = 2
    ** 18,
    table: TableOption = "mix",
    dtype: BenchDTypeOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the prompts.")] = 0,
    json_file: JsonFileOption = None,
    debug: StopOption = False,
) -> None:
    """Prefill random prompts in one process and watch memory. Programs, compilations and bytes after each of them.

    All that their lengths and frames need is compiled before, so that a compilation after it is one too many. Every
    prompt comes twice, all of them round-robin, because a program's first run takes memory of the host; the growth
    compares the last third of the runs with the middle one.
    """
    from models.random_weights import random_model

    with one_line_errors(shows_traceback=debug):
        take_memory(NEARLY_ALL)
        if min_tokens > max_tokens:
            raise ValueError(f"--min-tokens must be at most --max-tokens, got {min_tokens} and {max_tokens}")
        config = config_of(preset, layers)
        chosen = table_of(table, config)
        dtype = bench_dtype(dtype)

        def measure(_: None) -> dict[str, Any]:
            model = random_model(config, dtype=jnp.dtype(dtype))
            rng = np.random.default_rng(seed)
            lengths = [int(n) for n in np.exp(rng.uniform(np.log(min_tokens), np.log(max_tokens), prompts))]
            several = [functools.partial(random_prompt, config, n, seed + k) for k, n in enumerate(lengths)]
            warmup = warm_up(model, chosen, several)
            run = lambda make: prefill(model, make(), table=chosen, measures_recall=False)  # noqa: E731
            log = soak(run, several * ROUNDS, on_prompt=lambda entry: report(entry, lengths[entry["prompt"] % prompts]))
            return figures(log, lengths) | {"case": f"soak {preset}", "layers": layers, "warmup": warmup}

        run_cases([Case("soak", None)], measure, soak_table, json_file, stops_at_error=debug, times_matmul=False)


def warm_up(model: Model, table: PatternTable, several: Sequence[Callable[[], Any]]) -> dict[str, float]:
    """Seconds to compile the prefills of all prompts' buckets, and what embeds them."""
    prompts = [(prompt.tokens.shape[1], prompt.grids) for prompt in (make() for make in several)]
    start = time.perf_counter()
    buckets = prepare(model, [length for length, _ in prompts], table=table, measures_recall=False)
    prepared = time.perf_counter()
    for prompt in embedded_alike(model, prompts):
        jax.block_until_ready(model.embed(prompt))
    seconds = {"programs": prepared - start, "embeddings": time.perf_counter() - prepared}
    times = " and ".join(f"{value:.1f} s" for value in seconds.values())
    report(memory_in_use(), f"warm-up: {len(buckets)} buckets in {times}")
    return {name: round(value, 2) for name, value in seconds.items()}


def embedded_alike(model: Model, prompts: Sequence[tuple[int, tuple[Grid, ...]]]) -> Iterator[Any]:
    """Prompts padded to their buckets, of one batch of frames at most, whose embedding needs what that of these needs.

    Args:
      prompts: tokens of each, and the grids of its images and videos.
    """
    from models.interface import MediumSize

    config, rng = model.config, np.random.default_rng(0)
    few = rng.standard_normal((1, config.vision.patch_dim), np.float32)
    different: set[tuple[int, Grid | None]] = set()
    for length, grids in prompts:
        padded = Buckets().length_for(length)
        numbers = {size: sum(grid[0] for grid in grids if grid[1:] == size) for size in {grid[1:] for grid in grids}}
        media = [(min(n, model.vision.batch_frames(n, size)), *size) for size, n in numbers.items()]
        different |= {(padded, grid) for grid in media or [None]}
    for padded, grid in sorted(different, key=str):
        num_vision = 0 if grid is None else math.prod(grid) // config.vision.block_len
        pieces = [padded] if grid is None else [MediumSize(grid), padded - 2 - num_vision]
        yield synthetic_prompt(config, pieces, RepeatedPatches(few, 0 if grid is None else math.prod(grid)), rng)


def report(log: dict[str, Any], what: str | int) -> None:
    """A line of progress: an interrupted soak has reported its progress."""
    name = f"prompt {log['prompt']}, {what:,} tokens, {log['seconds']:.2f} s" if "prompt" in log else what
    compiled = f"{log['compilations']} compiled, " if "compilations" in log else ""
    host, device = (log[f"{name}_bytes"] / 2**30 for name in ("host", "device"))
    line = f"{name}: {compiled}host {host:.2f} GiB, device {device:.2f} GiB"
    stderr_console().print(line, markup=False, soft_wrap=True)


def figures(log: Sequence[dict[str, Any]], lengths: Sequence[int]) -> dict[str, Any]:
    """Growth from the middle third of the prompts to the last, compilations meanwhile, and every prompt's figures."""
    names = ("host_bytes", "device_bytes", "array_bytes", "compilations")
    grown = {f"{name}_growth": growth(log, name) for name in names}
    used = len({Buckets().length_for(length) for length in lengths})
    last = {name: log[-1][name] for name in ("programs", "compilations")}
    sizes = {"prompts": len(lengths), "runs": len(log), "buckets": used}
    seconds = round(sum(entry["seconds"] for entry in log), 2)
    return grown | last | sizes | {"seconds": seconds, "log": list(log)}


def random_prompt(config: ModelConfig, num_tokens: int, seed: int) -> Prompt:
    """A prompt of `num_tokens`: text alone, or images and videos of random pixels with text between them."""
    from models.interface import MediumSize

    rng = np.random.default_rng(seed)
    first = int(rng.integers(1, 64))
    pieces, left = list[Any]([first]), num_tokens - first
    for _ in range(rng.integers(0, 4)):
        side, is_image, text = FRAME_SIDES[rng.integers(2)], bool(rng.integers(3) == 0), int(rng.integers(1, 32))
        available = left - text - 3  # two marks, and a last word
        frames = 1 if is_image else int(available * rng.uniform(0.2, 0.9)) // side**2
        if not 0 < frames * side**2 <= available:
            continue
        patches = side * config.vision.merge_size
        pieces += [MediumSize(grid=(frames, patches, patches), is_image=is_image), text]
        left -= frames * side**2 + 2 + text
    pieces.append(left)
    num_patches = sum(math.prod(piece.grid) for piece in pieces if isinstance(piece, MediumSize))
    few = rng.standard_normal((FEW_PATCHES, config.vision.patch_dim), np.float32)
    return synthetic_prompt(config, pieces, RepeatedPatches(few, num_patches), rng)


def soak_table(result: dict[str, Any]) -> Table:
    """The warm-up before, what grew while prompts went by, and what was compiled all the same."""
    table = figures_table(
        result,
        "",
        "prompts",
        "buckets",
        "programs",
        "warm-up s",
        "embeddings warm-up s",
        "all prompts s",
        "host MiB grown",
        "device MiB",
        "arrays MiB",
        "compiled",
    )
    for case in measured_cases(result):
        grown = (f"{case[f'{name}_bytes_growth'] / 2**20:.1f}" for name in ("host", "device", "array"))
        sizes = (str(case[name]) for name in ("prompts", "buckets", "programs"))
        times = (f"{x:.4g}" for x in (case["warmup"]["programs"], case["warmup"]["embeddings"], case["seconds"]))
        table.add_row(case["case"], *sizes, *times, *grown, str(case["compilations"]))
    return table
