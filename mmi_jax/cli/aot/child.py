"""The process that `mmi aot` starts, as the TPU compiler reads its flags only once, when it is loaded.

`python -m mmi_jax.cli.aot.child OPTIONS`, a JSON object; a line of JSON on stdout for each result,
`{"error": ...}` and status 2 for what bad input raises.
"""

import json
import sys
from pathlib import Path
from typing import Any

from mmi_jax.aot import compile_ahead, roofline
from mmi_jax.aot.bundles import Region, read_schedules
from mmi_jax.cli.aot.options import AotOptions
from mmi_jax.engine.memory.chips import chip_of, devices_per_chip


def kernel_figures(options: AotOptions, target: compile_ahead.Target, dump: Path) -> dict[str, Any]:
    """Schedule and VMEM of the kernel, and the roofline lower bound of the whole prefill at this length."""
    chip, num_tokens = chip_of(options.topology), options.tokens  # a search may have cut its last bucket
    tile = compile_ahead.compile_kernel(target, num_tokens)
    (schedule, *_) = read_schedules(dump, compile_ahead.KERNEL)
    block_kv, head_dim = target.blocks.kv, target.model.config.head_dim
    cycles = roofline.cycles_per_tile(schedule, chip, tile=tile, block_kv=block_kv, head_dim=head_dim)
    work = roofline.work_of(target, num_tokens, density=options.density)
    per_chip = devices_per_chip(list(target.mesh.devices.flat))
    bound = roofline.lower_bound(work, chip, cycles_per_tile=cycles, devices_per_chip=per_chip)
    patterns = {pattern for heads in target.table.layers for pattern in heads}
    return {
        "kernel": tile
        | {
            "bundles": schedule.bundles,
            "compute_regions": [_region(region) for region in roofline.compute_regions(schedule)],
            "bundles_elsewhere": schedule.bundles - sum(r.bundles for r in roofline.compute_regions(schedule)),
            "cycles_per_visited_block": round(cycles, 1),
        },
        **roofline.roofline_json(work, bound),
        "assumptions": roofline.assumptions(sorted(patterns, key=repr), options.density),
    }


def padded_tokens(options: AotOptions, target: compile_ahead.Target) -> int:
    """The bucket's length."""
    buckets = target.buckets(2 * options.tokens + target.buckets(1).multiple)
    return buckets.length_for(options.tokens)


def memory_figures(options: AotOptions, target: compile_ahead.Target):
    """One line for each length that is compiled: the bucket of `tokens`, or the lengths of a search."""
    chip, devices = chip_of(options.topology), list(target.mesh.devices.flat)
    per_chip = devices_per_chip(devices)
    about = {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "chips": len(devices) // per_chip,
        "mesh": dict(target.mesh.shape),
        "hbm_bytes_per_device": chip.hbm_bytes // per_chip,
    }
    if options.longest:
        tried = compile_ahead.longest_that_fits(target, options.tokens)
    else:
        num_tokens = padded_tokens(options, target)
        tried = iter([(num_tokens, compile_ahead.compile_prefill(target, num_tokens))])
    for num_tokens, memory in tried:
        yield about | {
            "padded_tokens": num_tokens,
            "fits": memory.fits,
            "argument_bytes": memory.arguments,
            "total_bytes": memory.total,
            "limit_bytes": memory.limit,
            "compile_seconds": round(memory.compile_seconds, 1),
        }


def _region(region: Region) -> dict[str, Any]:
    utilization = {unit.lower(): round(region.utilization(unit), 3) for unit in ("MXU", "VALU", "XLU")}
    return {"first_bundle": region.first, "bundles": region.bundles, **utilization}


def main(arguments: list[str]) -> int:
    """Status 0, or 2 after an error that the input caused."""
    options = AotOptions(**json.loads(arguments[0]))
    try:
        target = options.target()
        if options.dump is not None:
            print(json.dumps(kernel_figures(options, target, Path(options.dump))), flush=True)
            return 0
        for line in memory_figures(options, target):
            print(json.dumps(line), flush=True)
    except (ValueError, NotImplementedError) as error:
        print(json.dumps({"error": " ".join(str(error).split())}), flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
