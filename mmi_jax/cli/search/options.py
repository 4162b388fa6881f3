"""Options of `mmi search`, checked before anything is loaded."""

import dataclasses
from pathlib import Path
from typing import Any

from mmi_jax.method.tables import pattern_json
from mmi_jax.method.tables.strict_json import check_type, read_json
from mmi_jax.search.candidates import SETS, Candidates
from mmi_jax.search.choice import Target, TargetDensity, TargetSpeedup
from mmi_jax.search.costs import cost_models


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchTarget:
    """The target of a search, as a speed-up or as a density."""

    target_speedup: float | None
    target_density: float | None

    def __post_init__(self):
        """Raises ValueError unless exactly one is given, and in its range."""
        if (self.target_speedup is None) == (self.target_density is None):
            raise ValueError(
                "search needs one of --target-speedup and --target-density: "
                f"got {self.target_speedup} and {self.target_density}"
            )
        self.value  # noqa: B018

    @property
    def value(self) -> Target:
        """The one that is given."""
        if self.target_speedup is not None:
            return TargetSpeedup(times=self.target_speedup)
        assert self.target_density is not None
        return TargetDensity(fraction=self.target_density)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """The prompts that errors are averaged over and the target holds on, and those that the table is checked on.

    Args:
      videos, held_out: files; each with `text` after it is one prompt.
      tasks: names of generated tasks; `samples` and `held_out_samples` prompts of each, of `tokens` tokens.
    """

    videos: tuple[Path, ...]
    held_out: tuple[Path, ...]
    text: str
    fps: float
    max_frames: int | None
    tasks: tuple[str, ...]
    tokens: int
    samples: int
    held_out_samples: int
    haystack: str
    seed: int

    def __post_init__(self):
        """Raises ValueError for no prompt at all, files that are missing, or numbers out of range."""
        if not self.videos and not (self.tasks and self.samples > 0):
            raise ValueError("search needs calibration prompts: --video FILE, or --task NAME with --samples above 0")
        if missing := [path for path in (*self.videos, *self.held_out) if not path.is_file()]:
            raise ValueError(f"no such file: {missing[0]}")
        if min(self.samples, self.held_out_samples, self.seed) < 0 or self.tokens < 1:
            raise ValueError(
                f"samples, held-out samples and seed must not be negative, tokens at least 1: got {self.samples}, "
                f"{self.held_out_samples}, {self.seed}, {self.tokens}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Options of one search.

    Args:
      output: the table's file.
      journal: file of finished trials.
      weights_by_importance: whether a head's error is weighted by how much ablating it alone changes the answers of
        short prompts.
      candidates: a name of `SETS`, or a file with a JSON list of patterns.
      excluded: names of patterns.
      cost_model: name of a cost model; the device's when None.
    """

    model: str
    output: Path
    journal: Path
    target: SearchTarget
    calibration: Calibration
    weights_by_importance: bool
    candidates: str
    scale: float
    excluded: frozenset[str]
    cost_model: str | None
    dtype: str

    def __post_init__(self):
        """Raises ValueError for unknown names, or files that cannot be written."""
        if unknown := self.excluded - pattern_json.pattern_names():
            known = ", ".join(sorted(pattern_json.pattern_names()))
            raise ValueError(f"--exclude must name patterns, {known}: got {', '.join(sorted(unknown))}")
        if self.cost_model is not None and self.cost_model not in cost_models():
            raise ValueError(f"--cost-model must be one of {', '.join(cost_models())}, got {self.cost_model!r}")
        for path in (self.output, self.journal):
            if path.is_dir() or not path.absolute().parent.is_dir():
                raise ValueError(f"a file must be written into an existing directory, got {str(path)!r}")
        self.read_candidates()

    def read_candidates(self) -> Candidates:
        """The candidates, scaled.

        Raises:
          ValueError: neither a known name nor a file with a list of patterns.
        """
        if self.candidates in SETS:
            return SETS[self.candidates].scaled(self.scale)
        path = Path(self.candidates)
        if not path.is_file():
            raise ValueError(f"--candidates must be {', '.join(SETS)} or a JSON file, got {self.candidates!r}")
        value: Any = read_json(path, "a list of patterns")
        try:
            check_type(value, list[dict], "a list of patterns")
            patterns = tuple(map(pattern_json.from_json, value))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return Candidates(within=patterns, across=patterns).scaled(self.scale)
