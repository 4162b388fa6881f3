"""The recipe of the small model."""

import dataclasses

from models.small.config import small_config
from models.small.curriculum import Curriculum, Stage
from models.small.optimizer import OptimizerSettings
from models.small.train import Recipe

STAGES = (
    Stage(num_tokens=1024, batch=64, num_steps=1000),
    Stage(num_tokens=4096, batch=16, num_steps=450),
    Stage(num_tokens=16384, batch=4, num_steps=650),
    Stage(num_tokens=32768, batch=2, num_steps=750),
)
"""65,536 tokens a step, of 77, 87, 148 and 206 ms on an H200."""

RECIPE = Recipe(
    model=small_config(),
    curriculum=Curriculum(stages=STAGES, seed=3),
    optimizer=OptimizerSettings(
        kind="muon", learning_rate=1e-3, muon_rate=0.01, warmup_steps=100, decay_fraction=0.3, last_rate=0.03
    ),
)
"""All by the step: batches, lengths and rates, which fall over the last 855 steps. On another day the same batches are
seen, but a GPU's sums are not bit-equal."""


def with_stages(stages: tuple[Stage, ...]) -> Recipe:
    """The recipe with other lengths and numbers of steps."""
    return dataclasses.replace(RECIPE, curriculum=dataclasses.replace(RECIPE.curriculum, stages=stages))
