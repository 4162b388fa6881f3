"""The choice of a config for the Hopper kernel: a measured one of `gpu_tuned.json`, else a built-in one.

The table is written by `mmi bench tune` and read at the first look-up.

One entry, of a kernel with blocks of 128 keys and 7 query heads on each kv head:

    {"head_dim": 128, "block_kv": 128, "heads_per_kv_head": 7,
     "config": {"tile_kv": 128, "num_k_stages": 2, "num_v_stages": 2, "num_q_buffers": 2, "ping_pong": false},
     "tflops_per_s": {"all": 617.0, "random": 619.0},
     "device": "NVIDIA H200", "date": "2026-11-22", "commit": "2756589"}

How long a row's list is, is not known when a program is compiled, so an entry's config is the one with the best
geometric mean over the lists it was tried on; its rate on each of them is given as well.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pallas_kernels.attention.hopper.gpu_config import CONFIGS, HEAD_DIMS, HopperConfig
from pallas_kernels.hopper import SHARED_MEMORY_BYTES

VERSION = 2
"""Of the file's format: a file of another version is refused, as its configs may have other fields."""

PATH = Path(__file__).with_name("gpu_tuned.json")
"""The table that ships with the package; none has been measured where there is no such file."""

_JSON_TYPES: dict[Any, str] = {int: "an integer", bool: "true or false", str: "a string", dict: "an object"}
"""JSON's names of the types that entries have, for messages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedEntry:
    """The best config of one kind of problem.

    Args:
      head_dim: padded, as the kernel runs it.
      block_kv: 128 for indices whose kv blocks are multiples of 128 rows, 64 for the others.
      heads_per_kv_head: query heads that share one kv head.
      config: the best.
      tflops_per_s: its rate on each kind of list.
      device, date, commit: where and when it was measured.
    """

    head_dim: int
    block_kv: int
    heads_per_kv_head: int
    config: HopperConfig
    tflops_per_s: dict[str, float]
    device: str
    date: str
    commit: str

    def __post_init__(self):
        """Raises ValueError for a problem that no lookup asks for, and for a config that cannot run it."""
        smem_bytes, tile_kv = self.config.shared_memory_bytes(self.head_dim, "bfloat16"), self.config.tile_kv
        rules = [
            (self.head_dim in HEAD_DIMS, f"head_dim must be 64, 128 or 256, got {self.head_dim}"),
            (self.block_kv in (64, 128), f"block_kv must be 64 or 128, got {self.block_kv}"),
            (self.heads_per_kv_head >= 1, f"heads_per_kv_head must be at least 1, got {self.heads_per_kv_head}"),
            (self.block_kv % tile_kv == 0, f"tile_kv must divide block_kv={self.block_kv}, got {tile_kv}"),
            (
                smem_bytes <= SHARED_MEMORY_BYTES,
                f"the config's shared memory must be at most {SHARED_MEMORY_BYTES} bytes, got {smem_bytes}",
            ),
        ]
        for holds, rule in rules:
            if not holds:
                raise ValueError(rule)

    @property
    def key(self) -> tuple[int, int, int]:
        """What the entry is looked up by."""
        return self.head_dim, self.block_kv, self.heads_per_kv_head


def choose_config(head_dim: int, block_kv: int, heads_per_kv_head: int = 1) -> HopperConfig:
    """The tuned config, else the built-in one, for a padded head dim and an index's `block_kv` (a multiple of 64)."""
    # Of 64 keys where a block starts at no multiple of 128, and where the accumulator takes half of the registers.
    tile_kv = 64 if head_dim == 256 or block_kv % 128 else 128
    return tuned_config(head_dim, block_kv, heads_per_kv_head) or CONFIGS[head_dim, tile_kv]


def tuned_config(head_dim: int, block_kv: int, heads_per_kv_head: int) -> HopperConfig | None:
    """The config measured for this head dim and block width, of the nearest number of query heads per kv head."""
    width = 64 if block_kv % 128 else 128
    able = [entry for entry in _shipped() if (entry.head_dim, entry.block_kv) == (head_dim, width)]
    # By the ratio of the ratios: 7 query heads are nearer to 8 than 1 is to 2.
    distance = lambda entry: abs(math.log2(entry.heads_per_kv_head / heads_per_kv_head))  # noqa: E731
    return min(able, key=distance).config if able else None


@functools.cache
def _shipped() -> tuple[TunedEntry, ...]:
    return read_table(PATH) if PATH.exists() else ()


def read_table(path: Path) -> tuple[TunedEntry, ...]:
    """The entries of a table.

    Raises:
      ValueError: the file is no table of this version, or an entry has missing or unknown keys, wrong types or values
        that cannot be; the message names the file and the rule.
    """
    try:
        table = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path} must hold JSON: {error}") from error
    if not isinstance(table, dict) or table.get("version") != VERSION:
        got = table.get("version") if isinstance(table, dict) else type(table).__name__
        raise ValueError(f"{path} must be an object with version {VERSION}, got {got}")
    _check_keys(table, ("version", "entries"), (), str(path))
    if not isinstance(table["entries"], list):
        raise ValueError(f"entries of {path} must be a list, got {table['entries']!r}")
    entries = tuple(_read_entry(entry, f"entry {n} of {path}") for n, entry in enumerate(table["entries"]))
    keys = [entry.key for entry in entries]
    if doubled := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"{path} must have one entry for each head_dim, block_kv and ratio, got two of {doubled}")
    return entries


def _read_entry(entry: Any, where: str) -> TunedEntry:
    _check_keys(entry, [f.name for f in dataclasses.fields(TunedEntry)], (), where)
    known = dataclasses.fields(HopperConfig)
    required = [f.name for f in known if f.default is dataclasses.MISSING]
    _check_keys(entry["config"], required, [f.name for f in known], f"config of {where}")
    _check_types(entry, TunedEntry, where)
    _check_types(entry["config"], HopperConfig, f"config of {where}")
    rates = entry["tflops_per_s"]
    if not all(type(rate) in (int, float) and 0 < rate < math.inf for rate in rates.values()):
        raise ValueError(f"tflops_per_s of {where} must hold positive numbers, got {rates!r}")
    try:
        return TunedEntry(**entry | {"config": HopperConfig(**entry["config"])})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_types(values: dict[str, Any], of: type, where: str) -> None:
    """Raises ValueError unless each value has the JSON type of the dataclass's field; true is no integer."""
    for field in dataclasses.fields(of):
        expected = dict if field.type in (dict[str, float], HopperConfig) else field.type
        if field.name in values and type(values[field.name]) is not expected:
            raise ValueError(f"{field.name} of {where} must be {_JSON_TYPES[expected]}, got {values[field.name]!r}")


def _check_keys(values: Any, required: Iterable[str], optional: Iterable[str], where: str) -> None:
    """Raises ValueError unless `values` is an object with all required keys and no others but the optional ones."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object, got {values!r}")
    known = list(dict.fromkeys([*required, *optional]))
    if missing := [key for key in required if key not in values]:
        raise ValueError(f"{where} lacks {', '.join(missing)}: its keys are {', '.join(known)}")
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}: known keys are {', '.join(known)}")
