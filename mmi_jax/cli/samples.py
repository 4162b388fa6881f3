"""Prompts for calibration and evaluation from the tasks, over a generated haystack or a folder of videos."""

import dataclasses
import functools
from pathlib import Path

from models import Processor
from models.tasks import TASKS, FolderHaystack, GeneratedHaystack, Haystack, Measure, Sample, Script

GENERATED = "generated"
SHORT_NAMES = {
    "v-niah": "v_niah",
    "mm-niah": "mm_niah",
    "middle": "middle_questions",
    "mm-middle": "mm_middle_questions",
    "match": "matching_frames",
    "silent-match": "silent_matching",
}
"""Names that the command line takes for the tasks."""

DEFAULT_TASKS = ("v-niah", "mm-niah", "middle", "match")
"""The default tasks. `mm-middle` suits any model, too; `silent-match` only one that was trained
to say what a picture shows."""


def task_name(name: str) -> str:
    """The name in `TASKS` of a task as given on the command line.

    Raises:
      ValueError: there is no such task.
    """
    full_name = SHORT_NAMES.get(name, name)
    if full_name not in TASKS:
        raise ValueError(f"unknown task {name!r}: expected one of {', '.join(SHORT_NAMES)}")
    return full_name


def haystack_of(name: str) -> Haystack:
    """The haystack that `--haystack` names: `generated`, or a folder of videos.

    Raises:
      ValueError: neither.
    """
    if name == GENERATED:
        return GeneratedHaystack()
    if not Path(name).is_dir():
        raise ValueError(f"--haystack must be {GENERATED!r} or a folder of videos, got {name!r}")
    return FolderHaystack(directory=name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSource:
    """Samples of the tasks for one model.

    Args:
      haystack: where the frames come from.
    """

    processor: Processor
    haystack: Haystack

    @functools.cached_property
    def measure(self) -> Measure:
        """How many tokens the model makes of text and frames."""
        return Measure.of(self.processor, self.haystack)

    def sample(self, task: str, *, num_tokens: int, depth: float, seed: int) -> Sample:
        """One sample of a task; its handwritten digits are held out from training.

        Raises:
          ValueError: unknown task, or too few tokens for it.
        """
        return self.script(task, num_tokens=num_tokens, depth=depth, seed=seed).render(self.haystack)

    def script(self, task: str, *, num_tokens: int, depth: float, seed: int) -> Script:
        """The same before its pixels are made."""
        return TASKS[task_name(task)](
            num_tokens=num_tokens,
            depth=depth,
            seed=seed,
            haystack=self.haystack,
            measure=self.measure,
            is_held_out=True,
        )
