"""V-NIAH and MM-NIAH: one needle image in a long video, alone or with text among its frames.

References: the tasks are those of MMInference, arXiv 2504.16083, section 4 (V-NIAH after LongVA, arXiv 2406.16852).
"""

import numpy as np

from models.tasks.cards import Card, blank_video, draw_cards, free_grid, interleave, show, still
from models.tasks.haystack import Haystack
from models.tasks.measure import Measure
from models.tasks.sample import Question
from models.tasks.script import Script, ScriptPart
from models.tasks.text import LETTERS, document, options

TEXT_FRACTION = 0.25
"""Tokens of MM-NIAH that are text."""


def v_niah(
    *,
    num_tokens: int,
    depth: float,
    seed: int,
    haystack: Haystack,
    measure: Measure,
    num_distractors: int = 3,
    fps: float = 2.0,
    is_held_out: bool = False,
) -> Script:
    """A video with a needle card at a depth, then the question for the card's digit.

    Args:
        num_tokens: length of the prompt, at most.
        depth: place of the needle in the video, 0 first, 1 last.
        seed: of everything drawn.
        haystack: where the frames come from.
        measure: of the model that will read it.
        num_distractors: cards of other colours; 0 is the published task.
        fps: frames per second of the video.
        is_held_out: digits of the images that no model was trained on.

    Raises:
        ValueError: too few tokens for needle and distractors.
    """
    rng = np.random.default_rng([seed, 0])
    cards = draw_cards(1 + num_distractors, rng, is_held_out=is_held_out)
    num_grids = measure.grids_in(num_tokens, min_grids=len(cards), others=[cards[0].question, still(cards[0])])
    frames = blank_video(2 * num_grids, haystack, rng)
    taken: set[int] = set()
    places = [round(depth * (num_grids - 1)), *rng.integers(0, num_grids, num_distractors)]
    for card, place in zip(cards, places, strict=True):
        show(frames, card, 2 * free_grid(int(place), taken, num_grids))
    parts = [*interleave(frames, fps, []), cards[0].question]
    return Script(parts=tuple(parts), questions=(cards[0].ask(after_part=None, depth=depth),), depth=depth)


def mm_niah(
    *,
    num_tokens: int,
    depth: float,
    seed: int,
    haystack: Haystack,
    measure: Measure,
    num_distractors: int = 3,
    fps: float = 2.0,
    is_held_out: bool = False,
) -> Script:
    """A video with documents between its frames, a quarter of the tokens; a needle image at a depth; four choices.

    Args and errors as of `v_niah`. Needle and distractors are images, not frames of the video.
    """
    rng = np.random.default_rng([seed, 1])
    cards = draw_cards(1 + num_distractors, rng, is_held_out=is_held_out)
    question, question_text = choose(cards[0], rng, after_part=None, depth=depth)
    documents = draw_documents(int(TEXT_FRACTION * num_tokens) - measure.count(question_text), rng, measure)
    others: list[ScriptPart] = [question_text, *documents, *map(still, cards)]
    # Every document and image cuts the video once more, which costs the two marks of a piece.
    marks = 2 * (len(documents) + len(cards) + 1)
    num_grids = measure.grids_in(num_tokens - marks, min_grids=len(cards), others=others)
    frames = blank_video(2 * num_grids, haystack, rng)
    places = [round(depth * num_grids), *rng.integers(0, num_grids + 1, num_distractors)]
    events = [(2 * int(place), [still(card)]) for place, card in zip(places, cards, strict=True)]
    events += [(2 * int(rng.integers(0, num_grids + 1)), [text]) for text in documents]
    parts = [*interleave(frames, fps, sorted(events, key=lambda event: event[0])), question_text]
    return Script(parts=tuple(parts), questions=(question,), depth=depth)


def choose(card: Card, rng: np.random.Generator, *, after_part: int | None, depth: float) -> tuple[Question, str]:
    """The question for a card with four digits to choose from under letters, and its text."""
    others = rng.permutation([digit for digit in range(10) if digit != card.digit])[: len(LETTERS) - 1]
    offered = rng.permutation([card.digit, *others]).tolist()
    question = Question(choices=LETTERS, answer=offered.index(card.digit), after_part=after_part, depth=depth)
    return question, card.question + options(tuple(offered))


def draw_documents(num_tokens: int, rng: np.random.Generator, measure: Measure) -> list[str]:
    """Documents of 2 to 8 sentences, at most `num_tokens` long together."""
    documents: list[str] = []
    while True:
        text = document(int(rng.integers(2, 9)), rng)
        num_tokens -= measure.count(text)
        if num_tokens < 0:
            return documents
        documents.append(text)
