"""The optimizer: Muon for the matrices of the layers, AdamW for everything else, or AdamW for all."""

import dataclasses
from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Rates, and how they run over the steps: up linearly, constant, down linearly.

    Fields:
        kind: which optimizer turns the layers' matrices.
        learning_rate: at its highest, of AdamW.
        muon_rate: of Muon's matrices, whose updates are orthogonal before it is applied.
        weight_decay: of AdamW and Muon.
        warmup_steps: steps of the way up.
        decay_fraction: fraction of all steps over which the rates fall.
        last_rate: the final rate, as a fraction of the highest.
        clip_norm: gradients of a larger norm are scaled down to it.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    muon_rate: float = 0.02
    weight_decay: float = 0.01
    warmup_steps: int = 100
    decay_fraction: float = 0.25
    last_rate: float = 0.03
    clip_norm: float = 1.0


def make_optimizer(settings: OptimizerSettings, num_steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `num_steps` steps."""

    def schedule(peak: float) -> optax.Schedule:
        decay_steps = max(1, round(settings.decay_fraction * num_steps))
        pieces = [
            optax.linear_schedule(0.0, peak, settings.warmup_steps),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, settings.last_rate * peak, decay_steps),
        ]
        return optax.join_schedules(pieces, [settings.warmup_steps, num_steps - decay_steps])

    if settings.kind == "adamw":
        rule = optax.adamw(schedule(settings.learning_rate), b2=0.95, weight_decay=settings.weight_decay)
    else:
        rule = muon(
            schedule(settings.muon_rate),
            adam_b2=0.95,
            adam_learning_rate=schedule(settings.learning_rate),
            weight_decay=settings.weight_decay,
            adam_weight_decay=settings.weight_decay,
            muon_weight_dimension_numbers=_matrices,
        )
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), rule)


def _matrices(params: Any) -> Any:
    """The parameters that Muon updates: kernels `[in, out]`, or `[layer, in, out]` of layers; not the embedding."""

    def dimensions(path, leaf):
        is_kernel = any(getattr(key, "key", None) == "kernel" for key in path)
        return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if is_kernel else None

    return jax.tree_util.tree_map_with_path(dimensions, params)
