"""`mmi bench decode`: new tokens from a random cache, compared with the device's copy rate and XLA."""

from typing import Annotated, Any

import jax
import typer
from rich.table import Table

from mmi_jax.bench.decode import DecodeSizes, bench_decode
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
from mmi_jax.cli.bench.tables import figures_table, measured_cases
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import ALONE, take_memory
from mmi_jax.engine.protocols import VisionLanguageModel

DTYPES = ("float32", "bfloat16", "float16")


def decode(
    preset: PresetOption = "7b",
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens in the cache; repeatable. Default: 128K.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts of that length.")] = 1,
    dtype: BenchDTypeOption = None,
    repeats: RepeatsOption = 5,
    baseline: XlaBaselineOption = True,
    json_file: JsonFileOption = None,
    debug: StopOption = False,
) -> None:
    """Time decoding from a random cache. Time per token, and the rate of reading next to the device's copy rate."""

    def measure(num_tokens: int) -> dict[str, Any]:
        sizes = DecodeSizes(num_tokens=num_tokens, batch=batch, weight_bytes=_bytes_per_token(model))
        return bench_decode(model, f"{preset} {num_tokens}", sizes, with_baseline=baseline, repeats=repeats)

    with one_line_errors(shows_traceback=debug):
        take_memory(ALONE)
        model = _random_decoder(preset, dtype)
        cases = [Case(f"{preset} {n}", n) for n in tokens or [2**17]]
        run_cases(cases, measure, decode_table, json_file, stops_at_error=debug, times_matmul=False)


def _random_decoder(preset: str, dtype: str | None) -> VisionLanguageModel:
    """The model without its vision tower, with random weights on the device."""
    from models.random_weights import random_model

    return random_model(config_of(preset), dtype=bench_dtype(dtype, DTYPES), has_vision=False)


def _bytes_per_token(model: Any) -> int:
    """Weights that a token reads: all layers, the last norm, the head."""
    from flax import nnx

    head = model.embedding if model.head is None else model.head
    return sum(a.nbytes for part in (model.layers, model.norm, head) for a in jax.tree.leaves(nnx.state(part)))


def decode_table(result: dict[str, Any]) -> Table:
    """Time of a token and the rate of reading, then what it is compared with."""
    table = figures_table(
        result,
        "",
        "prompts",
        "rel. error",
        "logits differ",
        "ms per token",
        "tokens/s",
        "GB per token",
        "TB/s",
        "% of copy",
        "compile s",
    )
    for case in measured_cases(result):
        table.add_row(
            case["case"],
            str(case["batch"]),
            f"{case['relative_error']:.1e}",
            f"{case['logits_difference']:.1e}",
            f"{case['ms_per_token']:.4g}",
            f"{case['tokens_per_s']:.4g}",
            f"{case['gb_per_token']:.4g}",
            f"{case['tb_per_s']:.4g}",
            f"{case['copy_fraction']:.0%} of {case['copy_tb_per_s']:.4g}",
            f"{case['compile_ms'] / 1e3:.1f}",
        )
        for other in case["others"]:
            what = f": {other['error']}" if "error" in other else ""
            ms = other.get("ms_per_token", other.get("median_ms"))
            rate = f"{other['tb_per_s']:.4g}" if "tb_per_s" in other else ""
            table.add_row(f"  {other['name']}{what}", "", "", "", f"{ms:.4g}" if ms else "", "", "", rate)
    return table
