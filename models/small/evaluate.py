"""Accuracy of the small model by task, length and depth, dense, many samples at a time."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int32

from models.qwen2_5_vl.model import Qwen2_5_VL
from models.small.bank import make_bank
from models.small.config import small_measure, small_processor
from models.small.forward import Compute, row_logits
from models.small.loader import Loader
from models.small.stream import Batch, stack_streams, stream
from models.tasks import TASKS, GeneratedHaystack
from models.tasks.rows import choice_ids
from pallas_kernels.pytree import pytree

MOST_QUESTIONS = 8
"""Questions in a sample, at most."""
MOST_CHOICES = 10
"""Answers offered by a question, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """Samples of one task, length and depth that are run together; their seeds count up from `first_seed`."""

    task: str
    num_tokens: int
    depth: float
    first_seed: int
    num_samples: int
    is_held_out: bool
    fps: float = 2.0


@pytree
class CellBatch:
    """A cell's streams, and for every question the tokens of its choices (the first again in padding), and the answer.

    `answer` is -1 where a stream has no such question.
    """

    batch: Batch
    choices: Int32[np.ndarray, "b r c"]
    answer: Int32[np.ndarray, "b r"]


def cell_batch(cell: Cell) -> CellBatch:
    """The samples of a cell; the same for the same seeds."""
    processor, streams = small_processor(), []
    choices = np.zeros((cell.num_samples, MOST_QUESTIONS, MOST_CHOICES), np.int32)
    answer = np.full((cell.num_samples, MOST_QUESTIONS), -1, np.int32)
    for number in range(cell.num_samples):
        script = TASKS[cell.task](
            num_tokens=cell.num_tokens,
            depth=cell.depth,
            seed=cell.first_seed + number,
            haystack=GeneratedHaystack(),
            measure=small_measure(),
            is_held_out=cell.is_held_out,
            fps=cell.fps,
        )
        streams.append(stream(script, processor))
        assert len(streams[-1].row.tokens) <= cell.num_tokens and len(script.questions) <= MOST_QUESTIONS
        for place, question in enumerate(script.questions):
            ids = choice_ids(question, processor.tokenizer)
            choices[number, place] = np.pad(ids, (0, MOST_CHOICES - len(ids)), mode="edge")
            answer[number, place] = question.answer
    batch = stack_streams(streams, num_tokens=cell.num_tokens, num_rows=MOST_QUESTIONS)
    return CellBatch(batch=batch, choices=choices, answer=answer)


def evaluate(
    model: Qwen2_5_VL, cells: Iterable[Cell], *, compute: Compute, num_workers: int = 0,
    on_cell: Callable[[dict], None] = lambda result: None,
) -> Iterator[dict]:  # fmt: skip
    """For each cell its fields, the number of questions, and how many were answered rightly."""
    bank = make_bank()
    graphdef, params = nnx.split(model)
    cells = list(cells)

    @functools.partial(jax.jit)
    def num_right(params, made: CellBatch):
        logits = row_logits(nnx.merge(graphdef, params), made.batch, bank, compute)
        chosen = jnp.argmax(jnp.take_along_axis(logits, made.choices, axis=-1), axis=-1)
        return jnp.sum((chosen == made.answer) & (made.answer >= 0)), jnp.sum(made.answer >= 0)

    with Loader(cell_batch, cells, num_workers) as batches:
        for cell, made in zip(cells, batches, strict=True):
            right, asked = num_right(params, jax.tree.map(jnp.asarray, made))
            result = dataclasses.asdict(cell) | {"num_questions": int(asked), "num_right": int(right)}
            on_cell(result)
            yield result
