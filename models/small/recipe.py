"""The recipe of the model that ships with the package."""

import dataclasses

from models.small.config import small_config
from models.small.curriculum import Curriculum, Stage
from models.small.optimizer import OptimizerSettings
from models.small.train import Recipe

STAGES = (
    Stage(num_tokens=1024, batch=64, num_steps=721),
    Stage(num_tokens=4096, batch=16, num_steps=190),
    Stage(num_tokens=16384, batch=4, num_steps=433),
)
"""65,536 tokens a step. The steps at which the shipped model's own run changed length: there, as soon as the last 80
steps answered 93 % of every kind of question; and at which its time was up."""

RECIPE = Recipe(
    model=small_config(),
    curriculum=Curriculum(stages=STAGES, seed=2),
    optimizer=OptimizerSettings(
        kind="muon", learning_rate=1e-3, muon_rate=0.01, warmup_steps=100, decay_share=0.29, last_rate=0.03
    ),
)
"""The same batches as the shipped model's. Its rates fell by the clock, here they fall by the step; its initial weights
were those of seed 1."""


def with_stages(stages: tuple[Stage, ...]) -> Recipe:
    """The recipe with other lengths and numbers of steps."""
    return dataclasses.replace(RECIPE, curriculum=dataclasses.replace(RECIPE.curriculum, stages=stages))
