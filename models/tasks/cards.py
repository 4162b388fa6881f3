"""Cards: coloured pictures with a handwritten digit, the needles; each question names a colour."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from models.tasks.digits import digit_images, digit_labels
from models.tasks.pictures import COLOURS
from models.tasks.sample import Question
from models.tasks.script import NUM_BASE, Clip, Frames, ScriptPart, Still, unmarked
from models.tasks.text import DIGITS, card_question


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """One card: numbers of its colour and of the image of its digit."""

    colour: int
    image: int

    @property
    def digit(self) -> int:
        """The digit it shows."""
        return int(digit_labels()[self.image])

    @property
    def question(self) -> str:
        """The question for it."""
        return card_question(self.colour)

    def ask(self, *, after_part: int | None, depth: float) -> Question:
        """The question whose choices are the ten digits."""
        return Question(choices=DIGITS, answer=self.digit, after_part=after_part, depth=depth)

    def marks(self) -> Int32[np.ndarray, " 2"]:
        """What is painted."""
        return np.array([self.colour, self.image], np.int32)


def draw_cards(count: int, rng: np.random.Generator, *, is_held_out: bool) -> list[Card]:
    """Cards of different colours; their digits are drawn evenly."""
    if count > len(COLOURS):
        raise ValueError(f"at most {len(COLOURS)} cards differ in colours, got {count=}")
    colours = rng.permutation(len(COLOURS))[:count]
    images = draw_digits(rng.integers(0, 10, count), rng, is_held_out=is_held_out)
    return [Card(colour=int(c), image=int(i)) for c, i in zip(colours, images, strict=True)]


def draw_digits(digits: np.ndarray, rng: np.random.Generator, *, is_held_out: bool) -> np.ndarray:
    """An image of each digit."""
    return np.array([rng.choice(digit_images(int(d), is_held_out=is_held_out)) for d in digits], np.int64)


def show(frames: Frames, card: Card, place: int, num_frames: int = 2) -> None:
    """Writes the card over `num_frames` frames from `place` on."""
    frames[place : place + num_frames, NUM_BASE:] = card.marks()


def still(card: Card) -> Still:
    """The card as an image."""
    frame = np.zeros((1, NUM_BASE + 2), np.int32)
    frame[0, NUM_BASE:] = card.marks()
    return Still(frames=frame)


def interleave(frames: Frames, fps: float, events: Sequence[tuple[int, Sequence[ScriptPart]]]) -> list[ScriptPart]:
    """One video cut where something stands between its frames.

    Args:
        frames: of the whole video.
        fps: of the video.
        events: what stands before the frame of that number, in ascending order.
    """
    parts: list[ScriptPart] = []
    done = 0
    for place, inserted in events:
        if place > done:
            parts.append(Clip(frames=frames[done:place], fps=fps))
        parts += inserted
        done = max(done, place)
    if done < len(frames):
        parts.append(Clip(frames=frames[done:], fps=fps))
    return parts


def blank_video(num_frames: int, haystack, rng: np.random.Generator) -> Frames:
    """A video of the haystack in which nothing is hidden yet."""
    return unmarked(haystack.shots(num_frames, rng))


def free_grid(target: int, taken: set[int], num_grids: int) -> int:
    """The pair of frames nearest to `target` that nothing stands in, which is then taken."""
    free = [grid for grid in range(num_grids) if grid not in taken]
    if not free:
        raise ValueError(f"no pair of frames is free among {num_grids=}")
    nearest = min(free, key=lambda grid: abs(grid - target))
    taken.add(nearest)
    return nearest
