"""Two harder tasks, in which rows in the middle look far back: dense attention at a prompt's end does not help."""

import numpy as np

from models.tasks.cards import blank_video, draw_cards, draw_digits, free_grid, interleave, show, still
from models.tasks.digits import digit_labels
from models.tasks.haystack import Haystack
from models.tasks.measure import Measure
from models.tasks.sample import Question
from models.tasks.script import DIGIT, Script, ScriptPart, unmarked
from models.tasks.text import DIGITS, MATCHING_QUESTION

FIRST, LAST = 0.4, 0.95
"""Places in the video between which the questions stand, as shares of it."""


def middle_questions(
    *, num_tokens: int, depth: float, seed: int, haystack: Haystack, measure: Measure, num_questions: int = 4,
    num_distractors: int = 4, fps: float = 2.0, is_held_out: bool = False,
) -> Script:  # fmt: skip
    """A video of cards that is interrupted by questions for the digits of cards far back; it goes on after the last.

    Args and errors as of `v_niah`; `depth` is the needle's place in what precedes its question.
    """
    rng = np.random.default_rng([seed, 2])
    cards = draw_cards(num_questions + num_distractors, rng, is_held_out=is_held_out)
    asked = cards[:num_questions]
    beside = [part for card in asked for part in (card.question, still(card))]
    num_grids = measure.grids_in(num_tokens, least=4 * len(cards), beside=beside)
    frames = blank_video(2 * num_grids, haystack, rng)
    stops = _stops(num_questions, num_grids)
    taken: set[int] = set()
    for card, stop in zip(asked, stops, strict=True):
        show(frames, card, 2 * free_grid(round(depth * (stop - 1)), taken, stop))
    for card in cards[num_questions:]:
        show(frames, card, 2 * free_grid(int(rng.integers(num_grids)), taken, num_grids))
    parts = interleave(frames, fps, [(2 * stop, [card.question]) for stop, card in zip(stops, asked, strict=True)])
    places = [i for i, part in enumerate(parts) if isinstance(part, str)]
    questions = tuple(card.ask(after_part=i, depth=depth) for i, card in zip(places, asked, strict=True))
    return Script(parts=tuple(parts), questions=questions, depth=depth)


def matching_frames(
    *, num_tokens: int, depth: float, seed: int, haystack: Haystack, measure: Measure, num_questions: int = 4,
    num_distractors: int = 4, fps: float = 2.0, is_held_out: bool = False,
) -> Script:  # fmt: skip
    """Pictures with a digit on them in a video; some come again without, and the question is which digit was there.

    Args and errors as of `v_niah`; `depth` is the place of the picture's first coming in what precedes its second.
    """
    rng = np.random.default_rng([seed, 3])
    pictures = unmarked(haystack.stills(num_questions + num_distractors, rng))
    images = draw_digits(rng.integers(0, 10, len(pictures)), rng, is_held_out=is_held_out)
    beside: list[ScriptPart] = [MATCHING_QUESTION, still(draw_cards(1, rng, is_held_out=False)[0])] * num_questions
    num_grids = measure.grids_in(num_tokens, least=4 * len(pictures), beside=beside)
    frames = blank_video(2 * num_grids, haystack, rng)
    stops = _stops(num_questions, num_grids)
    taken = {stop - 1 for stop in stops}
    for i in range(len(pictures)):
        is_asked = i < num_questions
        wanted = round(depth * (stops[i] - 2)) if is_asked else int(rng.integers(num_grids))
        first = free_grid(wanted, taken, stops[i] - 1 if is_asked else num_grids)
        frames[2 * first : 2 * first + 2] = pictures[i]
        frames[2 * first : 2 * first + 2, DIGIT] = images[i]
        if is_asked:
            frames[2 * stops[i] - 2 : 2 * stops[i]] = pictures[i]
    parts = interleave(frames, fps, [(2 * stop, [MATCHING_QUESTION]) for stop in stops])
    places = [i for i, part in enumerate(parts) if isinstance(part, str)]
    questions = tuple(
        Question(choices=DIGITS, answer=int(digit_labels()[image]), after_part=place, depth=depth)
        for place, image in zip(places, images, strict=False)
    )
    return Script(parts=tuple(parts), questions=questions, depth=depth)


def _stops(num_questions: int, num_grids: int) -> list[int]:
    """Pairs of frames that precede each question."""
    return [round(share * num_grids) for share in np.linspace(FIRST, LAST, num_questions)]
