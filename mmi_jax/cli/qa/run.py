"""The stages of `mmi qa`: one prefill per question, each answer journalled, the score at the end."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.table import Table

import mmi_jax
from mmi_jax import PatternTable
from mmi_jax.cli import console
from mmi_jax.cli.digest import run_on
from mmi_jax.method.patterns import Pattern
from mmi_jax.method.tables import pattern_json
from mmi_jax.search.trials.journal import Journal
from models import Model, Processor, open_checkpoint
from models.media.video import Video, read_video
from models.tasks.qa import DATASETS, Item, Score, matches, parts, sample, scores
from models.tasks.rows import choice_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class QaOptions:
    """Options of `mmi qa`."""

    model: str
    dataset: str
    directory: Path
    output: Path
    table: PatternTable | Pattern | None
    fps: float
    max_frames: int
    limit: int | None
    max_new_tokens: int
    dtype: str

    def __post_init__(self):
        """Raises ValueError for an unknown set or numbers out of range."""
        if self.dataset not in DATASETS:
            raise ValueError(f"unknown data set {self.dataset!r}: expected one of {', '.join(DATASETS)}")
        if (self.limit is not None and self.limit < 1) or self.max_new_tokens < 1:
            raise ValueError(f"limit and max_new_tokens must be at least 1, got {self.limit} and {self.max_new_tokens}")

    @property
    def patterns(self) -> object:
        """The patterns as JSON values."""
        if isinstance(self.table, PatternTable):
            return [[pattern_json.to_json(pattern) for pattern in heads] for heads in self.table.layers]
        return None if self.table is None else pattern_json.to_json(self.table)


def run_qa(options: QaOptions) -> Score:
    """Answers every question and prints the score.

    Raises:
      ValueError: the set is not complete, a video cannot be read, or the output is another run's.
    """
    items = DATASETS[options.dataset](options.directory)[: options.limit]
    checkpoint = open_checkpoint(options.model)
    processor = checkpoint.read_processor()
    run = run_on(options.model, checkpoint.directory, options.dtype) | {
        "dataset": options.dataset,
        "patterns": options.patterns,
        "frames": [options.fps, options.max_frames],
    }
    journal = Journal(options.output, run)
    done = {row["name"]: row for row in journal.entries}
    if any(item.name not in done for item in items):
        with console.progress_bar("loading weights", "tensors") as on_tensor:
            model = checkpoint.load_model(dtype=jnp.dtype(options.dtype), on_tensor=on_tensor)
        with console.work_bar("questions") as on_item:
            for n, item in enumerate(items):
                on_item(n, len(items), item.name[:40])
                if item.name not in done:
                    done[item.name] = _ask(options, model, processor, item)
                    journal.add(done[item.name])
            on_item(len(items), len(items), "done")
    score = scores([item.kind for item in items], [done[item.name]["is_right"] for item in items])
    console.stdout_console().print(score_table(options.dataset, score))
    return score


def _ask(options: QaOptions, model: Model, processor: Processor, item: Item) -> dict[str, Any]:
    """One question's answer."""
    video = read_video(item.video, fps=options.fps, max_frames=options.max_frames, resize=processor.fit_frame)
    predict = _choice if item.options else _words
    given = predict(options, model, processor, item, video)
    is_right = given == item.answer if item.options else matches(str(given), str(item.answer))
    return {"name": item.name, "answer": given, "expected": item.answer, "is_right": bool(is_right)}


def _choice(options: QaOptions, model: Model, processor: Processor, item: Item, video: Video) -> int:
    generated = sample(item, video)
    result = mmi_jax.prefill(model, processor(list(generated.parts)), table=options.table, measures_recall=False)
    return int(np.argmax(np.asarray(result.logits)[0, choice_ids(generated.questions[0], processor.tokenizer)]))


def _words(options: QaOptions, model: Model, processor: Processor, item: Item, video: Video) -> str:
    ends, prompt = processor.end_tokens, processor(parts(item, video))
    result = mmi_jax.prefill(
        model, prompt, table=options.table, measures_recall=False, max_new_tokens=options.max_new_tokens
    )
    tokens = mmi_jax.decode(model, result, max_new_tokens=options.max_new_tokens, end_tokens=ends)
    answer = [token for token in np.asarray(tokens)[0].tolist() if token not in ends]
    return processor.tokenizer.decode(answer).strip()


def score_table(name: str, score: Score) -> Table:
    """Accuracy by kind and over all questions."""
    table = Table(name, "right", "questions", "accuracy")
    for kind, (right, count) in score.by_kind.items():
        table.add_row(kind, str(right), str(count), f"{right / count:.1%}")
    table.add_row("all", str(score.correct), str(score.num_questions), f"{score.accuracy:.1%}", style="bold")
    return table
