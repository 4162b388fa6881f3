"""The search as a whole: trials of the three steps on every layer and prompt, each kept as soon as it is done."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mmi_jax.engine.settings.buckets import Buckets
from mmi_jax.search.candidates import Candidates
from mmi_jax.search.capture import captured_layers, check_rows, num_tokens_of
from mmi_jax.search.joint import joint_trials
from mmi_jax.search.journal import Journal
from mmi_jax.search.measure import FIELDS, Measured, Meter, modalities_of
from mmi_jax.search.scores import Scores, read_scores, trials_of_rows
from mmi_jax.search.sensitivity import Sensitivity, head_sensitivity, head_weights
from mmi_jax.search.trials import Trial, first_trials
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import Float

MOST_JOINT = 12
"""2D-Boundary combinations that are tried on every head."""

type AnswerRows = Mapping[str, Sequence[int]]
"""The tokens of prompts from whose logits answers are read, by the prompt's name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A model and everything that trials on it depend on; `journal` keeps what is done.

    Args:
      model: a `VisionLanguageModel`.
      blocks, buckets: as for `prefill`.
      on_trial: called as `(done, total, what)` while trials run; a resumed run begins at what is done.
    """

    model: Any
    journal: Journal
    blocks: Blocks = dataclasses.field(default_factory=Blocks)
    buckets: Buckets = dataclasses.field(default_factory=Buckets)
    on_trial: Callable[[int, int, str], None] = lambda done, total, what: None

    def calibrate(
        self, prompts: Mapping[str, Any], candidates: Candidates, *, most_joint: int = MOST_JOINT,
        answer_rows: AnswerRows | None = None, weights: Float[np.ndarray, "l h"] | None = None,
    ) -> Scores:  # fmt: skip
        """The scores of all three steps (paper, Alg. 4) on the prompts.

        Args:
          prompts: by name, each a batch of one.
          answer_rows: the tokens from whose logits answers are read, by the name of the prompt, which count for half of
            the error; prompts that are not named have none. The journal's `run` must tell of these as of the prompts.
          weights: how much an error of each head counts, by `weigh`; the same for all when None.

        Raises:
          ValueError: no prompt, prompts of different modalities, an answer row that no prompt has, attention that gives
            NaN or infinity, or a journal of another version.
        """
        modalities = same_modalities(prompts)
        first = first_trials(candidates, modalities)
        self.measure(prompts, first, "intra- and cross-modality", answer_rows=answer_rows)
        joint = joint_trials(self.scores(prompts, first, weights), most_joint)
        self.measure(prompts, joint, "inter-modality", answer_rows=answer_rows)
        return self.scores(prompts, (*first, *joint), weights)

    def weigh(self, prompts: Mapping[str, Any], *, answer_rows: AnswerRows | None = None) -> Float[np.ndarray, "l h"]:
        """How much an error of each head counts, 1 on average: by what cutting it down does to the answers.

        Args:
          prompts: short ones, by name, each a batch of one.
          answer_rows: as of `calibrate`; a prompt without is judged by its last token. The journal's `run` must tell of
            these prompts and rows, too.

        Raises:
          ValueError: no prompt, an answer row that no prompt has, or logits that are NaN or infinity.
        """
        if not prompts:
            raise ValueError("heads are weighed on prompts, got none")
        rows = _rows_by_prompt(prompts, answer_rows or {})
        kept = {row["prompt"]: row["sensitivity"] for row in self.journal.rows if "sensitivity" in row}
        for done, (name, prompt) in enumerate(prompts.items()):
            if name not in kept:
                self.on_trial(done, len(prompts), f"weighing heads: {name}")
                found = head_sensitivity(self.model, prompt, rows[name], blocks=self.blocks, buckets=self.buckets)
                if not np.isfinite(found.logits).all():
                    raise ValueError(f"logits must be finite, got NaN or infinity with a head of {name} cut down")
                kept[name] = {"logits": _floats(found.logits), "error": _floats(found.error)}
                self.journal.add({"prompt": name, "sensitivity": kept[name]})
        self.on_trial(len(prompts), len(prompts), "weighing heads")
        return head_weights([
            Sensitivity(logits=np.array(kept[name]["logits"]), error=np.array(kept[name]["error"])) for name in prompts
        ])  # fmt: skip

    def measure(
        self, prompts: Mapping[str, Any], trials: Sequence[Trial], what: str, *, answer_rows: AnswerRows | None = None
    ) -> None:
        """Runs the trials that the journal lacks; a prompt's layers one by one, each written down when it is done.

        Where a trial fails, those of its layer that were done before it are written down, too.

        Args and errors as of `calibrate`.
        """
        rows = _rows_by_prompt(prompts, answer_rows or {})
        num_layers = self.model.config.num_layers
        found = trials_of_rows(self.journal.rows)
        missing = {
            (name, layer): [t for t in trials if t.key not in found.get((name, layer), {})]
            for name in prompts
            for layer in range(num_layers)
        }
        total = len(trials) * len(missing)
        done = total - sum(map(len, missing.values()))
        meter = Meter(same_modalities(prompts), self.blocks)
        for name, prompt in prompts.items():
            last = max((layer for layer in range(num_layers) if missing[name, layer]), default=-1)
            if last < 0:
                continue  # all is in the journal: even its vision tokens are not needed
            layers = captured_layers(
                self.model,
                prompt,
                blocks=self.blocks,
                buckets=self.buckets,
                num_layers=last + 1,
                answer_rows=rows[name],
            )
            for layer, captured in enumerate(layers):
                if missing[name, layer]:
                    self.on_trial(done, total, f"{what}: compiling")
                    meter.prepare(missing[name, layer], captured)
                figures: dict[str, Any] = {}
                try:
                    for trial in missing[name, layer]:
                        figure = meter(trial, captured)
                        _check_finite(figure, f"{trial.key} in layer {layer} of {name}")
                        figures[trial.key] = {field: _floats(getattr(figure, field)) for field in FIELDS}
                        done += 1
                        self.on_trial(done, total, f"{what}: layer {layer} of {name}")
                except Exception:  # one that gives NaN or finds no memory: those before it are kept
                    self._keep(name, layer, figures)
                    raise
                self._keep(name, layer, figures)

    def _keep(self, name: str, layer: int, figures: Mapping[str, Any]) -> None:
        if figures:
            self.journal.add({"prompt": name, "layer": layer, "trials": figures})

    def scores(
        self, prompts: Mapping[str, Any], trials: Iterable[Trial], weights: Float[np.ndarray, "l h"] | None = None
    ) -> Scores:
        """What the journal says of these trials on these prompts; `weights` as of `calibrate`."""
        return read_scores(
            self.journal.rows,
            {name: num_tokens_of(prompt) for name, prompt in prompts.items()},
            trials,
            num_layers=self.model.config.num_layers,
            modalities=same_modalities(prompts),
            blocks=self.blocks,
            weights=weights,
        )


def same_modalities(prompts: Mapping[str, Any]) -> tuple[int, ...]:
    """The modalities of the prompts' tokens; raises ValueError unless all prompts have the same."""
    found = {modalities_of(prompt.layout) for prompt in prompts.values()}
    if len(found) != 1:
        raise ValueError(f"calibration needs prompts, all of the same modalities: got {sorted(found)}")
    return found.pop()


def _rows_by_prompt(prompts: Mapping[str, Any], answer_rows: AnswerRows) -> dict[str, Sequence[int]]:
    """The answer rows of each prompt, none where none are named; refused before anything runs."""
    if unknown := sorted(set(answer_rows) - set(prompts)):
        raise ValueError(f"answer rows must be those of {', '.join(prompts)}, got some of {', '.join(unknown)}")
    for name, rows in answer_rows.items():
        check_rows(rows, num_tokens_of(prompts[name]))
    return {name: answer_rows.get(name, ()) for name in prompts}


def _check_finite(figure: Measured, what: str) -> None:
    """Raises ValueError at once: a mean over prompts would only tell at the end, and not where."""
    is_finite = (np.isfinite(figure.error) & np.isfinite(figure.answer_error)).all(axis=0)
    if not is_finite.all():
        heads = np.flatnonzero(~is_finite).tolist()
        raise ValueError(f"errors of trials must be finite, got NaN or infinity in heads {heads} of {what}")


def _floats(x: Any) -> list[list[float]]:
    return np.asarray(x, np.float64).tolist()
