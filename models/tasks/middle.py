"""Harder tasks, in which rows in the middle look far back: dense attention at a prompt's end does not help."""

import dataclasses

import numpy as np

from models.tasks.cards import Card, blank_video, draw_cards, draw_digits, free_grid, interleave, show, still
from models.tasks.digits import digit_labels
from models.tasks.haystack import Haystack
from models.tasks.measure import Measure
from models.tasks.niah import TEXT_FRACTION, choose, draw_documents
from models.tasks.sample import Question
from models.tasks.script import DIGIT, Clip, Frames, Script, ScriptPart, unmarked
from models.tasks.text import DIGITS, MATCHING_QUESTION

FIRST, LAST = 0.4, 0.95
"""Places in the video between which the questions stand, as fractions of it."""


def middle_questions(
    *,
    num_tokens: int,
    depth: float,
    seed: int,
    haystack: Haystack,
    measure: Measure,
    num_questions: int = 4,
    num_distractors: int = 4,
    fps: float = 2.0,
    is_held_out: bool = False,
) -> Script:
    """A video of cards that is interrupted by questions for the digits of cards far back; it goes on after the last.

    Args and errors as of `v_niah`; `depth` is the needle's place in what precedes its question.
    """
    rng = np.random.default_rng([seed, 2])
    cards = draw_cards(num_questions + num_distractors, rng, is_held_out=is_held_out)
    needles = cards[:num_questions]
    others = [part for card in needles for part in (card.question, still(card))]
    num_grids = measure.grids_in(num_tokens, min_grids=4 * len(cards), others=others)
    frames = blank_video(2 * num_grids, haystack, rng)
    stops = _stops(num_questions, num_grids)
    taken: set[int] = set()
    for card, stop in zip(needles, stops, strict=True):
        show(frames, card, 2 * free_grid(round(depth * (stop - 1)), taken, stop))
    for card in cards[num_questions:]:
        show(frames, card, 2 * free_grid(int(rng.integers(num_grids)), taken, num_grids))
    parts = interleave(frames, fps, [(2 * stop, [card.question]) for stop, card in zip(stops, needles, strict=True)])
    places = [i for i, part in enumerate(parts) if isinstance(part, str)]
    questions = tuple(card.ask(after_part=i, depth=depth) for i, card in zip(places, needles, strict=True))
    return Script(parts=tuple(parts), questions=questions, depth=depth)


def mm_middle_questions(
    *,
    num_tokens: int,
    depth: float,
    seed: int,
    haystack: Haystack,
    measure: Measure,
    num_questions: int = 4,
    num_distractors: int = 4,
    fps: float = 2.0,
    is_held_out: bool = False,
) -> Script:
    """MM-NIAH with several needles, asked for one by one between frames and documents that go on after the last.

    Args and errors as of `mm_niah`; `depth` is the needle's place in what precedes its question.
    """
    rng = np.random.default_rng([seed, 5])
    cards = draw_cards(num_questions + num_distractors, rng, is_held_out=is_held_out)
    questions_and_texts = [choose(card, rng, after_part=None, depth=depth) for card in cards[:num_questions]]
    texts = [text for _, text in questions_and_texts]
    documents = draw_documents(int(TEXT_FRACTION * num_tokens) - sum(map(measure.count, texts)), rng, measure)
    # Every document, question and image cuts the video once more; each piece has two marks.
    marks = 2 * (len(documents) + len(texts) + len(cards) + 1)
    others: list[ScriptPart] = [*texts, *documents, *map(still, cards)]
    num_grids = measure.grids_in(num_tokens - marks, min_grids=4 * len(cards), others=others)
    stops = _stops(num_questions, num_grids)
    places = [round(depth * (stop - 1)) for stop in stops] + rng.integers(0, num_grids, num_distractors).tolist()
    events = [(2 * place, [still(card)]) for place, card in zip(places, cards, strict=True)]
    events += [(2 * int(rng.integers(0, num_grids)), [text]) for text in documents]
    events += [(2 * stop, [text]) for stop, text in zip(stops, texts, strict=True)]  # after a document, before a frame
    frames = blank_video(2 * num_grids, haystack, rng)
    parts = interleave(frames, fps, sorted(events, key=lambda event: event[0]))
    questions = tuple(
        dataclasses.replace(question, after_part=parts.index(text)) for question, text in questions_and_texts
    )
    return Script(parts=tuple(parts), questions=questions, depth=depth)


def matching_frames(
    *,
    num_tokens: int,
    depth: float,
    seed: int,
    haystack: Haystack,
    measure: Measure,
    num_questions: int = 4,
    num_distractors: int = 4,
    fps: float = 2.0,
    is_held_out: bool = False,
) -> Script:
    """Pictures with a digit on them in a video; some come again without, and the question is which digit was there.

    Args and errors as of `v_niah`; `depth` is the place of the picture's first coming in what precedes its second.
    """
    rng = np.random.default_rng([seed, 3])
    others: list[ScriptPart] = [MATCHING_QUESTION, still(Card(colour=0, image=0))] * num_questions
    frames, stops, answers = _returning_pictures(
        num_tokens,
        depth,
        rng,
        haystack,
        measure,
        others,
        counts=(num_questions, num_distractors),
        is_held_out=is_held_out,
    )
    parts = interleave(frames, fps, [(2 * stop, [MATCHING_QUESTION]) for stop in stops])
    places = [i for i, part in enumerate(parts) if isinstance(part, str)]
    questions = tuple(
        Question(choices=DIGITS, answer=answer, after_part=place, depth=depth)
        for place, answer in zip(places, answers, strict=True)
    )
    return Script(parts=tuple(parts), questions=questions, depth=depth)


def silent_matching(
    *,
    num_tokens: int,
    depth: float,
    seed: int,
    haystack: Haystack,
    measure: Measure,
    num_questions: int = 4,
    num_distractors: int = 4,
    fps: float = 2.0,
    is_held_out: bool = False,
) -> Script:
    """The same without a word: one video, and the last token of each picture that comes again tells its digit.

    So a row of video must look far back, and no row of text can do it in its place. Only a model that was trained to
    predict what a picture shows, as the small one is, can answer it.

    Args and errors as of `v_niah`; `depth` as of `matching_frames`.
    """
    rng = np.random.default_rng([seed, 4])
    frames, stops, answers = _returning_pictures(
        num_tokens, depth, rng, haystack, measure, [], counts=(num_questions, num_distractors), is_held_out=is_held_out
    )
    questions = tuple(
        Question(choices=DIGITS, answer=answer, after_part=0, after_frames=2 * stop, depth=depth)
        for stop, answer in zip(stops, answers, strict=True)
    )
    return Script(parts=(Clip(frames=frames, fps=fps),), questions=questions, depth=depth)


def _returning_pictures(
    num_tokens: int,
    depth: float,
    rng: np.random.Generator,
    haystack: Haystack,
    measure: Measure,
    others: list[ScriptPart],
    *,
    counts: tuple[int, int],
    is_held_out: bool,
) -> tuple[Frames, list[int], list[int]]:
    """A video of pictures with digits, some of which come again without.

    Args:
        others: what else the prompt holds.
        counts: pictures that come again, and others.

    Returns:
        the frames; after how many pairs of frames each has come again; and the digits they had.
    """
    num_questions, num_pictures = counts[0], sum(counts)
    pictures = unmarked(haystack.stills(num_pictures, rng))
    images = draw_digits(rng.integers(0, 10, num_pictures), rng, is_held_out=is_held_out)
    num_grids = measure.grids_in(num_tokens, min_grids=4 * num_pictures, others=others)
    frames = blank_video(2 * num_grids, haystack, rng)
    stops = _stops(num_questions, num_grids)
    taken = {stop - 1 for stop in stops}
    for i in range(num_pictures):
        is_needle = i < num_questions
        target = round(depth * (stops[i] - 2)) if is_needle else int(rng.integers(num_grids))
        first = free_grid(target, taken, stops[i] - 1 if is_needle else num_grids)
        frames[2 * first : 2 * first + 2] = pictures[i]
        frames[2 * first : 2 * first + 2, DIGIT] = images[i]
        if is_needle:
            frames[2 * stops[i] - 2 : 2 * stops[i]] = pictures[i]
    return frames, stops, [int(digit_labels()[image]) for image in images[:num_questions]]


def _stops(num_questions: int, num_grids: int) -> list[int]:
    """Pairs of frames that precede each question."""
    return [round(fraction * num_grids) for fraction in np.linspace(FIRST, LAST, num_questions)]
