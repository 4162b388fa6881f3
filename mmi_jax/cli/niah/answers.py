"""Answers of a model to samples, and the cost of their attention."""

import dataclasses
from collections.abc import Sequence

import numpy as np

import mmi_jax
from mmi_jax import Blocks, PatternTable
from mmi_jax.engine.protocols import VisionLanguageModel
from mmi_jax.method.patterns import Pattern
from mmi_jax.method.tables.cost_model import CostModel
from mmi_jax.search.baselines.equal_cost import report_cost
from models import Processor, Prompt
from models.tasks import Question, Sample, choice_ids, question_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Samples as one batch for a prefill.

    Args:
      prompt: of all of them.
      rows: where each question's answer is predicted, `[b, n]`; the last columns repeat the first ones.
      questions: of each sample, with the tokens of their choices.
    """

    samples: tuple[Sample, ...]
    prompt: Prompt
    rows: np.ndarray
    questions: tuple[tuple[tuple[Question, np.ndarray], ...], ...]


def prompt_batches(processor: Processor, samples: Sequence[Sample], *, batch: int, num_rows: int) -> list[PromptBatch]:
    """The samples as batches of at most `batch`.

    Args:
      num_rows: questions of a prefill, so that tasks with fewer use the same program.
    """
    batches = []
    for first in range(0, len(samples), batch):
        group = samples[first : first + batch]
        rows = [np.resize(question_rows(sample, processor), num_rows) for sample in group]
        questions = tuple(tuple((q, choice_ids(q, processor.tokenizer)) for q in s.questions) for s in group)
        prompt = processor(*(list(sample.parts) for sample in group), cuts_on_device=True)
        batches.append(PromptBatch(samples=tuple(group), prompt=prompt, rows=np.stack(rows), questions=questions))
    return batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """Of some samples.

    Args:
      correct: answers that are right.
      questions: that were evaluated.
      cost: of the attention of a prompt, all layers, by the cost model; mean.
      dense_cost: of dense attention.
      density: visited tiles over dense ones, mean over layers and heads.
      prompt_tokens: mean length of the prompts.
    """

    correct: int
    questions: int
    cost: float
    dense_cost: float
    density: float
    prompt_tokens: float


def evaluate(
    model: VisionLanguageModel, batches: Sequence[PromptBatch], table: PatternTable | Pattern | None, costs: CostModel
) -> Answers:
    """Evaluates every question, each answered by the choice with the largest logit at its row.

    Args:
      table: patterns as given: none is replaced by dense attention where that is faster.
    """
    correct, num_questions, totals = 0, 0, []
    for batch in batches:
        result = mmi_jax.prefill(
            model, batch.prompt, table=table, logits_at=batch.rows, measures_recall=False, may_run_dense=False
        )
        logits = np.asarray(result.logits_at)
        for rows, questions in zip(logits, batch.questions, strict=True):
            for row, (question, choices) in zip(rows, questions, strict=False):
                correct += int(np.argmax(row[choices])) == question.answer
                num_questions += 1
        cost, dense = report_cost(result.report, costs, Blocks())
        totals.append([cost, dense, float(result.report.density.mean()), float(np.mean(result.report.lengths))])
    cost, dense, density, length = np.mean(totals, axis=0).tolist()
    return Answers(
        correct=correct,
        questions=num_questions,
        cost=cost,
        dense_cost=dense,
        density=density,
        prompt_tokens=length,
    )
