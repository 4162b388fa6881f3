"""Samples through a model: which questions are answered right, and what the attention cost."""

import dataclasses
from collections.abc import Sequence

import numpy as np

import mmi_jax
from mmi_jax import Blocks, PatternTable
from mmi_jax.cost import CostModel
from mmi_jax.patterns import Pattern
from mmi_jax.search.equal_cost import report_cost
from models.qwen2_5_vl.model import Qwen2_5_VL
from models.qwen2_5_vl.processor import Processor
from models.tasks import Sample, choice_ids, question_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """Of some samples.

    Args:
      correct, asked: questions.
      cost: of the attention of a prompt, all layers, by the cost model; mean.
      dense_cost: of dense attention.
      density: visited tiles over dense ones, mean over layers and heads.
      prompt_tokens: mean length of the prompts.
    """

    correct: int
    asked: int
    cost: float
    dense_cost: float
    density: float
    prompt_tokens: float


def answer(
    model: Qwen2_5_VL, processor: Processor, samples: Sequence[Sample], table: PatternTable | Pattern | None,
    *, costs: CostModel, batch: int, num_rows: int,
) -> Answers:  # fmt: skip
    """Asks every question of the samples, each answered by the choice with the largest logit at its row.

    Args:
      table: patterns as asked: none is replaced by dense attention where that is faster.
      batch: prompts of one prefill.
      num_rows: questions that a prefill has room for, so that tasks with fewer share its program.
    """
    correct, asked, totals = 0, 0, []
    for first in range(0, len(samples), batch):
        group = samples[first : first + batch]
        rows = [question_rows(sample, processor) for sample in group]
        padded = np.stack([np.resize(row, num_rows) for row in rows])
        prompt = processor(*(list(sample.parts) for sample in group))
        result = mmi_jax.prefill(
            model, prompt, table=table, logits_at=padded, measures_recall=False, may_run_dense=False
        )
        logits = np.asarray(result.logits_at)
        for n, sample in enumerate(group):
            for question, row in zip(sample.questions, logits[n], strict=False):
                correct += int(np.argmax(row[choice_ids(question, processor.tokenizer)])) == question.answer
                asked += 1
        cost, dense = report_cost(result.report, costs, Blocks())
        totals.append([cost, dense, float(result.report.density.mean()), float(np.mean(result.report.lengths))])
    cost, dense, density, length = np.mean(totals, axis=0).tolist()
    return Answers(correct=correct, asked=asked, cost=cost, dense_cost=dense, density=density, prompt_tokens=length)
