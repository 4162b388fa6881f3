"""Streams: scripts as the arrays that a training step reads; no pixels, which the device paints itself."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float32, Int32

from mmi_jax.layout import VISION, concatenate, text_tokens
from models.huggingface.tokenizer import Tokenizer
from models.interface import Processor
from models.media.image import Image
from models.media.video import Video
from models.prompt import TokenizedPrompt
from models.small.config import GRID_TOKENS, colour_tokens
from models.tasks.digits import SIDE, digit_labels
from models.tasks.rows import answer_rows, part_ends
from models.tasks.sample import Question
from models.tasks.script import COLOUR, NUM_BASE, Clip, Frames, Script, ScriptPart
from models.tasks.script import DIGIT as SHOWN
from models.tasks.text import LETTERS, MATCHING_QUESTION
from pallas_kernels.pytree import pytree

CAPTION_WEIGHT = 0.3
"""Weight of the labels on a card's last tokens, where that of a question is 1."""
END_WEIGHT = 0.1
"""Weight of the token that ends the answer."""
KINDS = ("caption", "digit", "letter", "match", "silent")
"""Labels: what a picture shows or which option is right, and answers: a card's digit, a letter, a picture's digit, and
the same at the picture's last token when it comes again."""
CAPTION, DIGIT, LETTER, MATCH, SILENT = range(len(KINDS))
COLOUR_BEFORE = 2
"""Tokens from the colour in a card's question to the question mark, where the digit is a label already."""
OPTION_TOKENS = 5
"""Tokens of an option such as ` A: 3,`."""


@pytree
class Batch:
    """Streams padded at their end to one length.

    Fields:
        tokens, rope_pos: as of a `Prompt`.
        is_vision: which tokens are rows of the vision tower's output, in order.
        frames: what every video frame shows, in pairs; zeros in padding.
        rows: tokens that predict a label.
        labels: the token to predict; weight 0 in padding.
        weights: of the label in the loss.
        kind: which of `KINDS` a label is; 0 in padding too.
    """

    tokens: Int32[np.ndarray, "b t"]
    rope_pos: Int32[np.ndarray, "3 b t"]
    is_vision: Bool[np.ndarray, "b t"]
    frames: Int32[np.ndarray, "b f 7"]
    rows: Int32[np.ndarray, "b r"]
    labels: Int32[np.ndarray, "b r"]
    weights: Float32[np.ndarray, "b r"]
    kind: Int32[np.ndarray, "b r"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """One script in arrays; fields as of a `Batch`, unpadded."""

    row: TokenizedPrompt
    frames: Frames
    rows: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    kind: np.ndarray


def stream(script: Script, processor: Processor, *, answers_end: bool = False) -> Stream:
    """The script as the small model reads it, with the questions' answers and the cards' captions as labels.

    Args:
        script: over generated frames.
        processor: the small model's.
        answers_end: the answer to the question at the prompt's end follows, and the token that ends an answer.
    """
    parts = [_stand_in(part) for part in script.parts]
    row = processor.tokenize(parts)
    ends, num_tokens = part_ends(parts, processor)
    frames = [part.frames for part in script.parts if not isinstance(part, str)]
    frames = np.concatenate([f if len(f) % 2 == 0 else np.concatenate([f, f[-1:]]) for f in frames])
    places = answer_rows(script.questions, parts, ends, num_tokens, processor).tolist()
    answers = [(place, _answer(q, processor.tokenizer)) for place, q in zip(places, script.questions, strict=True)]
    labels = [(*answer, 1.0, _kind(q, script)) for answer, q in zip(answers, script.questions, strict=True)]
    silent = _silent_answers(row, frames, processor.tokenizer)
    labels += [(*answer, 1.0, SILENT) for answer in silent if answer not in answers]
    captions = _captions(row, frames, processor.tokenizer) + _options(script, ends, processor.tokenizer)
    for (place, token), question in zip(answers, script.questions, strict=True):
        if _kind(question, script) == DIGIT and question.after_part is not None:
            captions.append((place - COLOUR_BEFORE, token))
    labels += [(place, token, CAPTION_WEIGHT, CAPTION) for place, token in captions]
    if answers_end and answers[-1][0] == num_tokens - 1:
        end = processor.tokenizer.token_id("<|im_end|>")
        row = _append(row, (answers[-1][1], end))
        labels.append((num_tokens, end, END_WEIGHT, CAPTION))
    places, tokens, weights, kind = zip(*labels, strict=True)
    return Stream(
        row=row,
        frames=frames,
        rows=np.array(places, np.int32),
        labels=np.array(tokens, np.int32),
        weights=np.array(weights, np.float32),
        kind=np.array(kind, np.int32),
    )


def stack_streams(streams: list[Stream], *, num_tokens: int, num_rows: int) -> Batch:
    """The streams padded or cut to `num_tokens` tokens, and to `num_rows` labels, of which the first are kept.

    Labels of questions come first, so that those cut off are captions: in 81 of 2,560 streams of 1,024 tokens of the
    recipe, 3 of 640 of 4,096, none of 240 longer ones. With those that are cut at their end (see `training_script`),
    half a percent of the labels' weight is lost at 1,024 tokens.
    """

    def fitted(arrays: list[np.ndarray], length: int) -> np.ndarray:
        out = np.zeros((len(arrays), length, *arrays[0].shape[1:]), arrays[0].dtype)
        for row, array in zip(out, arrays, strict=True):
            row[: len(array)] = array[:length]
        return out

    is_inside = [s.rows < num_tokens for s in streams]
    return Batch(
        tokens=fitted([s.row.tokens for s in streams], num_tokens),
        rope_pos=np.moveaxis(fitted([s.row.rope_pos.T for s in streams], num_tokens), -1, 0),
        is_vision=fitted([np.asarray(s.row.layout.modality) == VISION for s in streams], num_tokens),
        frames=fitted([s.frames for s in streams], 2 * (num_tokens // GRID_TOKENS)),
        rows=fitted([s.rows[k] for s, k in zip(streams, is_inside, strict=True)], num_rows),
        labels=fitted([s.labels[k] for s, k in zip(streams, is_inside, strict=True)], num_rows),
        weights=fitted([s.weights[k] for s, k in zip(streams, is_inside, strict=True)], num_rows),
        kind=fitted([s.kind[k] for s, k in zip(streams, is_inside, strict=True)], num_rows),
    )


def empty_batch(num_streams: int, num_tokens: int, num_rows: int) -> Batch:
    """A batch of nothing but padding."""
    shape, labels = (num_streams, num_tokens), (num_streams, num_rows)
    return Batch(
        tokens=np.zeros(shape, np.int32),
        rope_pos=np.zeros((3, *shape), np.int32),
        is_vision=np.zeros(shape, bool),
        frames=np.zeros((num_streams, 2 * (num_tokens // GRID_TOKENS), NUM_BASE + 2), np.int32),
        rows=np.zeros(labels, np.int32),
        labels=np.zeros(labels, np.int32),
        weights=np.zeros(labels, np.float32),
        kind=np.zeros(labels, np.int32),
    )


def _stand_in(part: ScriptPart) -> str | Image | Video:
    """The part with one pixel shown everywhere, so that a processor can read its size."""
    if isinstance(part, str):
        return part
    frames = np.broadcast_to(np.zeros((1, 1, 1, 1), np.uint8), (len(part.frames), SIDE, SIDE, 3))
    return Video(frames=frames, fps=part.fps) if isinstance(part, Clip) else Image(pixels=frames[0])


def _answer(question: Question, tokenizer: Tokenizer) -> int:
    return tokenizer.token_id(question.choices[question.answer])  # digits and letters stand for themselves


def _captions(row: TokenizedPrompt, frames: Frames, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """(row, token) of what frames show, at their last tokens: colour and digit."""
    places, pairs, is_shown = _pairs(row, frames)
    names = colour_tokens()
    captions = []
    for grid in np.flatnonzero(is_shown):
        colour, image = pairs[grid, 0, NUM_BASE:]
        captions.append((int(places[grid, -1]), _digit(int(image), tokenizer)))
        if colour >= 0:
            captions.append((int(places[grid, -2]), names[colour]))
    return captions


def _silent_answers(row: TokenizedPrompt, frames: Frames, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """(row, token) of pictures that come again without their digit: at their last token, the digit they had."""
    places, pairs, is_shown = _pairs(row, frames)
    before = {tuple(pair[0, :NUM_BASE]): int(pair[0, SHOWN]) for pair in pairs[is_shown] if pair[0, COLOUR] < 0}
    answers = []
    for grid in np.flatnonzero((pairs[:, :, SHOWN] < 0).all(axis=1) & (pairs[:, 0] == pairs[:, 1]).all(axis=1)):
        if (image := before.get(tuple(pairs[grid, 0, :NUM_BASE]))) is not None:
            answers.append((int(places[grid, -1]), _digit(int(image), tokenizer)))
    return answers


def _pairs(row: TokenizedPrompt, frames: Frames) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens of every pair of frames, what the two show, and whether both show the same digit."""
    places = np.flatnonzero(np.asarray(row.layout.modality) == VISION).reshape(-1, GRID_TOKENS)
    pairs = frames.reshape(-1, 2, frames.shape[1])
    return places, pairs, (pairs[:, 0, SHOWN] >= 0) & (pairs[:, 0, NUM_BASE:] == pairs[:, 1, NUM_BASE:]).all(axis=1)


def _digit(image: int, tokenizer: Tokenizer) -> int:
    """The token of the digit of an image."""
    return tokenizer.token_id(str(digit_labels()[image]))


def _options(script: Script, ends: np.ndarray, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """(row, token) at the digit of every option: its letter if it is right, else the comma that follows it."""
    comma, letters = tokenizer.token_id(","), []
    for question in script.questions:
        if question.choices == LETTERS and question.after_part is not None:
            for number, letter in enumerate(LETTERS):
                place = int(ends[question.after_part]) - 1 - OPTION_TOKENS * (len(LETTERS) - 1 - number)
                letters.append((place, tokenizer.token_id(letter) if number == question.answer else comma))
    return letters


def _kind(question: Question, script: Script) -> int:
    if question.choices == LETTERS:
        return LETTER
    if question.after_part is None:
        return DIGIT
    if question.after_frames is not None:
        return SILENT
    return MATCH if script.parts[question.after_part] == MATCHING_QUESTION else DIGIT


def _append(row: TokenizedPrompt, tokens: tuple[int, ...]) -> TokenizedPrompt:
    """The row with text tokens behind it."""
    steps = row.rope_pos.max() + 1 + np.arange(len(tokens), dtype=np.int32)
    return TokenizedPrompt(
        tokens=np.concatenate([row.tokens, np.array(tokens, np.int32)]),
        rope_pos=np.concatenate([row.rope_pos, np.broadcast_to(steps, (3, len(tokens)))], axis=1).astype(np.int32),
        layout=concatenate([row.layout, text_tokens(len(tokens))]),
        grids=row.grids,
    )
