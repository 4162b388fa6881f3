"""Options of `mmi prefill`, and its result."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax

from mmi_jax import Blocks, PatternTable
from mmi_jax.engine.reporting.profiling import StageTimes
from mmi_jax.engine.reporting.report import Agreement, PrefillReport
from mmi_jax.method.patterns import Pattern


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the answer is decoded; see `mmi_jax.decode`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def __post_init__(self):
        """Raises ValueError for values that `decode` would refuse only after the prefill."""
        if self.max_new_tokens < 0 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"sampling needs max_new_tokens >= 0, temperature >= 0 and 0 < top_p <= 1: got {self}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What to run.

    Args:
      model: checkpoint directory or name on the hub.
      videos, images: files, in order.
      text: with or without marks; see `arrange`.
      fps, max_frames: see `read_video`.
      dtype: name of a JAX type.
      table, blocks, chunk_tokens: see `mmi_jax.prefill`.
      compares_dense: run dense attention as well.
      uses_mesh: shard prompt, weights and cache over all devices.
    """

    model: str
    videos: tuple[Path, ...]
    images: tuple[Path, ...]
    text: str
    fps: float
    max_frames: int
    dtype: str
    table: PatternTable | Pattern | None
    blocks: Blocks | None
    chunk_tokens: int | None
    compares_dense: bool
    uses_mesh: bool
    sampling: SamplingOptions

    def __post_init__(self):
        """Raises ValueError for what `prefill` would refuse only after video and weights are loaded."""
        if self.uses_mesh and self.chunk_tokens is not None:
            raise ValueError(f"a mesh runs the whole prompt at once: expected no chunk_tokens, got {self.chunk_tokens}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where results go.

    Args:
      plots: directory for pictures, or None.
      plot_layer: whose masks are drawn.
      profile: directory for a profiler trace, or None.
      is_json: one JSON object on stdout instead of tables.
      note: a sentence to print with the answer.
      right_answer: to print with the answer, where it is known.
    """

    plots: Path | None
    plot_layer: int
    profile: Path | None
    is_json: bool
    note: str
    right_answer: str | None = None

    def __post_init__(self):
        """Raises ValueError if pictures or a trace could not be written; better now than after the run."""
        for option, path in (("--plots", self.plots), ("--profile", self.profile)):
            if path is not None:
                check_directory(option, path)

    def check_layer(self, num_layers: int) -> None:
        """Raises ValueError if the model has no layer `plot_layer`."""
        if self.plots is not None and not 0 <= self.plot_layer < num_layers:
            raise ValueError(f"--plot-layer must be a layer of the model, 0 to {num_layers - 1}: got {self.plot_layer}")


def check_directory(option: str, path: Path) -> None:
    """Raises ValueError unless `path` is a directory to write into or one that can be made; it is not made."""
    existing = next(
        parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists() or parent.is_symlink()
    )
    if not existing.is_dir():
        raise ValueError(f"{option} must name a directory, got {str(path)!r}, where {str(existing)!r} is a file")
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        raise ValueError(f"{option} must name a directory that can be written, got {str(path)!r}: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a run.

    Args:
      report: of the prefill; its seconds hold the stages before and after it too.
      dense_report: of the dense prefill it is compared with.
      new_tokens, text: the answer.
      pictures: files written.
      stages: device time by stage of a second prefill, under the profiler.
      note, right_answer: as of `OutputOptions`.
    """

    options: RunOptions
    report: PrefillReport
    dense_report: PrefillReport | None
    agreement: Agreement | None
    new_tokens: list[int]
    text: str
    pictures: tuple[Path, ...]
    stages: StageTimes | None
    note: str
    right_answer: str | None

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "model": self.options.model,
            "prompt": self.options.text,
            "videos": [str(path) for path in self.options.videos],
            "images": [str(path) for path in self.options.images],
            "dtype": self.options.dtype,
            "device": jax.devices()[0].device_kind,
            "report": self.report.to_json(),
            "dense_seconds": None if self.dense_report is None else self.dense_report.to_json()["seconds"],
            "agreement": None if self.agreement is None else dataclasses.asdict(self.agreement),
            "new_tokens": self.new_tokens,
            "text": self.text,
            "stages": None if self.stages is None else self.stages.to_json(),
            "right_answer": self.right_answer,
            "plots": [str(path) for path in self.pictures],
            "note": self.note,
        }
