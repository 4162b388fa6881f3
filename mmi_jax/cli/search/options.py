"""What `mmi search` is asked to do; everything that can be refused is refused before anything is loaded."""

import dataclasses
import json
from pathlib import Path

from mmi_jax.method.tables import pattern_json
from mmi_jax.search.candidates import SETS, Candidates
from mmi_jax.search.choice import Target, TargetDensity, TargetSpeedup
from mmi_jax.search.costs import cost_models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dial:
    """The one dial, in one of its two units."""

    target_speedup: float | None
    target_density: float | None

    def __post_init__(self):
        """Raises ValueError unless exactly one is given, and in its range."""
        if (self.target_speedup is None) == (self.target_density is None):
            raise ValueError(
                "search needs one of --target-speedup and --target-density: "
                f"got {self.target_speedup} and {self.target_density}"
            )
        self.target  # noqa: B018

    @property
    def target(self) -> Target:
        """The dial's setting."""
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
class SearchTask:
    """One search.

    Args:
      output: the table's file.
      work: the journal's file.
      weigh: whether errors of heads count by what cutting down the head alone does to the answers of short prompts.
      candidates: a name of `SETS`, or a file with a JSON list of patterns.
      excluded: names of patterns.
      costs: name of a cost model; the device's when None.
    """

    model: str
    output: Path
    work: Path
    dial: Dial
    calibration: Calibration
    weigh: bool
    candidates: str
    scale: float
    excluded: frozenset[str]
    costs: str | None
    dtype: str

    def __post_init__(self):
        """Raises ValueError for names that nothing bears, or files that cannot be written."""
        if unknown := self.excluded - pattern_json.pattern_names():
            known = ", ".join(sorted(pattern_json.pattern_names()))
            raise ValueError(f"--exclude must name patterns, {known}: got {', '.join(sorted(unknown))}")
        if self.costs is not None and self.costs not in cost_models():
            raise ValueError(f"--costs must be one of {', '.join(cost_models())}, got {self.costs!r}")
        for path in (self.output, self.work):
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
        try:
            value = json.loads(path.read_text())
            if not isinstance(value, list):
                raise ValueError(f"expected a list of patterns, got {type(value).__name__}")
            patterns = tuple(map(pattern_json.from_json, value))
        except ValueError as error:  # json.JSONDecodeError is one
            raise ValueError(f"{path}: {error}") from error
        return Candidates(within=patterns, across=patterns).scaled(self.scale)
