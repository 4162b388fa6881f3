"""The search as a whole: trials of the three steps on every layer and prompt, each kept as soon as it is done."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mmi_jax.engine.protocols import VisionLanguageModel
from mmi_jax.engine.settings.buckets import Buckets
from mmi_jax.search.activations import LayerActivations, check_answer_rows, layer_activations, num_tokens_of
from mmi_jax.search.candidates import Candidates
from mmi_jax.search.importance import AblationEffect, ablate_heads, head_weights
from mmi_jax.search.joint_trials import joint_trials
from mmi_jax.search.scores import Scores, metrics_by_trial, read_scores
from mmi_jax.search.trials.journal import Journal
from mmi_jax.search.trials.measurement import METRICS, Meter, TrialMetrics, modalities_of
from mmi_jax.search.trials.trial import Trial, first_trials
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import Float

MAX_JOINT_TRIALS = 12
"""2D-Boundary combinations that are tried on every head: a tenth of the other trials of `Candidates()`."""

ABLATION_ENTRY = "sensitivity"
"""Name of an ablation's effect in journals."""

type AnswerRows = Mapping[str, Sequence[int]]
"""The tokens of prompts from whose logits answers are read, by the prompt's name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A model and everything that trials on it depend on; `journal` keeps what is done.

    Args:
      blocks, buckets: as for `prefill`.
      on_trial: called as `(done, total, step)` while trials run; a resumed run begins at what is done.
    """

    model: VisionLanguageModel
    journal: Journal
    blocks: Blocks = dataclasses.field(default_factory=Blocks)
    buckets: Buckets = dataclasses.field(default_factory=Buckets)
    on_trial: Callable[[int, int, str], None] = lambda done, total, step: None

    def calibrate(
        self,
        prompts: Mapping[str, Any],
        candidates: Candidates,
        *,
        max_joint_trials: int = MAX_JOINT_TRIALS,
        answer_rows: AnswerRows | None = None,
        weights: Float[np.ndarray, "l h"] | None = None,
    ) -> Scores:
        """The scores of all three steps (paper, Alg. 4) on the prompts.

        Args:
          prompts: by name, each a batch of one.
          answer_rows: the tokens from whose logits answers are read, by the name of the prompt, which count for half of
            the error; prompts that are not named have none. The journal's `run` must tell of these as of the prompts.
          weights: how much an error of each head counts, by `importance_weights`; the same for all when None.

        Raises:
          ValueError: no prompt, prompts of different modalities, an answer row that no prompt has, attention that gives
            NaN or infinity, or a journal of another version.
        """
        modalities = same_modalities(prompts)
        first = first_trials(candidates, modalities)
        self.measure(prompts, first, "intra- and cross-modality", answer_rows=answer_rows)
        joint = joint_trials(self.scores(prompts, first, weights), max_joint_trials)
        self.measure(prompts, joint, "inter-modality", answer_rows=answer_rows)
        return self.scores(prompts, (*first, *joint), weights)

    def importance_weights(
        self, prompts: Mapping[str, Any], *, answer_rows: AnswerRows | None = None
    ) -> Float[np.ndarray, "l h"]:
        """How much an error of each head counts, 1 on average: by what its ablation changes in the answers.

        Args:
          prompts: short ones, by name, each a batch of one.
          answer_rows: as of `calibrate`; a prompt without is judged by its last token. The journal's `run` must tell of
            these prompts and rows, too.

        Raises:
          ValueError: no prompt, an answer row that no prompt has, or logits that are NaN or infinity.
        """
        if not prompts:
            raise ValueError("heads are ablated on prompts, got none")
        rows = _rows_by_prompt(prompts, answer_rows or {})
        effects = {e["prompt"]: e[ABLATION_ENTRY] for e in self.journal.entries if ABLATION_ENTRY in e}
        for done, (name, prompt) in enumerate(prompts.items()):
            if name not in effects:
                self.on_trial(done, len(prompts), f"ablating heads: {name}")
                effect = ablate_heads(self.model, prompt, rows[name], blocks=self.blocks, buckets=self.buckets)
                if not np.isfinite(effect.logits).all():
                    raise ValueError(f"logits must be finite, got NaN or infinity with a head of {name} ablated")
                effects[name] = {"logits": _floats(effect.logits), "error": _floats(effect.error)}
                self.journal.add({"prompt": name, ABLATION_ENTRY: effects[name]})
        self.on_trial(len(prompts), len(prompts), "ablating heads")
        arrays = ({field: np.array(value) for field, value in effects[name].items()} for name in prompts)
        return head_weights([AblationEffect(**fields) for fields in arrays])

    def measure(
        self, prompts: Mapping[str, Any], trials: Sequence[Trial], step: str, *, answer_rows: AnswerRows | None = None
    ) -> None:
        """Runs the trials that the journal lacks; a prompt's layers one by one, each written down when it is done.

        Args and errors as of `calibrate`; `step` is the name under which they are reported to `on_trial`.
        """
        rows = _rows_by_prompt(prompts, answer_rows or {})
        missing = self._missing(prompts, trials)
        progress = _Progress(len(trials) * len(missing), sum(map(len, missing.values())), step, self.on_trial)
        meter = Meter(same_modalities(prompts), self.blocks)
        for name, prompt in prompts.items():
            last = max(
                (layer for of_prompt, layer in missing if of_prompt == name and missing[name, layer]), default=-1
            )
            if last < 0:
                continue  # all is in the journal: even its vision tokens are not needed
            layers = layer_activations(
                self.model,
                prompt,
                blocks=self.blocks,
                buckets=self.buckets,
                num_layers=last + 1,
                answer_rows=rows[name],
            )
            for layer, activations in enumerate(layers):
                self._measure_layer(name, layer, missing[name, layer], meter, activations, progress)

    def _missing(self, prompts: Iterable[str], trials: Sequence[Trial]) -> dict[tuple[str, int], list[Trial]]:
        """The trials of each prompt and layer that the journal lacks."""
        places = [(name, layer) for name in prompts for layer in range(self.model.config.num_layers)]
        done = metrics_by_trial(self.journal.entries)
        return {place: [t for t in trials if t.key not in done.get(place, {})] for place in places}

    def _measure_layer(
        self,
        name: str,
        layer: int,
        trials: Sequence[Trial],
        meter: Meter,
        activations: LayerActivations,
        progress: "_Progress",
    ) -> None:
        """Where a trial fails, those of its layer that were done before it are written down, too."""
        if trials:
            progress.tell("compiling")
            meter.prepare(trials, activations)
        metrics: dict[str, dict[str, list[list[float]]]] = {}
        try:
            for trial in trials:
                of_trial = meter(trial, activations)
                _check_finite(of_trial, f"{trial.key} in layer {layer} of {name}")
                metrics[trial.key] = {field: _floats(getattr(of_trial, field)) for field in METRICS}
                progress.add(f"layer {layer} of {name}")
        except Exception:  # one that gives NaN or finds no memory: those before it are kept
            self._keep(name, layer, metrics)
            raise
        self._keep(name, layer, metrics)

    def _keep(self, name: str, layer: int, metrics: Mapping[str, Any]) -> None:
        if metrics:
            self.journal.add({"prompt": name, "layer": layer, "trials": metrics})

    def scores(
        self, prompts: Mapping[str, Any], trials: Iterable[Trial], weights: Float[np.ndarray, "l h"] | None = None
    ) -> Scores:
        """The journal's scores of these trials on these prompts; `weights` as of `calibrate`."""
        return read_scores(
            self.journal.entries,
            {name: num_tokens_of(prompt) for name, prompt in prompts.items()},
            trials,
            num_layers=self.model.config.num_layers,
            modalities=same_modalities(prompts),
            blocks=self.blocks,
            weights=weights,
        )


class _Progress:
    """Trials done of all, as reported to a callback."""

    def __init__(self, total: int, missing: int, step: str, on_trial: Callable[[int, int, str], None]):
        self._total, self._done, self._step, self._on_trial = total, total - missing, step, on_trial

    def tell(self, what: str) -> None:
        self._on_trial(self._done, self._total, f"{self._step}: {what}")

    def add(self, what: str) -> None:
        self._done += 1
        self.tell(what)


def same_modalities(prompts: Mapping[str, Any]) -> tuple[int, ...]:
    """The modalities of the prompts' tokens; raises ValueError unless all prompts have the same."""
    modalities = {modalities_of(prompt.layout) for prompt in prompts.values()}
    if len(modalities) != 1:
        raise ValueError(f"calibration needs prompts, all of the same modalities: got {sorted(modalities)}")
    return modalities.pop()


def _rows_by_prompt(prompts: Mapping[str, Any], answer_rows: AnswerRows) -> dict[str, Sequence[int]]:
    """The answer rows of each prompt, none where none are named; refused before anything runs."""
    if unknown := sorted(set(answer_rows) - set(prompts)):
        raise ValueError(f"answer rows must be those of {', '.join(prompts)}, got some of {', '.join(unknown)}")
    for name, rows in answer_rows.items():
        check_answer_rows(rows, num_tokens_of(prompts[name]))
    return {name: answer_rows.get(name, ()) for name in prompts}


def _check_finite(metrics: TrialMetrics, where: str) -> None:
    """Raises ValueError at once: a mean over prompts would only tell at the end, and not where."""
    is_finite = (np.isfinite(metrics.error) & np.isfinite(metrics.answer_error)).all(axis=0)
    if not is_finite.all():
        heads = np.flatnonzero(~is_finite).tolist()
        raise ValueError(f"errors of trials must be finite, got NaN or infinity in heads {heads} of {where}")


def _floats(x: np.typing.ArrayLike) -> list[list[float]]:
    return np.asarray(x, np.float64).tolist()
