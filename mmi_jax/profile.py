"""Where the time of a prefill goes: a profiler trace, and the device time of each stage read from it.

The stages are named scopes in the code. A compiled program keeps the scope of every instruction, and the trace names
the instruction behind every kernel, so that the two together say which stage a kernel belongs to.
"""

import dataclasses
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

STAGES = {
    "mmi.project": "norms, projections, rotary",
    "mmi.estimate": "estimates",
    "mmi.plan": "lists and orders",
    "mmi.recall": "recall measurement",
    "mmi.permute": "permute",
    "mmi.attend": "attend",
    "mmi.undo": "undo",
    "mmi.mlp": "output projection, MLP",
}
"""Scopes and what they hold; an instruction belongs to the innermost of them."""

VISION, REST = "vision tower", "rest"
VISION_MODULE = "encode_batch"
"""Part of the name of the vision tower's programs."""

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = .*?\s(?P<opcode>[a-z][\w\-]*)\(", re.MULTILINE)
_OP_NAME = re.compile(r'op_name="(?P<path>[^"]*)"')
_HOLDERS = {"while", "conditional", "call"}
"""Instructions that last as long as others that they hold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Device time by stage.

    Args:
      seconds: of each stage, summed over kernels; of threads where there is no device beside the host.
      span: seconds from the first kernel's begin to the last one's end; 0 without any.
      is_device: whether the trace has a device's own timeline.
      directory: of the trace.
    """

    seconds: dict[str, float]
    span: float
    is_device: bool
    directory: Path

    @property
    def idle(self) -> float:
        """Seconds of the span in which the device ran no kernel; meaningless without a device."""
        return max(0.0, self.span - sum(self.seconds.values()))

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        rounded = {name: round(value, 6) for name, value in self.seconds.items()}
        return {"seconds": rounded, "span": round(self.span, 6), "is_device": self.is_device}


def profiled(run: Callable[[], Any], directory: Path, programs: Callable[[], Iterable[str]]) -> tuple[Any, StageTimes]:
    """What `run` returns, and the time of its stages; the trace stays in `directory` for a viewer.

    Args:
      run: compiled before, so that the trace holds its work alone.
      programs: the texts of the programs that may have run, asked for afterwards.

    Raises:
      OSError: the trace cannot be written.
      ValueError: the profiler left no trace.
    """
    directory.mkdir(parents=True, exist_ok=True)
    before = set(directory.rglob("*.xplane.pb"))
    with jax.profiler.trace(str(directory)):
        result = jax.block_until_ready(run())
    found = sorted(set(directory.rglob("*.xplane.pb")) - before)
    if not found:
        raise ValueError(f"the profiler must leave a trace in {directory}: got none; is the disk full?")
    return result, stage_times(found[-1], programs(), directory)


def stage_times(trace: Path, programs: Iterable[str], directory: Path) -> StageTimes:
    """The stages of one trace (`.xplane.pb`)."""
    stage_of, holders = _stages_of(programs)
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    devices = [plane for plane in planes if plane.name.startswith(("/device:GPU", "/device:TPU"))]
    totals: defaultdict[str, float] = defaultdict(float)
    begins, ends = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the profiler's own extension type
        kernels = [kernel for kernel in _kernels(devices or planes) if kernel[0] not in holders]
    for name, module, start, duration in kernels:
        totals[_stage(name, module, stage_of)] += duration
        begins.append(start)
        ends.append(start + duration)
    span = (max(ends) - min(begins)) * 1e-9 if ends else 0.0
    order = [VISION, *STAGES.values(), REST]
    seconds = {stage: totals[stage] * 1e-9 for stage in order if stage in totals}
    return StageTimes(seconds=seconds, span=span, is_device=bool(devices), directory=directory)


def _stages_of(programs: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """The stage of each instruction by name, and the instructions that only hold others."""
    stage_of, holders = {}, set()
    for text in programs:
        for line in text.splitlines():
            if not (instruction := _INSTRUCTION.match(line)):
                continue
            name = instruction["name"]
            if instruction["opcode"] in _HOLDERS:
                holders.add(name)
            if path := _OP_NAME.search(line):
                scopes = [part for part in re.split(r"[/()]", path["path"]) if part in STAGES]
                if scopes:
                    stage_of[name] = stage_of[_flat(name)] = STAGES[scopes[-1]]
    return stage_of, holders


def _flat(name: str) -> str:
    """The name as kernels bear it: a fusion `loop.3` is the kernel `loop_3`."""
    return name.replace(".", "_").replace("-", "_")


def _stage(name: str, module: str, stage_of: dict[str, str]) -> str:
    if VISION_MODULE in module:
        return VISION
    if "block_sparse_attention" in name or "cudnn" in name or "fmha" in name:  # kernels that bear their own names
        return stage_of.get(name, STAGES["mmi.attend"])
    return stage_of.get(name) or stage_of.get(_flat(name)) or REST


def _kernels(planes: list[Any]) -> Iterator[tuple[str, str, float, float]]:
    """Instruction, program, start and duration in nanoseconds of everything that ran."""
    for plane in planes:
        is_device = plane.name.startswith("/device")
        for line in plane.lines:
            if is_device and not line.name.startswith(("Stream", "XLA Ops")):
                continue  # lines derived from the others
            for event in line.events:
                stats = {key: value for key, value in event.stats if key in ("hlo_op", "hlo_module")}
                if "hlo_op" in stats or is_device:
                    name = str(stats.get("hlo_op", event.name))
                    yield name, str(stats.get("hlo_module", "")), event.start_ns, event.duration_ns
