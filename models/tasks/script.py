"""Script: a sample before its pixels: what is said, and in numbers what every frame shows."""

import dataclasses

import numpy as np
from jaxtyping import Int32

from models.media.image import Image
from models.media.video import Video
from models.tasks.digits import digit_masks, handwriting
from models.tasks.haystack import Haystack
from models.tasks.pictures import paint
from models.tasks.sample import Question, Sample, check_questions

NUM_BASE = 5
"""Numbers of a frame that its haystack reads; two more say what is painted on it."""
COLOUR, DIGIT = NUM_BASE, NUM_BASE + 1
"""Indices of a card's colour and of a digit's image among the numbers; -1 for none."""

Frames = Int32[np.ndarray, "n 7"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """A video of frames in numbers; `fps` frames stand for a second."""

    frames: Frames
    fps: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Still:
    """An image in numbers."""

    frames: Frames


type ScriptPart = str | Clip | Still


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Script:
    """One prompt in numbers; the same for the same seed on every machine.

    Fields:
        parts, questions, depth: as those of a `Sample`.
    """

    parts: tuple[ScriptPart, ...]
    questions: tuple[Question, ...]
    depth: float

    def __post_init__(self):
        """Checks that there is something to ask."""
        check_questions(self.questions, [len(p.frames) if isinstance(p, Clip) else 0 for p in self.parts])

    @property
    def num_frames(self) -> int:
        """Video frames and images."""
        return sum(len(part.frames) for part in self.parts if not isinstance(part, str))

    def render(self, haystack: Haystack) -> Sample:
        """The sample with pixels; `haystack` must be the one that the script was made with."""
        return Sample(
            parts=tuple(_render(part, haystack) for part in self.parts),
            questions=self.questions,
            depth=self.depth,
            num_frames=self.num_frames,
        )


def _render(part: ScriptPart, haystack: Haystack) -> str | Image | Video:
    match part:
        case str():
            return part
        case Clip():
            return Video(frames=pixels(part.frames, haystack), fps=part.fps)
        case Still():
            return Image(pixels=pixels(part.frames, haystack)[0])


def pixels(frames: Frames, haystack: Haystack) -> np.ndarray:
    """The frames `[n, rows, columns, 3]`, painted where there is something to paint."""
    painted = haystack.pixels(frames[:, :NUM_BASE])
    marked = np.flatnonzero((frames[:, NUM_BASE:] >= 0).any(axis=1))
    masks = digit_masks(*handwriting(np.maximum(frames[marked, DIGIT], 0)))
    painted[marked] = paint(painted[marked], frames[marked, NUM_BASE:], masks)
    return painted


def unmarked(base: np.ndarray) -> Frames:
    """Frames of a haystack with nothing painted on them."""
    return np.pad(base, ((0, 0), (0, 2)), constant_values=-1).astype(np.int32)
