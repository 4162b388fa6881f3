"""What `mmi aot` runs in a process of its own: the TPU compiler reads its flags when it is loaded, once.

`python -m mmi_jax.cli.aot_child TASK`, the task being a JSON object; a line of JSON on stdout for each thing found,
`{"error": ...}` and status 2 for what bad input raises.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from mmi_jax import aot, bounds
from mmi_jax.blocks import Blocks
from mmi_jax.chips import chip_of, devices_per_chip
from mmi_jax.codec import parse
from mmi_jax.patterns import Dense
from mmi_jax.schedule import read_schedules
from mmi_jax.sharding import make_mesh
from mmi_jax.table import PatternTable, load_table, uniform_table
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.presets import PRESETS
from models.qwen2_5_vl.weights import abstract_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What `mmi aot` is asked.

    Args:
      preset: a size of `PRESETS`.
      topology: of TPUs, such as v5e:4x4.
      tokens: of the prompt.
      table, pattern: as for `mmi prefill`; dense attention without both.
      layers: to compile, from the first on; all when None.
      block_q: queries of a tile.
      density: share of the causal tiles that dynamic patterns visit, for the bound.
      measures_recall: as in `prefill`.
      longest: search the longest prompt up to `tokens`.
      dump: where the compiler writes its schedules, which makes this the kernel's run; None for the whole prefill's.
    """

    preset: str
    topology: str
    tokens: int
    table: str | None
    pattern: str | None
    layers: int | None
    block_q: int
    density: float
    measures_recall: bool
    longest: bool
    dump: str | None = None

    def config(self) -> Qwen2_5_VLConfig:
        """The preset, cut to the layers that are asked for.

        Raises:
          ValueError: an unknown preset, or more layers than it has.
        """
        if self.preset not in PRESETS:
            raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        config = PRESETS[self.preset]
        layers = config.num_layers if self.layers is None else self.layers
        if not 0 < layers <= config.num_layers:
            raise ValueError(f"--layers must be 1 to {config.num_layers}, those of {self.preset}: got {layers}")
        return dataclasses.replace(config, num_layers=layers)

    def patterns(self) -> PatternTable:
        """The table, for the layers that are compiled.

        Raises:
          ValueError: it cannot be read, or is for another model.
        """
        config, whole = self.config(), PRESETS[self.preset]
        if self.table is None:
            pattern = Dense() if self.pattern is None else parse(self.pattern)
            return uniform_table(pattern, num_layers=config.num_layers, num_heads=config.num_heads)
        table = load_table(self.table)
        table.check_fits(num_layers=whole.num_layers, num_heads=whole.num_heads)
        return dataclasses.replace(table, layers=table.layers[: config.num_layers])

    def check(self) -> None:
        """Raises ValueError for what can be refused without the compiler."""
        chip_of(self.topology)
        self.patterns()
        if not 0 < self.density <= 1:
            raise ValueError(f"--density must be above 0 and at most 1, got {self.density}")
        if self.block_q < 128 or self.block_q % 128:
            raise ValueError(f"--block-q must be a multiple of 128, got {self.block_q}")

    def target(self) -> aot.Target:
        """The model in shapes, on a mesh over all devices of the topology."""
        config = self.config()
        mesh = make_mesh(aot.devices_of(self.topology), num_kv_heads=config.num_kv_heads)
        return aot.Target(
            model=abstract_model(config),
            table=self.patterns(),
            mesh=mesh,
            blocks=Blocks(q=self.block_q),
            measures_recall=self.measures_recall,
        )


def kernel_figures(task: Task, target: aot.Target, dump: Path) -> dict[str, Any]:
    """Schedule and VMEM of the kernel, and the least time of the whole prefill at this length."""
    chip, num_tokens = chip_of(task.topology), padded_tokens(task, target)
    tile = aot.compile_kernel(target, num_tokens)
    (schedule, *_) = read_schedules(dump, aot.KERNEL)
    block_kv, head_dim = target.blocks.kv, target.model.config.head_dim
    cycles = bounds.cycles_per_tile(schedule, chip, tile=tile, block_kv=block_kv, head_dim=head_dim)
    found = bounds.work(target, num_tokens, density=task.density)
    per_chip = devices_per_chip(list(target.mesh.devices.flat))
    least = bounds.bound(found, target, chip, cycles_per_tile=cycles, devices_per_chip=per_chip)
    patterns = {pattern for heads in target.table.layers for pattern in heads}
    return {
        "kernel": tile
        | {
            "bundles": schedule.bundles,
            "compute_regions": [_region(region) for region in bounds.compute_regions(schedule)],
            "bundles_elsewhere": schedule.bundles - sum(r.bundles for r in bounds.compute_regions(schedule)),
            "cycles_per_visited_block": round(cycles, 1),
        },
        **bounds.sizes_json(found, least),
        "assumptions": bounds.assumptions(sorted(patterns, key=repr), task.density),
    }


def padded_tokens(task: Task, target: aot.Target) -> int:
    """The bucket's length."""
    buckets = target.buckets(2 * task.tokens + target.buckets(1).multiple)
    return buckets.length_for(task.tokens)


def memory_figures(task: Task, target: aot.Target):
    """One line for each length that is compiled: the bucket of `tokens`, or the lengths of a search."""
    chip, devices = chip_of(task.topology), list(target.mesh.devices.flat)
    per_chip = devices_per_chip(devices)
    about = {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "chips": len(devices) // per_chip,
        "mesh": dict(target.mesh.shape),
        "hbm_bytes_per_device": chip.hbm_bytes // per_chip,
    }
    if task.longest:
        tried = aot.longest_that_fits(target, task.tokens)
    else:
        num_tokens = padded_tokens(task, target)
        tried = iter([(num_tokens, aot.compile_prefill(target, num_tokens))])
    for num_tokens, memory in tried:
        yield about | {
            "padded_tokens": num_tokens,
            "fits": memory.fits,
            "argument_bytes": memory.arguments,
            "total_bytes": memory.total,
            "limit_bytes": memory.limit,
            "compile_seconds": round(memory.compile_seconds, 1),
        }


def _region(region: Any) -> dict[str, Any]:
    shares = {unit.lower(): round(region.share(unit), 3) for unit in ("MXU", "VALU", "XLU")}
    return {"first_bundle": region.first, "bundles": region.bundles, **shares}


def main(arguments: list[str]) -> int:
    """Status 0, or 2 after an error that the input caused."""
    task = Task(**json.loads(arguments[0]))
    try:
        target = task.target()
        if task.dump is not None:
            print(json.dumps(kernel_figures(task, target, Path(task.dump))), flush=True)
            return 0
        for line in memory_figures(task, target):
            print(json.dumps(line), flush=True)
    except (ValueError, NotImplementedError) as error:
        print(json.dumps({"error": " ".join(str(error).split())}), flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
