"""Measurement of a trial: squared errors of the attention output, and visited tiles, of each head."""

import dataclasses
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax.engine.programs.compilation import compile_options
from mmi_jax.engine.programs.program_cache import PROGRAMS, ProgramKey
from mmi_jax.layout import TokenLayout
from mmi_jax.method.dispatch import attend_sparsely
from mmi_jax.method.patterns import Pattern
from mmi_jax.method.plan import Plan
from mmi_jax.search.activations import LayerActivations
from mmi_jax.search.trials.trial import Trial
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import Array, Bool, Float, Int32
from pallas_kernels.pytree import pytree


@pytree
class TrialMetrics:
    """One trial on one layer of one prompt, or on several; split by the modality of the query.

    Args:
      error: sum over queries of the squared distance from dense attention, over that of dense attention from zero.
      answer_error: the same over those queries alone from which answers are read, a few among tens of thousands;
        `error` where the modality has none.
      tiles: visited (q block, kv block) tiles.
    """

    error: Float[Array | np.ndarray, "*prompts_and_layers n h"]
    answer_error: Float[Array | np.ndarray, "*prompts_and_layers n h"]
    tiles: Float[Array | np.ndarray, "*prompts_and_layers n h"]


METRICS = tuple(field.name for field in dataclasses.fields(TrialMetrics))
"""Names of the metrics, as journals have them."""

TRIAL = "trial"
"""Kind of the programs of trials, see `ProgramCache`."""


@dataclasses.dataclass(frozen=True)
class Meter:
    """Measures trials on the layers of prompts with these modalities; a trial is compiled once per shape."""

    modalities: tuple[int, ...]
    blocks: Blocks

    def prepare(self, trials: Iterable[Trial], activations: LayerActivations) -> None:
        """Compiles the trials side by side: compiling, not running, is most of a search's time on an accelerator."""
        missing = [trial for trial in dict.fromkeys(trials) if self._key(trial, activations) not in PROGRAMS]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # lowering holds Python's lock, compiling does not
            programs = [pool.submit(self._lowered(t, activations).compile, compile_options()) for t in missing]
        PROGRAMS.add({self._key(t, activations): p.result() for t, p in zip(missing, programs, strict=True)})

    def __call__(self, trial: Trial, activations: LayerActivations) -> TrialMetrics:
        """The trial's metrics on one layer, on the host."""
        self.prepare([trial], activations)
        return jax.device_get(PROGRAMS[self._key(trial, activations)](activations))

    def _key(self, trial: Trial, activations: LayerActivations) -> ProgramKey:
        return ProgramKey.of(TRIAL, (self, trial), activations)

    def _lowered(self, trial: Trial, activations: LayerActivations) -> jax.stages.Lowered:
        pattern = trial.pattern(self.modalities)

        def measure(activations: LayerActivations) -> TrialMetrics:
            return measure_pattern(pattern, activations, modalities=self.modalities, blocks=self.blocks)

        return jax.jit(measure).lower(activations)


def measure_pattern(
    pattern: Pattern, activations: LayerActivations, *, modalities: tuple[int, ...], blocks: Blocks
) -> TrialMetrics:
    """The metrics of one pattern on all heads of a layer: one sparse attention call, nothing of [t, s]."""
    q, k, v, layout = activations.q, activations.k, activations.v, activations.layout
    result = attend_sparsely(q, k, v, pattern, layout=layout, blocks=blocks)
    modality = layout.modality[0]
    is_of = jnp.stack([modality == m for m in modalities])
    is_answer = is_of & activations.is_answer
    difference, whole = (
        jnp.sum(jnp.square(x[0].astype(jnp.float32)), axis=-1)
        for x in (result.out.astype(jnp.float32) - activations.out.astype(jnp.float32), activations.out)
    )
    error = relative_error(is_of, difference, whole)
    of_answers = relative_error(is_answer, difference, whole)
    assert result.plan is not None, "a plain dense call has no plan: trials run sparsely, dense ones too"
    return TrialMetrics(
        error=error,
        answer_error=jnp.where(is_answer.any(axis=1, keepdims=True), of_answers, error),
        tiles=tiles_by_modality(jax.tree.map(lambda x: x[0], result.plan), modality, modalities),
    )


def relative_error(
    is_of: Bool[Array, "n t"], difference: Float[Array, "t h"], whole: Float[Array, "t h"]
) -> Float[Array, "n h"]:
    """Squared difference over squared output, each summed over the rows of every set."""
    difference, whole = (jnp.einsum("nt,th->nh", is_of.astype(jnp.float32), x) for x in (difference, whole))
    return difference / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)


def tiles_by_modality(plan: Plan, modality: Int32[Array, " t"], modalities: tuple[int, ...]) -> Float[Array, "n h"]:
    """Visited tiles per head; those of a q block are divided by the modalities of its queries."""
    index, order = plan.index, plan.q_order.order
    of_row = jnp.where(order >= 0, modality[jnp.maximum(order, 0)], -1).reshape(*index.count.shape, index.block_q)
    number = jnp.stack([(of_row == m).sum(axis=2) for m in modalities]).astype(jnp.float32)
    fraction = number / jnp.maximum(number.sum(axis=0, keepdims=True), 1.0)
    return jnp.einsum("nhi,hi->nh", fraction, index.count.astype(jnp.float32))


def modalities_of(layout: TokenLayout) -> tuple[int, ...]:
    """The modalities of a prompt's tokens, ascending."""
    modality = np.asarray(layout.modality)
    return tuple(int(m) for m in np.unique(modality[modality >= 0]))
