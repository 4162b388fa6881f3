"""Item: one question about one video, and the prompt that asks it."""

import dataclasses
from pathlib import Path

from models.media.video import Video
from models.tasks.sample import Question, Sample

LETTERS = "ABCDEFGHIJ"
ASK_FOR_LETTER = "Answer with the option's letter from the given choices directly."
ASK_FOR_WORDS = "Answer the question using a single word or phrase."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One question.

    Fields:
        name: unique in its set.
        video: the file.
        question: as published.
        options: the answers offered, without letters; empty for an open question.
        answer: the right option's number, or the right words.
        kind: the set's own category, by which scores are split.
    """

    name: str
    video: Path
    question: str
    options: tuple[str, ...]
    answer: int | str
    kind: str

    def __post_init__(self):
        """Checks that the answer is one of the options, or text where there are none."""
        is_number = isinstance(self.answer, int)
        if bool(self.options) != is_number:
            raise ValueError(f"{self.name}: a question with options is answered by a number, others by text")
        if is_number and not 0 <= int(self.answer) < len(self.options):
            raise ValueError(f"{self.name}: the answer must be one of {len(self.options)} options, got {self.answer}")
        if not 2 <= len(self.options or "no") <= len(LETTERS):
            raise ValueError(f"{self.name}: a question offers 2 to {len(LETTERS)} options, got {len(self.options)}")


def text(item: Item) -> str:
    """The question as it is asked, the options under letters."""
    if not item.options:
        return f"{item.question}\n{ASK_FOR_WORDS}"
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, item.options, strict=False)]
    return "\n".join([item.question, *lines, ASK_FOR_LETTER])


def parts(item: Item, video: Video) -> list[str | Video]:
    """The prompt of any item: the video, then the question."""
    return [video, text(item)]


def sample(item: Item, video: Video) -> Sample:
    """A multiple-choice item as a sample, answered by the letter with the largest logit after the prompt.

    Where in the video the answer stands is unknown: the depth is 0.
    """
    question = Question(choices=tuple(LETTERS[: len(item.options)]), answer=int(item.answer), depth=0.0)
    return Sample(parts=tuple(parts(item, video)), questions=(question,), depth=0.0, num_frames=video.num_frames)
