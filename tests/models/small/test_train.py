"""A run goes on from its checkpoint as if it had never stopped, and learns."""

import json

import jax
import numpy as np
import pytest

from models.small.config import small_config
from models.small.curriculum import Curriculum, Stage
from models.small.forward import Compute
from models.small.loader import Loader
from models.small.optimizer import OptimizerSettings
from models.small.train import Recipe, train

STAGES = (Stage(num_tokens=128, batch=2, num_steps=4), Stage(num_tokens=192, batch=1, num_steps=4))


def recipe(**optimizer):
    return Recipe(
        model=small_config(num_layers=2, embed_dim=64, mlp_dim=64, num_heads=2, vision_dim=16),
        curriculum=Curriculum(stages=STAGES, seed=3),
        optimizer=OptimizerSettings(warmup_steps=2, learning_rate=3e-3, **optimizer),
        compute=Compute(dtype="float32", attention="xla"),
    )


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    whole = train(recipe(), tmp_path / "whole", num_workers=0, log_steps=1)
    for until in (3, 5, None):  # within a stage, between stages, to the end
        stopped = train(recipe(), tmp_path / "stopped", num_workers=0, log_steps=1, until_step=until)
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")
    assert sorted(losses(tmp_path / "whole")) == list(range(8))
    jax.tree.map(np.testing.assert_array_equal, whole, stopped)


def test_lines_written_after_the_last_checkpoint_are_measured_again(tmp_path):
    train(recipe(kind="muon"), tmp_path, num_workers=0, log_steps=1, until_step=3)
    kept = losses(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as log:  # a killed process wrote on after its checkpoint
        print(json.dumps({"step": 3, "loss": -1.0}), file=log)
    train(recipe(kind="muon"), tmp_path, num_workers=0, log_steps=1, until_step=4)
    found = losses(tmp_path)
    assert found.keys() == {0, 1, 2, 3} and found[3] > 0
    assert {step: found[step] for step in kept} == kept


def test_other_processes_make_the_same_batches():
    curriculum = Curriculum(stages=STAGES, seed=3)
    with Loader(curriculum.batch, range(6), 1) as made:
        for step, batch in enumerate(made):
            jax.tree.map(np.testing.assert_array_equal, batch, curriculum.batch(step))
    assert curriculum.stage(3) == STAGES[0] and curriculum.stage(4) == STAGES[1]
    with pytest.raises(ValueError, match="has 8 steps, step 8 lies behind"):
        curriculum.stage(8)
