"""Cost models of devices, measured or from published rates, and the cost of a layer by its heads' visited tiles."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mmi_jax.engine.memory.chips import CHIPS, Chip
from mmi_jax.method.patterns import Dense, Pattern
from mmi_jax.method.tables.cost_model import HOPPER, CostModel
from pallas_kernels.device import has_hopper_gpu

HEAD_DIM, QUERIES, ITEM_BYTES = 128, 64, 2
"""What cost models are made for: values in a head, queries behind an estimate, bytes of a value."""

TILE_FLOPS = 4 * 128 * 128 * HEAD_DIM
"""Of a tile of 128 x 128: two products, of two operations a value."""

MXU_UTILIZATION = {"v4": 0.82, "v5e": 0.91, "v5p": 0.92, "v6e": 0.75, "tpu7x": 0.75}
"""Fraction of the peak that the TPU kernel reaches in full tiles by the compiler's schedules (docs/log.md,
2026-11-25)."""


def analytical_costs(chip: Chip, mxu_utilization: float) -> CostModel:
    """A TPU's costs from its published rates: no TPU has been measured.

    A tile costs its products at that fraction of the peak. A moved token is read and written as a query and as an
    output; an estimate multiplies it with 64 queries twice, or reads it, whichever is longer. Launches are left out.
    """
    rate = mxu_utilization * chip.flops_per_second * 1e-9  # FLOPs in a nanosecond
    bandwidth = chip.hbm_bytes_per_second * 1e-9
    estimate_flops, key_bytes = 2 * 2 * QUERIES * HEAD_DIM, HEAD_DIM * ITEM_BYTES
    return CostModel(
        dense_ms=0.0,
        dense_ns_per_tile=TILE_FLOPS / rate,
        sparse_ms=0.0,
        plan_ms=0.0,
        sparse_ns_per_tile=TILE_FLOPS / rate,
        move_ns=4 * key_bytes / bandwidth,
        estimate_ns=max(estimate_flops / rate, key_bytes / bandwidth),
    )


TILES = CostModel(
    dense_ms=0.0,
    dense_ns_per_tile=1.0,
    sparse_ms=0.0,
    plan_ms=0.0,
    sparse_ns_per_tile=1.0,
    move_ns=4 * HEAD_DIM * 8 / TILE_FLOPS,
    estimate_ns=2 * 2 * QUERIES * HEAD_DIM / TILE_FLOPS,
)
"""For a CPU, in dense tiles of 128 x 128 in place of nanoseconds: work counted as in `analytical_costs`, a value moved
as 8 operations. Counted, not measured."""

DENSITY = dataclasses.replace(TILES, move_ns=0.0, estimate_ns=0.0)
"""Visited tiles and nothing else: what `PrefillReport.density` counts."""


def cost_models() -> dict[str, CostModel]:
    """By the name that `--cost-model` takes."""
    tpus = {name: analytical_costs(chip, MXU_UTILIZATION[name]) for name, chip in CHIPS.items()}
    return {"hopper": HOPPER, **tpus, "tiles": TILES}


def default_costs() -> str:
    """The name of the default device's cost model, looked up when called."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "")
    if has_hopper_gpu():
        return "hopper"
    names = {"tpuv4": "v4", "tpuv5lite": "v5e", "tpuv5e": "v5e", "tpuv5": "v5p", "tpuv5p": "v5p", "tpuv6lite": "v6e"}
    return names.get(kind, "tpu7x" if kind.startswith(("tpu7", "tpuv7")) else "tiles")


def layer_cost(
    costs: CostModel, patterns: Sequence[Pattern], heads: Sequence[float] | np.ndarray, num_tokens: int
) -> float:
    """Milliseconds of one layer whose heads add so much: launches included, a dense call where all heads are dense."""
    if all(pattern == Dense() for pattern in patterns):
        return min(costs.dense(len(patterns), num_tokens), float(np.sum(heads)) + costs.sparse_ms)
    return float(np.sum(heads)) + costs.launches(patterns)
