"""The profile of a prefill: a profiler trace, and the device time of each stage read from it.

The stages are named scopes in the code. A compiled program keeps the scope of every instruction, and the trace names
the instruction behind every kernel, so that the two together say which stage a kernel belongs to.
"""

import dataclasses
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mmi_jax.engine.reporting.stages import PROFILED_STAGES, Stage

LABELS = {stage.scope: label for stage, label in PROFILED_STAGES.items()}
"""Name of each scope in a profile; an instruction belongs to the innermost of them."""

VISION, REST = "vision tower", "rest"
VISION_MODULE = "encode_batch"
"""Part of the name of the vision tower's programs."""

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = .*?\s(?P<opcode>[a-z][\w\-]*)\(", re.MULTILINE)
_OP_NAME = re.compile(r'op_name="(?P<path>[^"]*)"')
KERNEL_NAMES = {
    "block_sparse_attention": Stage.ATTEND,
    "attention_mass": Stage.ESTIMATE,
    "fmha": Stage.ATTEND,
    "flash": Stage.ATTEND,
}
"""Parts of the names of our kernels and of cuDNN's, by which a trace calls them."""

_HOLDERS = {"while", "conditional", "call"}
"""Instructions that last as long as others that they hold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Device time by stage.

    Args:
      seconds: of each stage, summed over kernels; of threads where the host is the only device.
      span: seconds from the first kernel's begin to the last one's end; 0 without any.
      is_device: whether the trace has a device's timeline.
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


def profiled[T](
    run: Callable[[], T], directory: Path, programs: Callable[[], Iterable[str | None]]
) -> tuple[T, StageTimes]:
    """The result of `run`, and the time of its stages; the trace stays in `directory` for a viewer.

    Args:
      run: compiled before, so that the trace holds its work alone.
      programs: the texts of the programs that may have run, read afterwards; None for one without a text.

    Raises:
      OSError: the trace cannot be written.
      ValueError: the profiler left no trace.
    """
    directory.mkdir(parents=True, exist_ok=True)
    before = set(directory.rglob("*.xplane.pb"))
    with jax.profiler.trace(str(directory)):
        result = jax.block_until_ready(run())
    traces = sorted(set(directory.rglob("*.xplane.pb")) - before)
    if not traces:
        raise ValueError(f"the profiler must leave a trace in {directory}: got none; is the disk full?")
    return result, stage_times(traces[-1], programs(), directory)


def stage_times(trace: Path, programs: Iterable[str | None], directory: Path) -> StageTimes:
    """The stages of one trace (`.xplane.pb`)."""
    stage_of, holders = _stages_of(programs)
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    devices = [plane for plane in planes if plane.name.startswith(("/device:GPU", "/device:TPU"))]
    totals: defaultdict[str, float] = defaultdict(float)
    begins, ends = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the profiler's extension type
        timelines = [list(timeline) for timeline in _timelines(devices or planes)]
    for timeline in timelines:
        kernels = [kernel for kernel in timeline if kernel.instruction not in holders]
        for stage, kernel in zip(_stages_in_order(kernels, stage_of), kernels, strict=True):
            totals[stage] += kernel.duration
            begins.append(kernel.start)
            ends.append(kernel.start + kernel.duration)
    span = (max(ends) - min(begins)) * 1e-9 if ends else 0.0
    order = [VISION, *PROFILED_STAGES.values(), REST]
    seconds = {stage: totals[stage] * 1e-9 for stage in order if stage in totals}
    return StageTimes(seconds=seconds, span=span, is_device=bool(devices), directory=directory)


def _stages_of(programs: Iterable[str | None]) -> tuple[dict[str, str], set[str]]:
    """The stage of each instruction by name, and the instructions that only hold others."""
    stage_of, holders = {}, set()
    for text in programs:
        for line in (text or "").splitlines():
            if not (instruction := _INSTRUCTION.match(line)):
                continue
            name = instruction["name"]
            if instruction["opcode"] in _HOLDERS:
                holders.add(name)
            path = _OP_NAME.search(line)
            scopes = _scopes(path["path"]) if path else []
            stage = LABELS[scopes[-1]] if scopes else REST
            stage_of[name] = stage_of[_flat(name)] = stage
    return stage_of, holders


def _flat(name: str) -> str:
    """The name as kernels bear it: a fusion `loop.3` is the kernel `loop_3`."""
    return name.replace(".", "_").replace("-", "_")


class _Kernel(NamedTuple):
    """One thing that ran: its name, its instruction, program and scope where the trace knows them; nanoseconds."""

    name: str
    instruction: str
    module: str
    path: str
    start: float
    duration: float


def _stages_in_order(kernels: Sequence[_Kernel], stage_of: Mapping[str, str]) -> list[str]:
    """The stage of each kernel of one timeline.

    A GPU replays recorded sequences of kernels, in which a library's kernel, such as a matrix product, bears no name of
    the program's: it belongs where the kernel before it does, else where the next one does, if of the same program.
    """
    named = [_named_stage(kernel, stage_of) for kernel in kernels]
    filled = _filled(kernels, named, range(len(kernels)))
    filled = _filled(kernels, filled, range(len(kernels) - 1, -1, -1))
    return [stage or REST for stage in filled]


def _filled(kernels: Sequence[_Kernel], stages: Sequence[str | None], order: range) -> list[str | None]:
    """The stages, those that are unknown taken from the neighbour that comes before them in `order`."""
    filled, last = list(stages), None
    for n in order:
        if last is not None and filled[n] is None and kernels[n].module == kernels[last].module:
            filled[n] = filled[last]
        last = n
    return filled


def _named_stage(kernel: _Kernel, stage_of: Mapping[str, str]) -> str | None:
    """The stage that the kernel's names tell: `REST` for a named instruction outside all scopes, None for no name."""
    if VISION_MODULE in kernel.module:
        return VISION
    if scopes := _scopes(kernel.path):
        return LABELS[scopes[-1]]
    for part, stage in KERNEL_NAMES.items():
        if part in kernel.name:
            return PROFILED_STAGES[stage]
    for name in (kernel.instruction, kernel.name):
        if name in stage_of:
            return stage_of[name]
    return None


def _scopes(path: str) -> list[str]:
    """The stages' scopes on the path of an operation, the innermost last."""
    return [part for part in re.split(r"[/()]", path) if part in LABELS]


def _timelines(planes: Sequence[Any]) -> Iterator[Iterator[_Kernel]]:
    """Events on each stream of a device, or each thread of the host, in order."""
    for plane in planes:
        is_device = plane.name.startswith("/device")
        for line in plane.lines:
            if not is_device or line.name.startswith(("Stream", "XLA Ops")):  # the others are derived from these
                yield _kernels(line, is_device)


def _kernels(line: Any, is_device: bool) -> Iterator[_Kernel]:
    for event in line.events:
        stats = dict(event.stats)
        if is_device or "hlo_op" in stats:
            yield _Kernel(
                name=event.name,
                instruction=str(stats.get("hlo_op", event.name)),
                module=str(stats.get("hlo_module", "")),
                path=str(stats.get("name", "")),
                start=event.start_ns,
                duration=event.duration_ns,
            )
