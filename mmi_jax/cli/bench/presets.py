"""The models of benchmarks: sizes of a preset, pattern tables by name, random weights."""

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mmi_jax.bench.plans import PLAN_CASES
from mmi_jax.bench.prefill import mixed_table
from mmi_jax.cli import compile_cache
from mmi_jax.cli.bench.options import check_known
from mmi_jax.cli.protocols import ModelConfig
from mmi_jax.engine.protocols import VisionLanguageModel
from mmi_jax.method.tables.pattern_table import PatternTable, as_table, load_table

SYNTHETIC_NATS = 14.0
"""Scores of a head at what it looks at, above those of far tokens."""


def config_of(preset: str, layers: int | None = None) -> ModelConfig:
    """The sizes of a preset, or of its first layers."""
    from models import presets

    known = presets()
    check_known("--preset", preset, known)
    config = known[preset]
    if layers is not None and layers > config.num_layers:
        raise ValueError(f"--layers must be at most {config.num_layers}, those of {preset}: got {layers}")
    return config if layers is None else dataclasses.replace(config, num_layers=layers)


def table_of(name: str, config: ModelConfig) -> PatternTable:
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


def random_weights(config: ModelConfig, dtype: str) -> VisionLanguageModel:
    """Random weights, heads of `head_shapes`; no vision tower."""
    from models.random_weights import random_model

    return random_model(config, shapes=head_shapes(config), has_vision=False, dtype=jnp.dtype(dtype))


def head_shapes(config: ModelConfig) -> Any:
    """Thirds of the heads look at the same place, at both, and at what is near."""
    from models.interface import HeadShape

    thirds = (
        HeadShape(place=SYNTHETIC_NATS),
        HeadShape(near=SYNTHETIC_NATS / 2, place=SYNTHETIC_NATS / 2),
        HeadShape(near=SYNTHETIC_NATS),
    )
    return tuple(thirds[n * 3 // config.num_heads] for n in range(config.num_heads))


@contextmanager
def with_empty_cache() -> Iterator[None]:
    """An empty compilation cache in the block: a cold start is cold."""
    with tempfile.TemporaryDirectory() as directory, compile_cache.compilation_cache_in(Path(directory)):
        yield
