"""Training data of the small model: streams of video, documents and many questions, short ones first."""

import dataclasses

import numpy as np

from models.small.config import GRID_TOKENS, small_measure, small_processor
from models.small.stream import Batch, empty_batch, stack_streams, stream
from models.tasks.cards import Card, draw_cards, draw_digits, show, still
from models.tasks.digits import digit_labels, distorted
from models.tasks.haystack import GeneratedHaystack
from models.tasks.niah import choose
from models.tasks.pictures import COLOURS
from models.tasks.sample import Question
from models.tasks.script import DIGIT, Clip, Frames, Script, ScriptPart, unmarked
from models.tasks.text import DIGITS, MATCHING_QUESTION, document, options

TOKENS_PER_LABEL = 10
"""Tokens of a batch for each label that it can hold."""
AGAIN_FRACTION = 0.4
"""Pictures that come again within a video, for every card or picture that is new."""
MIN_SEEN = 4
"""Cards, or pictures, that must have come before one is asked for. Where few have come, attending to any of them is
right so often that the model learns to pick one with certainty, and then learns nothing more: see docs/log.md."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """So many steps at one length of stream; `batch` streams a step."""

    num_tokens: int
    batch: int
    num_steps: int

    @property
    def num_rows(self) -> int:
        """Maximum number of labels of a stream."""
        return max(32, self.num_tokens // TOKENS_PER_LABEL)

    def empty_batch(self) -> Batch:
        """A batch of this stage's shapes."""
        return empty_batch(self.batch, self.num_tokens, self.num_rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Stages one after another, and the seed of all they show; step n is the same batch whenever it is asked for."""

    stages: tuple[Stage, ...]
    seed: int = 0

    @property
    def num_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.num_steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        for stage in self.stages_from(step):
            return stage
        raise ValueError(f"the curriculum has {self.num_steps} steps, step {step} lies behind them")

    def ends_stage(self, step: int) -> bool:
        """Whether the step is the last of a stage that another follows."""
        return step + 1 < self.num_steps and len(self.stages_from(step + 1)) < len(self.stages_from(step))

    def batch(self, step: int) -> Batch:
        """The streams of a step."""
        stage = self.stage(step)
        rngs = [np.random.default_rng([self.seed, step, number]) for number in range(stage.batch)]
        processor = small_processor()
        streams = [stream(training_script(stage.num_tokens, rng), processor, answers_end=True) for rng in rngs]
        return stack_streams(streams, num_tokens=stage.num_tokens, num_rows=stage.num_rows)

    def stages_from(self, step: int) -> tuple[Stage, ...]:
        """The stages that have steps left from `step` on."""
        ends = np.cumsum([stage.num_steps for stage in self.stages])
        return tuple(stage for stage, end in zip(self.stages, ends, strict=True) if end > step)


def training_script(num_tokens: int, rng: np.random.Generator) -> Script:
    """A stream of about `num_tokens` tokens: video in pieces, cards and pictures in it, text, and questions.

    How long the pieces are, how many cards there are, and how much text stands between differs from stream to stream,
    from one long video with all questions at its end to questions after every few frames.

    A few are longer, by up to 181 tokens as far as seen, and `stack_streams` cuts off their end, the last question's
    place: 35 of 2,560 of the recipe's streams of 1,024 tokens, 6 of 880 longer ones. The tokens of cards
    that come as images before a clip are not subtracted from its length, and a last question comes even where no tokens
    are left for it. The weights in models/assets/small were trained on just these streams: a change here makes others.
    """
    builder = _Builder(num_tokens, rng)
    while builder.tokens_left > builder.reserve + 3 * GRID_TOKENS:
        builder.add_clip()
        builder.add_text()
        builder.add_questions()
    return builder.finish()


class _Builder:
    """A training stream while it grows; `tokens_left` counts down from its length."""

    def __init__(self, num_tokens: int, rng: np.random.Generator):
        self.rng, self.haystack = rng, GeneratedHaystack()
        self.measure = small_measure()
        num_grids = num_tokens // GRID_TOKENS
        self.tokens_left = num_tokens - self.measure.frame - 8
        self.parts: list[ScriptPart] = []
        self.questions: list[Question] = []
        self.fps = float(rng.choice([0.5, 1.0, 2.0, 4.0], p=[0.1, 0.2, 0.5, 0.2]))
        self.piece_grids = _log_uniform(
            2.0, float(max(num_grids, 4) if rng.random() < 0.3 else max(num_grids / 8, 6)), rng
        )
        self.text_fraction = float(rng.choice([0.0, 0.1, 0.25], p=[0.4, 0.2, 0.4]))
        self.density = min(0.6, _log_uniform(12.0, 48.0, rng) / num_grids)
        self.still_fraction = float(rng.choice([0.0, 0.3, 1.0]))
        self.max_questions = int(rng.integers(2, 7))
        self.num_final_questions = round(_log_uniform(1.0, float(np.clip(num_tokens / 100, 6, 64)), rng))
        self.reserve = min(24 * self.num_final_questions + 48, num_tokens // 4)
        max_needles = int(min(48, max(2, num_grids * 0.4)))
        cards = draw_cards(min(max_needles, len(COLOURS)), rng, is_held_out=False)
        images = distorted(np.array([card.image for card in cards]), rng)
        self.cards = [dataclasses.replace(c, image=int(i)) for c, i in zip(cards, images, strict=True)]
        self.pictures = unmarked(self.haystack.stills(max_needles, rng))
        self.images = distorted(draw_digits(rng.integers(0, 10, max_needles), rng, is_held_out=False), rng)
        self.pictures[:, DIGIT] = self.images
        self.num_cards = self.num_pictures = 0
        self.text_debt = 0.0

    def add_clip(self) -> None:
        """A piece of video in which new cards and pictures may come, and pictures again without their digits."""
        max_grids = (self.tokens_left - self.reserve - 2) // GRID_TOKENS
        length = int(np.clip(round(self.rng.exponential(self.piece_grids)), 1, max_grids))
        frames = unmarked(self.haystack.shots(2 * length, self.rng))
        is_first = self.num_cards + self.num_pictures == 0
        count = min(max(int(self.rng.poisson(self.density * length)), int(is_first)), length)
        num_seen = self.num_pictures
        again = int(self.rng.poisson(AGAIN_FRACTION * self.density * length)) if num_seen >= MIN_SEEN else 0
        grids = self.rng.permutation(length)[: count + again].tolist()
        for grid in sorted(grids[:count]):
            self._put_needle(frames, grid, may_last=grid + 2 < length and not {grid + 1, grid + 2} & set(grids))
        for grid in grids[count:]:
            self._put_again(frames, grid, num_seen)
        self.parts.append(Clip(frames=frames, fps=self.fps))
        self._spend(2 + GRID_TOKENS * length)

    def _put_needle(self, frames: Frames, grid: int, *, may_last: bool) -> None:
        """A new card or marked picture at a pair of frames, or a card as an image behind the clip before this one."""
        wants_picture = self.rng.random() < 0.5
        if wants_picture and self.num_pictures < len(self.pictures):
            frames[2 * grid : 2 * grid + 2] = self.pictures[self.num_pictures]
            self.num_pictures += 1
        elif self.num_cards < len(self.cards):
            card = self.cards[self.num_cards]
            self.num_cards += 1
            if self.rng.random() < self.still_fraction:
                self.parts.append(still(card))
                self._spend(2 + GRID_TOKENS)
            elif not may_last or self.rng.random() < 0.6:
                show(frames, card, 2 * grid)
            else:  # longer, and not in step with the pairs
                show(frames, card, 2 * grid + int(self.rng.integers(2)), 3 + int(self.rng.integers(2)))

    def _put_again(self, frames: Frames, grid: int, num_seen: int) -> None:
        """One of the first `num_seen` pictures without its digit, which the last token of this pair of frames tells."""
        frames[2 * grid : 2 * grid + 2] = self.pictures[self.rng.integers(num_seen)]
        frames[2 * grid : 2 * grid + 2, DIGIT] = -1

    def add_text(self) -> None:
        """A document, if text is due."""
        if self.text_debt > 60 and self.tokens_left > self.reserve + 160:
            text = document(int(self.rng.integers(1, 7)), self.rng)
            self.parts.append(text)
            cost = self.measure.count(text)
            self._spend(cost)
            self.text_debt -= 4 / 3 * cost

    def add_questions(self) -> None:
        """A few questions; one about a picture first, which has to come again for it."""
        count = int(self.rng.integers(0, self.max_questions + 1))
        if (
            count
            and self.num_pictures >= MIN_SEEN
            and self.rng.random() < 0.75
            and self.tokens_left > self.reserve + 40
        ):
            self._ask_for_picture()
        for _ in range(count - 1):
            if self.tokens_left > self.reserve:
                self._ask_for_card(is_last=False)

    def _ask_for_picture(self) -> None:
        chosen = int(self.rng.integers(self.num_pictures))
        frames = np.repeat(self.pictures[chosen : chosen + 1], 2, axis=0)
        frames[:, DIGIT] = -1
        if isinstance(self.parts[-1], Clip):
            joined = np.concatenate([self.parts[-1].frames, frames])
            self.parts[-1] = dataclasses.replace(self.parts[-1], frames=joined)
        else:
            self.parts.append(Clip(frames=frames, fps=self.fps))
            self._spend(2)
        self.parts.append(MATCHING_QUESTION)
        digit = int(digit_labels()[self.images[chosen]])
        self.questions.append(Question(choices=DIGITS, answer=digit, after_part=len(self.parts) - 1, depth=0.0))
        self._spend(GRID_TOKENS + self.measure.count(MATCHING_QUESTION))

    def _ask_for_card(self, *, is_last: bool) -> None:
        """The question for a card that came; half of the time with digits to choose from."""
        if self.num_cards < MIN_SEEN:
            return
        card: Card = self.cards[int(self.rng.integers(self.num_cards))]
        has_options = self.rng.random() < 0.4
        question, text = choose(card, self.rng, after_part=None, depth=0.0)
        self.parts.append(card.question)
        place = len(self.parts) - 1
        self.questions.append(card.ask(after_part=place, depth=0.0))
        if has_options:
            self.parts.append(text.removeprefix(card.question))
            self.questions.append(dataclasses.replace(question, after_part=place + 1))
        if is_last:
            last = question if has_options else card.ask(after_part=None, depth=0.0)
            self.questions.append(dataclasses.replace(last, after_part=None))
        self._spend(self.measure.count(card.question) + has_options * self.measure.count(options((0, 1, 2, 3))))

    def finish(self) -> Script:
        """The whole, with questions at its end."""
        for number in range(self.num_final_questions):
            is_last = self.tokens_left < 2 * 48 or number == self.num_final_questions - 1
            self._ask_for_card(is_last=is_last)
            if is_last:
                break
        if not self.questions:  # too few came: the one picture or card there is
            self._ask_for_any()
        return Script(parts=tuple(self.parts), questions=tuple(self.questions), depth=0.0)

    def _ask_for_any(self) -> None:
        """A question for what little came."""
        if self.num_pictures:
            self._ask_for_picture()
            return
        if not self.num_cards:
            self.parts.append(still(self.cards[0]))
            self.num_cards = 1
        card = self.cards[int(self.rng.integers(self.num_cards))]
        self.parts.append(card.question)
        self.questions.append(card.ask(after_part=None, depth=0.0))

    def _spend(self, num_tokens: int) -> None:
        self.tokens_left -= num_tokens
        self.text_debt += num_tokens * self.text_fraction


def _log_uniform(low: float, high: float, rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
