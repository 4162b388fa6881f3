"""Bundles and busy units of every straight-line region of a TPU kernel, from the compiler's final schedule.

The compiler writes one line per bundle (a bundle issues every cycle), and another table of how many slots of each
unit the bundle uses. Waits for copies and semaphores are in neither: they bound the compute side and no more.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

SCHEDULE, UNITS = "final_bundles.txt", "final_hlo-static-per-bundle-utilization.txt"
_FILE = re.compile(r"(?P<stamp>\d+)-(?P<kernel>.+)-(?P<step>\d+)-final_bundles\.txt")
_BUNDLE = re.compile(r"\s*(?:0x)?(?P<number>[0-9a-f]+)\s+(?P<mark>LH|LB|LE|PB|PF|CT)?\s*:")
_CAPACITY, _USE = "== CAPA", "== UTIL"
LOOP_BODY, BRANCH = "LB", "sbr.rel"


def dump_flags(directory: Path) -> str:
    """The value of `LIBTPU_INIT_ARGS`, set before the compiler is loaded, for it to write its schedules there."""
    return (
        f"--xla_jf_dump_to={directory} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true "
        "--xla_jf_emit_annotations=true"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
    """Bundles that issue one after another without a branch.

    Args:
      first: number of the first bundle.
      bundles: how many.
      used: slots used in the region, by unit: MXU, VALU, XLU, ...
      capacity: slots of one bundle, by unit.
      is_loop_body: whether a loop begins here.
    """

    first: int
    bundles: int
    used: dict[str, int]
    capacity: dict[str, int]
    is_loop_body: bool

    def utilization(self, unit: str) -> float:
        """The fraction of the unit's slots that is used."""
        return self.used[unit] / (self.bundles * self.capacity[unit])


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelSchedule:
    """A kernel's regions in order."""

    kernel: str
    regions: tuple[Region, ...]

    @property
    def bundles(self) -> int:
        """Bundles of the whole kernel."""
        return sum(region.bundles for region in self.regions)


def read_schedules(directory: Path, name: str) -> list[KernelSchedule]:
    """The schedules, in a directory the compiler wrote to, of the kernels whose name begins with `name`.

    Raises:
      ValueError: there is none.
    """
    schedules = []
    for path in sorted(directory.glob(f"*-{SCHEDULE}")):
        match = _FILE.fullmatch(path.name)
        if match and match["kernel"].startswith(name):
            units = _sibling(directory, match)
            schedules.append(
                KernelSchedule(kernel=match["kernel"], regions=_regions(path.read_text(), units.read_text()))
            )
    if not schedules:
        raise ValueError(f"the compiler wrote no schedule of a kernel {name!r}: got {_kernels(directory)}")
    return schedules


def _sibling(directory: Path, match: re.Match) -> Path:
    """The table of units that belongs to a schedule; of the same stamp and kernel, but another number."""
    prefix = f"{match['stamp']}-{match['kernel']}-"
    tables = [p for p in directory.iterdir() if p.name.startswith(prefix) and p.name.endswith(f"-{UNITS}")]
    if len(tables) != 1:
        raise ValueError(f"a schedule must have one table of units: {match[0]} has {len(tables)}")
    return tables[0]


def _kernels(directory: Path) -> list[str]:
    return sorted({m["kernel"] for p in directory.glob(f"*-{SCHEDULE}") if (m := _FILE.fullmatch(p.name))})


def _regions(schedule: str, units: str) -> tuple[Region, ...]:
    """The regions of a schedule: split before every mark and after every branch."""
    capacity, rows = _use_of_units(units.splitlines())
    edges, bodies = {0, len(rows)}, set()
    for line in schedule.splitlines():
        if not (bundle := _BUNDLE.match(line)):
            continue
        number = int(bundle["number"], 16)
        if bundle["mark"]:
            edges.add(number)
        if bundle["mark"] == LOOP_BODY:
            bodies.add(number)
        if BRANCH in line:
            edges.add(number + 1)
    inside = sorted(edge for edge in edges if edge <= len(rows))
    return tuple(
        Region(
            first=begin,
            bundles=end - begin,
            used={unit: sum(row[n] for row in rows[begin:end]) for n, unit in enumerate(capacity)},
            capacity=capacity,
            is_loop_body=begin in bodies,
        )
        for begin, end in itertools.pairwise(inside)
    )


def _use_of_units(lines: list[str]) -> tuple[dict[str, int], list[list[int]]]:
    """Slots of a bundle by unit, and the slots that each bundle uses."""
    begin = next(n for n, line in enumerate(lines) if line.startswith(_CAPACITY))
    names = [name.strip() for name in lines[begin + 1].split(",")]
    capacity = dict(zip(names, map(int, lines[begin + 2].split()), strict=True))
    table = itertools.dropwhile(lambda line: not line.startswith(_USE), lines)
    return capacity, list(_numbers(itertools.islice(table, 1, None)))


def _numbers(lines: Iterator[str]) -> Iterator[list[int]]:
    return ([int(number) for number in line.split()] for line in lines if line.strip())
