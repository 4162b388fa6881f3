"""Rows of the logits that answer the questions of a sample, and the tokens of their choices."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from models.huggingface.tokenizer import Tokenizer
from models.interface import Processor
from models.media.image import Image
from models.media.video import Video
from models.tasks.sample import Question, Sample


def question_rows(sample: Sample, processor: Processor) -> Int32[np.ndarray, " n"]:
    """For each question of the sample the row, in the sample's prompt, of the token that predicts its answer."""
    ends, num_tokens = part_ends(sample.parts, processor)
    return answer_rows(sample.questions, sample.parts, ends, num_tokens, processor)


def answer_rows(
    questions: Sequence[Question],
    parts: Sequence[str | Image | Video],
    ends: np.ndarray,
    num_tokens: int,
    processor: Processor,
) -> Int32[np.ndarray, " n"]:
    """The same, given the result of `part_ends`; no pixels are read."""

    def row(question: Question) -> int:
        if question.after_part is None:
            return num_tokens - 1
        end, part = int(ends[question.after_part]), parts[question.after_part]
        if question.after_frames is None:
            return end
        assert isinstance(part, Video), "checked by the sample"
        length, num_grids = processor.num_tokens(part), processor.grid(part)[0]
        grids_seen = -(-question.after_frames // processor.temporal_patch_len)
        return end - length + length // num_grids * grids_seen - 1

    return np.array(list(map(row, questions)), np.int32)


def choice_ids(question: Question, tokenizer: Tokenizer) -> Int32[np.ndarray, " c"]:
    """The token of every choice.

    Raises:
        ValueError: a choice is not one token.
    """
    encoded = [tokenizer.encode(choice) for choice in question.choices]
    if long := [c for c, ids in zip(question.choices, encoded, strict=True) if len(ids) != 1]:
        raise ValueError(f"a choice must be a single token of the model's tokenizer, got {long} among the choices")
    return np.concatenate(encoded)


def part_ends(parts: Sequence[str | Image | Video], processor: Processor) -> tuple[Int32[np.ndarray, " n"], int]:
    """The row of the last token of every part, end marks of media included, and the tokens of the whole prompt.

    A text of two tokens, an image of four (S, E its marks), a text of one, after three tokens of the chat template:

        . . . a b S i i i i E c . .      ->      4, 10, 11 of 14

    Raises:
        ValueError: the last token of a text also holds characters after it.
    """
    text = processor.render(parts)
    encoding = processor.tokenizer.backend.encode(text, add_special_tokens=False)
    stops = np.array([stop for _, stop in encoding.offsets])
    media = [part for part in parts if not isinstance(part, str)]
    is_pad = np.isin(encoding.ids, processor.placeholders)
    repeats = np.ones(len(stops), np.int64)
    repeats[is_pad] = [processor.num_tokens(part) for part in media]
    last_row = np.cumsum(repeats) - 1
    ends, done, pads = [], 0, iter(np.flatnonzero(is_pad))
    for part in parts:
        if isinstance(part, str):
            done = text.index(part, done) + len(part)
            token = int(np.searchsorted(stops, done))
            if stops[token] != done:
                raise ValueError(
                    f"a text must end where a token ends: {part[-20:]!r} goes on as {text[done : done + 9]!r}"
                )
        else:
            token = int(next(pads)) + 1
            done = int(stops[token])
        ends.append(last_row[token])
    return np.array(ends, np.int32), int(last_row[-1]) + 1
