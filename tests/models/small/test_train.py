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
from models.small.train import STAGE_LINES, Recipe, Trainer, _goes_on, train

STAGES = (Stage(num_tokens=128, batch=2, num_steps=6), Stage(num_tokens=192, batch=1, num_steps=4))


@pytest.fixture(scope="module")
def trainer():
    return Trainer(
        Recipe(
            model=small_config(num_layers=1, embed_dim=64, mlp_dim=64, num_heads=2, vision_dim=16),
            curriculum=Curriculum(stages=STAGES[:1], seed=3),
            optimizer=OptimizerSettings(kind="muon", warmup_steps=2),
            compute=Compute(dtype="float32", attention="xla"),
        )
    )


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_bit_for_bit(trainer, tmp_path):
    whole = train(trainer, tmp_path / "whole", num_workers=0, log_steps=1)
    train(trainer, tmp_path / "stopped", num_workers=0, log_steps=1, until_step=2)
    before = losses(tmp_path / "stopped")
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as log:  # a killed process wrote on after its checkpoint
        print(json.dumps({"step": 2, "loss": -1.0}), file=log)
    stopped = train(trainer, tmp_path / "stopped", num_workers=0, log_steps=1)
    assert sorted(before) == [0, 1]
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")
    assert sorted(losses(tmp_path / "whole")) == list(range(6))
    jax.tree.map(np.testing.assert_array_equal, whole, stopped)


def test_the_callback_decides_where_a_length_ends_and_is_given_its_accuracy_on_digits(tmp_path):
    calls = []

    def on_stage_end(stage, digit_accuracy):
        calls.append((stage, digit_accuracy))
        return False

    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    curriculum = Curriculum(stages=STAGES, seed=3)
    assert not _goes_on(curriculum, 5, path, on_stage_end)
    assert calls.pop()[0] == STAGES[0]
    lines = [{"num_tokens": 64, "digit_accuracy": 1.0}]
    lines += [{"num_tokens": 128, "digit_accuracy": 0.1 * n} for n in range(STAGE_LINES + 2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [_goes_on(curriculum, step, path, on_stage_end) for step in range(10)] == [True] * 5 + [False] + [True] * 4
    ((stage, accuracy),) = calls
    assert stage == STAGES[0] and accuracy == pytest.approx(0.1 * (2 + (STAGE_LINES - 1) / 2))


@pytest.mark.slow
def test_other_processes_make_the_same_batches():
    curriculum = Curriculum(stages=STAGES, seed=3)
    with Loader(curriculum.batch, range(4, 8), 1) as batches:
        for step, batch in enumerate(batches, start=4):
            jax.tree.map(np.testing.assert_array_equal, batch, curriculum.batch(step))
    assert curriculum.stage(5) == STAGES[0] and curriculum.stage(6) == STAGES[1]
    with pytest.raises(ValueError, match="has 10 steps, step 10 lies behind"):
        curriculum.stage(10)
