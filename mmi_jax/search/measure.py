"""What a trial leaves out and what it visits: squared errors on the attention output, and tiles, per head."""

import dataclasses
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax.engine.programs.compilation import compile_options
from mmi_jax.method.attention import attend_sparsely
from mmi_jax.method.patterns import Pattern
from mmi_jax.method.plan import Plan
from mmi_jax.search.capture import Captured
from mmi_jax.search.trials import Trial
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import Array, Bool, Float, Int32
from pallas_kernels.pytree import pytree


@pytree
class Measured:
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


FIELDS = tuple(field.name for field in dataclasses.fields(Measured))
"""What is measured, as journals name it."""


_COMPILED: dict[Any, Any] = {}


@dataclasses.dataclass(frozen=True)
class Meter:
    """Measures trials on captured layers of prompts with these modalities; a trial is compiled once per shape."""

    modalities: tuple[int, ...]
    blocks: Blocks

    def prepare(self, trials: Iterable[Trial], captured: Captured) -> None:
        """Compiles the trials side by side: compiling, not running, is most of a search's time on an accelerator."""
        missing = [trial for trial in dict.fromkeys(trials) if self._key(trial, captured) not in _COMPILED]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # lowering holds Python's lock, compiling does not
            programs = [pool.submit(self._lowered(trial, captured).compile, compile_options()) for trial in missing]
        _COMPILED.update({self._key(t, captured): p.result() for t, p in zip(missing, programs, strict=True)})

    def __call__(self, trial: Trial, captured: Captured) -> Measured:
        """The trial's figures on one layer, on the host."""
        self.prepare([trial], captured)
        return jax.device_get(_COMPILED[self._key(trial, captured)](captured))

    def _key(self, trial: Trial, captured: Captured) -> Any:
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(captured))
        return self, trial, shapes

    def _lowered(self, trial: Trial, captured: Captured) -> jax.stages.Lowered:
        pattern = trial.pattern(self.modalities)

        def measure(captured: Captured) -> Measured:
            return measured(pattern, captured, modalities=self.modalities, blocks=self.blocks)

        return jax.jit(measure).lower(captured)


def measured(pattern: Pattern, captured: Captured, *, modalities: tuple[int, ...], blocks: Blocks) -> Measured:
    """The figures of one pattern on all heads of a layer: one sparse attention call, nothing of [t, s]."""
    result = attend_sparsely(captured.q, captured.k, captured.v, pattern, layout=captured.layout, blocks=blocks)
    modality = captured.layout.modality[0]
    is_of = jnp.stack([modality == m for m in modalities])
    is_answer = is_of & captured.is_answer
    lost, whole = (
        jnp.sum(jnp.square(x[0].astype(jnp.float32)), axis=-1)
        for x in (result.out.astype(jnp.float32) - captured.out.astype(jnp.float32), captured.out)
    )
    error = share_lost(is_of, lost, whole)
    answer_error = jnp.where(is_answer.any(axis=1, keepdims=True), share_lost(is_answer, lost, whole), error)
    assert result.plan is not None, "a plain dense call has no plan: trials run sparsely, dense ones too"
    tiles = tiles_by_modality(jax.tree.map(lambda x: x[0], result.plan), modality, modalities)
    return Measured(error=error, answer_error=answer_error, tiles=tiles)


def share_lost(is_of: Bool[Array, "n t"], lost: Float[Array, "t h"], whole: Float[Array, "t h"]) -> Float[Array, "n h"]:
    """Of the squared output, the share that is lost in the rows of each set."""
    lost, whole = (jnp.einsum("nt,th->nh", is_of.astype(jnp.float32), x) for x in (lost, whole))
    return lost / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)


def tiles_by_modality(plan: Plan, modality: Int32[Array, " t"], modalities: tuple[int, ...]) -> Float[Array, "n h"]:
    """Visited tiles per head; those of a q block are shared out by the modalities of its queries."""
    index, order = plan.index, plan.q_order.order
    of_row = jnp.where(order >= 0, modality[jnp.maximum(order, 0)], -1).reshape(*index.count.shape, index.block_q)
    number = jnp.stack([(of_row == m).sum(axis=2) for m in modalities]).astype(jnp.float32)
    share = number / jnp.maximum(number.sum(axis=0, keepdims=True), 1.0)
    return jnp.einsum("nhi,hi->nh", share, index.count.astype(jnp.float32))


def modalities_of(layout: Any) -> tuple[int, ...]:
    """The modalities of a prompt's tokens, ascending."""
    modality = np.asarray(layout.modality)
    return tuple(int(m) for m in np.unique(modality[modality >= 0]))
