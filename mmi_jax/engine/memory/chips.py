"""Published figures of TPU chips: memory, bandwidth, matrix units and clocks."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

GB, GIB = 10**9, 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip, all its cores together.

    Args:
      hbm_bytes: memory; the runtime and the compiler keep a little of it.
      hbm_bytes_per_second, link_bytes_per_second: to and from its memory; to and from all its neighbours.
      flops_per_second: bfloat16 matrix products.
      mxu_width: rows and columns of a matrix unit: a head dimension below it leaves lanes idle.
      cores: compute cores of the chip.
      flops_per_cycle: bfloat16, of one core.
    """

    hbm_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    flops_per_second: float
    mxu_width: int
    cores: int
    flops_per_cycle: int

    @property
    def clock(self) -> float:
        """Cycles, and so bundles, that a core issues in a second at the peak rate."""
        return self.flops_per_second / self.cores / self.flops_per_cycle


CHIPS = {
    "v4": Chip(
        hbm_bytes=32 * GIB,
        hbm_bytes_per_second=1228e9,
        link_bytes_per_second=300e9,
        flops_per_second=275e12,
        mxu_width=128,
        cores=2,
        flops_per_cycle=4 * 2 * 128**2,
    ),
    "v5e": Chip(
        hbm_bytes=16 * GIB,
        hbm_bytes_per_second=819e9,
        link_bytes_per_second=200e9,
        flops_per_second=197e12,
        mxu_width=128,
        cores=1,
        flops_per_cycle=4 * 2 * 128**2,
    ),
    "v5p": Chip(
        hbm_bytes=95 * GIB,
        hbm_bytes_per_second=2765e9,
        link_bytes_per_second=600e9,
        flops_per_second=459e12,
        mxu_width=128,
        cores=2,
        flops_per_cycle=4 * 2 * 128**2,
    ),
    "v6e": Chip(
        hbm_bytes=32 * GIB,
        hbm_bytes_per_second=1638e9,
        link_bytes_per_second=448e9,
        flops_per_second=918e12,
        mxu_width=256,
        cores=1,
        flops_per_cycle=4 * 2 * 256**2,
    ),
    "tpu7x": Chip(
        hbm_bytes=192 * GIB,
        hbm_bytes_per_second=7380e9,
        link_bytes_per_second=1200e9,
        flops_per_second=2307e12,
        mxu_width=256,
        cores=2,
        flops_per_cycle=4 * 2 * 256**2,
    ),
}
"""By the name that a topology begins with.

Memory, bandwidth, peak and links: Google Cloud TPU documentation, system architecture, "TPU v4", "v5e", "v5p", "v6e"
and "TPU7x" (links: 2,400, 1,600, 4,800, 3,584 and 9,600 Gbit/s a chip). Matrix units: the same pages; four per core of
128 x 128 up to v5p, and as many products per cycle as four of 256 x 256 from v6e on, which the published peak and the
schedules of this compiler agree with.
"""


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as `v5e:4x4`.

    Raises:
      ValueError: the name is not `CHIP:RxC` or `CHIP:RxCxL`, or the chip is not in the table.
    """
    name = topology.partition(":")[0]
    if not re.fullmatch(r"\w+:\d+x\d+(x\d+)?", topology) or name not in CHIPS:
        raise ValueError(f"a topology must be one of {', '.join(CHIPS)} and its shape, as in v5e:4x4: got {topology!r}")
    return CHIPS[name]


def devices_per_chip(devices: Sequence[Any]) -> int:
    """Devices on one chip and its memory: its cores one by one (v4, 7x here), or 1."""
    return len(devices) // len({tuple(device.coords) for device in devices})
