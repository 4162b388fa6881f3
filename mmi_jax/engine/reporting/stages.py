"""Stage: every name by which a part of a prefill is planned, profiled, timed and reported.

Four places speak of stages, each of some of them: the memory plan (what is alive on the device, `MEMORY_STAGES`), the
profile (what the device spends its time on, `PROFILED_STAGES`, by the `jax.named_scope` of each), the wall clock (what
the host waits for, `CLOCK_STAGES`) and the report, which carries the clock's. Code that lies on a floor below the
engine, and models, open the scopes by their names, such as "mmi.plan"; a test holds those names to this list.
"""

import enum

SCOPE_PREFIX = "mmi."
"""Prefix of the name of every scope, so that a profile can tell ours from a model's."""


class Stage(enum.StrEnum):
    """A part of a prefill."""

    EMBED = "embed"
    PROJECT = "project"
    ESTIMATE = "estimate"
    PLAN = "plan"
    RECALL = "recall"
    PERMUTE = "permute"
    ATTEND = "attend"
    UNDO = "undo"
    MLP = "mlp"
    LOGITS = "logits"
    VISION = "vision"
    COMPILE = "compile"
    PREFILL = "prefill"

    @property
    def scope(self) -> str:
        """The name of its `jax.named_scope`."""
        return f"{SCOPE_PREFIX}{self}"


LAYER_STAGES = (Stage.PROJECT, Stage.PLAN, Stage.PERMUTE, Stage.ATTEND, Stage.UNDO, Stage.MLP)
"""Stages of a layer, in order of time, as the memory plan divides it."""

MEMORY_STAGES = (Stage.EMBED, *LAYER_STAGES, Stage.LOGITS)
"""A prefill in order of time, as the memory plan divides it."""

PROFILED_STAGES = {
    Stage.PROJECT: "norms, projections, rotary",
    Stage.ESTIMATE: "estimates",
    Stage.PLAN: "lists and orders",
    Stage.RECALL: "recall measurement",
    Stage.PERMUTE: "permute",
    Stage.ATTEND: "attend",
    Stage.UNDO: "undo",
    Stage.MLP: "output projection, MLP",
}
"""Stages that are scopes of the compiled programs, and what a profile calls them."""

CLOCK_STAGES = (Stage.VISION, Stage.COMPILE, Stage.PREFILL)
"""Stages of the host's wall time, in the order in which they begin; the last two for every chunk."""
