"""Accuracy of the small model by task, length and depth, dense, many samples at a time."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int32

from models.interface import Model
from models.small.bank import Bank, make_bank
from models.small.config import small_measure, small_processor
from models.small.forward import Compute, row_logits
from models.small.loader import Loader
from models.small.stream import Batch, empty_batch, stack_streams, stream
from models.tasks import TASKS, GeneratedHaystack
from models.tasks.rows import choice_ids
from pallas_kernels.pytree import pytree

MAX_QUESTIONS = 8
"""Maximum number of questions in a sample."""
MAX_CHOICES = 10
"""Maximum number of choices of a question."""


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
    choices = np.zeros((cell.num_samples, MAX_QUESTIONS, MAX_CHOICES), np.int32)
    answer = np.full((cell.num_samples, MAX_QUESTIONS), -1, np.int32)
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
        assert len(streams[-1].row.tokens) <= cell.num_tokens and len(script.questions) <= MAX_QUESTIONS
        for place, question in enumerate(script.questions):
            ids = choice_ids(question, processor.tokenizer)
            choices[number, place] = np.pad(ids, (0, MAX_CHOICES - len(ids)), mode="edge")
            answer[number, place] = question.answer
    batch = stack_streams(streams, num_tokens=cell.num_tokens, num_rows=MAX_QUESTIONS)
    return CellBatch(batch=batch, choices=choices, answer=answer)


def _empty_cell(num_samples: int, num_tokens: int) -> CellBatch:
    """A cell's batch of this shape, nothing in it."""
    return CellBatch(
        batch=empty_batch(num_samples, num_tokens, MAX_QUESTIONS),
        choices=np.zeros((num_samples, MAX_QUESTIONS, MAX_CHOICES), np.int32),
        answer=np.zeros((num_samples, MAX_QUESTIONS), np.int32),
    )


def evaluate(
    model: Model,
    cells: Iterable[Cell],
    *,
    compute: Compute,
    num_workers: int = 0,
    on_cell: Callable[[dict], None] = lambda result: None,
) -> Iterator[dict]:
    """For each cell its fields, the number of questions, and how many were answered rightly.

    Every shape of cell is a program; all are compiled at once in threads, in the order of the cells.
    """
    bank = make_bank()
    graphdef, params = nnx.split(model)
    cells = list(cells)

    def count_right(params, cells: CellBatch, bank: Bank):
        logits = row_logits(nnx.merge(graphdef, params), cells.batch, bank, compute)
        chosen = jnp.argmax(jnp.take_along_axis(logits, cells.choices, axis=-1), axis=-1)
        return jnp.sum((chosen == cells.answer) & (cells.answer >= 0)), jnp.sum(cells.answer >= 0)

    def compiled(shape: tuple[int, int]):
        return jax.jit(count_right).lower(*jax.eval_shape(lambda *x: x, params, _empty_cell(*shape), bank)).compile()

    with ThreadPoolExecutor(4) as compiler, Loader(cell_batch, cells, num_workers) as batches:
        shapes = dict.fromkeys((cell.num_samples, cell.num_tokens) for cell in cells)
        programs = {shape: compiler.submit(compiled, shape) for shape in shapes}
        for cell, inputs in zip(cells, batches, strict=True):
            program = programs[cell.num_samples, cell.num_tokens].result()
            num_right, num_questions = program(params, jax.tree.map(jnp.asarray, inputs), bank)
            result = dataclasses.asdict(cell) | {"num_questions": int(num_questions), "num_right": int(num_right)}
            on_cell(result)
            yield result
