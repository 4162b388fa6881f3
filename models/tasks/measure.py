"""Measure: how many tokens a model makes of text, frames and images."""

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np

from models.interface import Processor
from models.media.image import Image
from models.media.video import Video
from models.tasks.haystack import Haystack
from models.tasks.script import Clip, ScriptPart

MARKS = 2
"""Tokens around an image or video: where it begins and where it ends."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """Lengths in tokens of one model's prompts over one haystack.

    Fields:
        grid: tokens of two video frames.
        still: tokens of an image.
        frame: what the chat template adds around a prompt.
        count: tokens of a text.
    """

    grid: int
    still: int
    frame: int
    count: Callable[[str], int]

    @classmethod
    def of(cls, processor: Processor, haystack: Haystack) -> "Measure":
        """The measure of a processor's model."""

        def count(text: str) -> int:
            return len(processor.tokenizer.encode(text))

        around = len(processor(["x"]).tokens[0]) - count("x")
        pixels = np.broadcast_to(np.zeros((), np.uint8), (2, *haystack.frame_shape, 3))  # of which sizes are read
        grid = processor.num_tokens(Video(frames=pixels, fps=1.0))
        return cls(grid=grid, still=processor.num_tokens(Image(pixels=pixels[0])), frame=around, count=count)

    def length(self, parts: Iterable[ScriptPart]) -> int:
        """Tokens of a prompt of these parts, give or take a token where two texts meet."""
        return self.frame + sum(map(self._length, parts))

    def _length(self, part: ScriptPart) -> int:
        if isinstance(part, str):
            return self.count(part)
        if isinstance(part, Clip):
            return MARKS + self.grid * math.ceil(len(part.frames) / 2)
        return MARKS + self.still

    def grids_in(self, num_tokens: int, *, min_grids: int, others: Iterable[ScriptPart]) -> int:
        """Pairs of video frames that fit into a prompt with other parts.

        Raises:
            ValueError: fewer than `min_grids`.
        """
        num_grids = (num_tokens - self.length(others)) // self.grid
        if num_grids < min_grids:
            raise ValueError(
                f"the task needs {min_grids} pairs of frames of {self.grid} tokens and "
                f"{num_tokens - num_grids * self.grid} other tokens: {num_tokens=} holds {max(num_grids, 0)}"
            )
        return num_grids
