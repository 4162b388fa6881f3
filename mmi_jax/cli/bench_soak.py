"""`mmi bench soak`: random prompts through a random model in one process, watched for what grows."""

import functools
import math
from collections.abc import Sequence
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import typer

from mmi_jax.bench.soak import growth, soak
from mmi_jax.buckets import Buckets
from mmi_jax.cli import bench_table
from mmi_jax.cli.bench import DebugOption, JsonFileOption, take_memory
from mmi_jax.cli.bench_prefill import NEARLY_ALL, config_of, table_of
from mmi_jax.cli.bench_run import Run, run_all
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.made_prompts import Medium, made_prompt
from mmi_jax.cli.options import BenchDTypeOption, PresetOption, TableOption, bench_dtype
from mmi_jax.engine import prefill

FRAME_SIDES = (8, 16)
"""Tokens along the side of a frame or image."""


def run_soak(
    preset: PresetOption = "3b",
    layers: Annotated[int, typer.Option(min=1, help="Run the first layers only.")] = 4,
    prompts: Annotated[int, typer.Option(min=9, help="Random prompts: text, images, videos, several of them.")] = 50,
    shortest: Annotated[int, typer.Option(min=512, help="Tokens of a prompt, at least.")] = 2**12,
    longest: Annotated[int, typer.Option(min=1024, help="Tokens of a prompt, at most.")] = 2**18,
    table: TableOption = "mix",
    dtype: BenchDTypeOption = None,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    json_file: JsonFileOption = None,
    debug: DebugOption = False,
) -> None:
    """Random prompts in one process: programs, compilations, and bytes of host and device after each of them.

    The growth compares the last third of the prompts with the middle one.
    """
    from models.qwen2_5_vl.random_weights import with_random_weights
    from models.qwen2_5_vl.weights import abstract_model

    with one_line_errors(shows_traceback=debug):
        take_memory(NEARLY_ALL)
        if shortest > longest:
            raise ValueError(f"--shortest must be at most --longest, got {shortest} and {longest}")
        config = config_of(preset, layers)
        chosen = table_of(table, config)
        dtype = bench_dtype(dtype)

        def measure(_: Any) -> dict[str, Any]:
            model = with_random_weights(abstract_model(config, dtype=jnp.dtype(dtype)))
            rng = np.random.default_rng(seed)
            lengths = np.exp(rng.uniform(np.log(shortest), np.log(longest), prompts)).astype(int)
            several = [functools.partial(random_prompt, config, int(n), seed + k) for k, n in enumerate(lengths)]
            run = lambda make: prefill(model, make(), table=chosen, measures_recall=False)  # noqa: E731
            rows = soak(run, several)
            return figures(rows, [int(n) for n in lengths]) | {"case": f"soak {preset}", "layers": layers}

        run_all(
            [Run("soak", None)], measure, bench_table.soak_table, json_file, stops_at_error=debug, times_matmul=False
        )


def figures(rows: Sequence[dict[str, Any]], lengths: Sequence[int]) -> dict[str, Any]:
    """What grew from the middle third of the prompts to the last, the programs, and every row."""
    names = ("host_bytes", "device_bytes", "array_bytes", "compilations")
    grown = {f"{name}_growth": growth(rows, name) for name in names}
    used = len({Buckets().length_for(length) for length in lengths})
    return grown | {"prompts": len(rows), "buckets": used, "programs": rows[-1]["programs"], "rows": list(rows)}


def random_prompt(config: Any, num_tokens: int, seed: int) -> Any:
    """A prompt of about `num_tokens`: text alone, or images and videos of random pixels with text between them."""
    rng = np.random.default_rng(seed)
    pieces: list[int | Medium] = [int(rng.integers(1, 64))]
    left = num_tokens
    for _ in range(rng.integers(0, 4)):
        side, is_image = FRAME_SIDES[rng.integers(2)], bool(rng.integers(3) == 0)
        frames = 1 if is_image else int(left * rng.uniform(0.2, 0.9)) // side**2
        if frames < 1:
            continue
        patches = side * config.vision.merge_size
        pieces += [Medium(grid=(frames, patches, patches), is_image=is_image), int(rng.integers(1, 32))]
        left -= frames * side**2
    pieces.append(max(1, left if len(pieces) == 1 else 16))
    num_patches = sum(math.prod(piece.grid) for piece in pieces if isinstance(piece, Medium))
    return made_prompt(config, pieces, rng.standard_normal((num_patches, config.vision.patch_dim), np.float32), rng)
