"""The recipe of the model that ships with the package."""

import dataclasses

from models.small.config import small_config
from models.small.curriculum import Curriculum, Stage
from models.small.optimizer import OptimizerSettings
from models.small.train import Recipe

STAGES = (
    Stage(num_tokens=1024, batch=64, num_steps=1400),
    Stage(num_tokens=8192, batch=8, num_steps=2600),
    Stage(num_tokens=32768, batch=2, num_steps=3900),
)
"""65,536 tokens a step."""

RECIPE = Recipe(
    model=small_config(),
    curriculum=Curriculum(stages=STAGES, seed=1),
    optimizer=OptimizerSettings(kind="muon", learning_rate=1e-3, muon_rate=0.02, warmup_steps=100),
)


def with_stages(stages: tuple[Stage, ...]) -> Recipe:
    """The recipe with other lengths and numbers of steps."""
    return dataclasses.replace(RECIPE, curriculum=dataclasses.replace(RECIPE.curriculum, stages=stages))
