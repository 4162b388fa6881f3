"""Sample: one prompt, and the questions in it with the rows whose logits answer them."""

import dataclasses
from collections.abc import Sequence

from models.media.image import Image
from models.media.video import Video


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A multiple-choice question; the answer given is the choice whose token has the largest logit at one row.

    Fields:
        choices: the answers offered, each a single token of the model's tokenizer.
        answer: index of the right one.
        after_part: the answer is predicted by the token that ends this part of the prompt (a text's last token, the
            end mark of an image or video); None for the prompt's last token.
        after_frames: the part is a video, and the answer is predicted within it, by the last token of so many of its
            frames, or of the temporal patch that holds them; None for the part's end.
        depth: how far back the needle is: its place as a fraction of what precedes the question, 0 first, 1 last.
    """

    choices: tuple[str, ...]
    answer: int
    after_part: int | None = None
    after_frames: int | None = None
    depth: float

    def __post_init__(self):
        """Checks that the answer is one of at least two different choices, and the depth a fraction."""
        if len(set(self.choices)) != len(self.choices) or len(self.choices) < 2:
            raise ValueError(f"a question needs two or more different choices, got {self.choices}")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"the answer must be one of the choices: 0 <= {self.answer} < {len(self.choices)}")
        if not 0 <= self.depth <= 1:
            raise ValueError(f"a depth is a fraction from 0 to 1, got {self.depth}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt with its questions.

    Fields:
        parts: text, images and videos in the order the model reads them; what `Processor` takes.
        questions: at least one.
        depth: where the needle is, as a fraction of the prompt, 0 first, 1 last; of the first question if several.
        num_frames: video frames and images in the prompt.
    """

    parts: tuple[str | Image | Video, ...]
    questions: tuple[Question, ...]
    depth: float
    num_frames: int

    def __post_init__(self):
        """Checks that there is something to ask, after a part that exists."""
        check_questions(self.questions, [p.num_frames if isinstance(p, Video) else 0 for p in self.parts])


def check_questions(questions: tuple[Question, ...], num_frames: Sequence[int]) -> None:
    """Raises ValueError unless there are questions, each after a part of the prompt or within one that is a video.

    Args:
        num_frames: of every part; 0 for what is no video.
    """
    if not questions:
        raise ValueError("a sample must ask a question, got none")
    for question in questions:
        if question.after_part is not None and not 0 <= question.after_part < len(num_frames):
            raise ValueError(f"a question must follow one of the {len(num_frames)} parts, got {question.after_part=}")
        max_frames = 0 if question.after_part is None else num_frames[question.after_part]
        if question.after_frames is not None and not max_frames:
            raise ValueError(f"after_frames needs after_part to name a video, got {question.after_part=}")
        if question.after_frames is not None and not 1 <= question.after_frames <= max_frames:
            raise ValueError(
                f"a question within a video must follow 1 to {max_frames} of its frames, got {question.after_frames=}"
            )
