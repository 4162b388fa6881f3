"""`mmi bench prefill`: whole prefills of a preset with random weights, beside the same engine with dense attention."""

import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer

from mmi_jax.bench.baselines.transformers_model import measure_transformers
from mmi_jax.bench.plans import PLAN_CASES
from mmi_jax.bench.prefill import (
    DenseBaseline,
    bench_prefill,
    check_kernel,
    dense_seconds,
    is_all_dense,
    mixed_table,
    profile_stages,
    projection_flops,
)
from mmi_jax.bench.timing.measurements import measurement
from mmi_jax.cli import compile_cache
from mmi_jax.cli.bench import tables
from mmi_jax.cli.bench.command import DebugOption, JsonFileOption, check_known
from mmi_jax.cli.bench.run import Run, run_all
from mmi_jax.cli.bench.start_child import start_seconds
from mmi_jax.cli.bench.synthetic_prompts import video_prompt
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import NEARLY_ALL, take_memory
from mmi_jax.cli.options import BenchDTypeOption, LayersOption, LengthsOption, PresetOption, TableOption, bench_dtype
from mmi_jax.files import check_target
from mmi_jax.method.tables.pattern_table import PatternTable, as_table, load_table

PLANTED_NATS = 14.0
"""Scores of a head at what it looks at, above those of far tokens."""


def prefill(
    preset: PresetOption = "7b",
    layers: LayersOption = None,
    tokens: LengthsOption = None,
    table: TableOption = "mix",
    dtype: BenchDTypeOption = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed prefills of each length.")] = 1,
    check: Annotated[bool, typer.Option(help="Compare one layer with masked dense attention first.")] = True,
    check_tokens: Annotated[int, typer.Option(min=1024, help="Tokens of that comparison, at most.")] = 2**15,
    baseline: Annotated[bool, typer.Option(help="Also time dense attention.")] = True,
    dense_limit: Annotated[int, typer.Option(min=2048, help="Tokens up to which dense prefills are measured.")] = 2**17,
    peers: Annotated[bool, typer.Option("--peers", help="Also time transformers, where torch is installed.")] = False,
    peers_limit: Annotated[int, typer.Option(min=1024, help="Tokens up to which transformers runs.")] = 2**18,
    start: Annotated[bool, typer.Option("--start", help="Also time cold and warm starts, in own processes.")] = False,
    profile: Annotated[Path | None, typer.Option(help="Directory for traces: one more prefill of each length.")] = None,
    json_file: JsonFileOption = None,
    debug: DebugOption = False,
) -> None:
    """Prefill the embeddings of a video with text around it. Frames are of 256 tokens; the vision tower is left out.

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
        task = dict(preset=preset, layers=layers, table=table, dtype=dtype, tokens=lengths[-1])
        started = measurement("start", lambda: start_seconds(task)) if start else None
        with own_programs():
            runs = [Run(f"{preset} {n}", n) for n in lengths]
            suite = _Suite(
                config=config, table=chosen, dtype=dtype, repeats=repeats, peers=rows, profile=profile, start=started
            )
            if baseline and not is_all_dense(chosen):
                suite.dense = DenseBaseline(measure=suite.dense_seconds, limit=dense_limit)
            if check:
                suite.check = measurement(
                    "one layer against masked dense attention", lambda: suite.checked(min(check_tokens, lengths[0]))
                )
            run_all(runs, suite.measure, tables.prefill_table, json_file, stops_at_error=debug)


@dataclasses.dataclass
class _Suite:
    """The model, made once, and what is measured of it."""

    config: Any
    table: PatternTable
    dtype: str
    repeats: int
    peers: list[dict[str, Any]]
    profile: Path | None
    start: dict[str, Any] | None
    dense: DenseBaseline | None = None
    check: dict[str, Any] | None = None

    @functools.cached_property
    def model(self) -> Any:
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


def random_weights(config: Any, dtype: str) -> Any:
    """Random weights, heads of `head_shapes`; no vision tower."""
    from models.random_weights import random_model

    return random_model(config, shapes=head_shapes(config), has_vision=False, dtype=jnp.dtype(dtype))


def head_shapes(config: Any) -> Any:
    """Thirds of the heads look at the same place, at both, and at what is near."""
    from models.interface import HeadShape

    thirds = (
        HeadShape(place=PLANTED_NATS),
        HeadShape(near=PLANTED_NATS / 2, place=PLANTED_NATS / 2),
        HeadShape(near=PLANTED_NATS),
    )
    return tuple(thirds[n * 3 // config.num_heads] for n in range(config.num_heads))


def config_of(preset: str, layers: int | None) -> Any:
    """The sizes of a preset, or of its first layers."""
    from models import presets

    known = presets()
    check_known("--preset", preset, known)
    config = known[preset]
    if layers is not None and layers > config.num_layers:
        raise ValueError(f"--layers must be at most {config.num_layers}, those of {preset}: got {layers}")
    return config if layers is None else dataclasses.replace(config, num_layers=layers)


def table_of(name: str, config: Any) -> PatternTable:
    """The table that `--table` names, for the layers that run; raises ValueError where it names none."""
    if set(cases := name.split("+")) <= set(PLAN_CASES):
        return mixed_table(config.num_layers, config.num_heads, cases)
    if name == "dense":
        table = as_table(None, num_layers=config.num_layers, num_heads=config.num_heads)
        return dataclasses.replace(table, model="dense")
    if not Path(name).is_file():
        known = ", ".join(PLAN_CASES)
        raise ValueError(f"--table must be dense, cases joined by + (of {known}), or a file that exists, got {name!r}")
    table = load_table(Path(name))
    if table.num_layers > config.num_layers:
        table = dataclasses.replace(table, layers=table.layers[: config.num_layers])
    table.check_fits(num_layers=config.num_layers, num_heads=config.num_heads)
    return table


@contextmanager
def own_programs() -> Iterator[None]:
    """An empty persistent cache, so that cold is cold."""
    with tempfile.TemporaryDirectory() as directory, compile_cache.kept_programs(Path(directory)):
        yield
