"""Training of the small model: a recipe, a step, checkpoints from which a run goes on as if never stopped."""

import concurrent.futures
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array

from mmi_jax.files import write_whole
from models.families import family_of
from models.interface import ModelConfig
from models.small.bank import Bank, make_bank
from models.small.curriculum import Curriculum, Stage
from models.small.forward import Compute, loss_and_metrics
from models.small.loader import Loader
from models.small.optimizer import OptimizerSettings, make_optimizer
from pallas_kernels.pytree import pytree

STAGE_LINES = 8
"""Measurements, of a stage's last ones, that tell how well it went."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a run's result depends on."""

    model: ModelConfig
    curriculum: Curriculum
    optimizer: OptimizerSettings = OptimizerSettings()
    compute: Compute = Compute()


@pytree
class TrainState:
    """State of a run from step to step; `step` counts the steps done."""

    params: Any
    optimizer: Any
    step: Array


class Trainer:
    """A recipe with its compiled steps: one program per stage, compiled in the background before it is needed."""

    def __init__(self, recipe: Recipe):
        """Starts to compile the stages in order."""
        self.recipe = recipe
        self.bank = make_bank()
        self.graphdef = nnx.split(family_of(recipe.model).abstract_model(recipe.model, dtype=recipe.compute.dtype))[0]
        self.optimizer = make_optimizer(recipe.optimizer, recipe.curriculum.num_steps)
        self._compiler = concurrent.futures.ThreadPoolExecutor(2)
        self._programs: dict[tuple[int, int], concurrent.futures.Future] = {}

    def initial_state(self) -> TrainState:
        """Random parameters of the recipe's seed, float32."""
        rngs = nnx.Rngs(self.recipe.curriculum.seed)
        model = family_of(self.recipe.model).new_model(self.recipe.model, dtype=jnp.float32, rngs=rngs)
        params = nnx.split(model)[1]
        return TrainState(params=params, optimizer=self.optimizer.init(params), step=jnp.int32(0))

    def compile_ahead(self, state: TrainState, from_step: int = 0) -> None:
        """Begins to compile the programs of all stages from a step on."""
        for stage in self.recipe.curriculum.stages_from(from_step):
            key = (stage.num_tokens, stage.batch)
            if key not in self._programs:
                self._programs[key] = self._compiler.submit(self._compile, state_shapes(state), stage)

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        """The state after one more batch, and what was measured on it; the old state is used up."""
        num_streams, num_tokens = batch.tokens.shape
        program = self._programs[num_tokens, num_streams].result()
        return program(state, jax.tree.map(jnp.asarray, batch), self.bank)

    def _compile(self, state: Any, stage: Stage):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stage.empty_batch())
        bank = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.bank)
        return jax.jit(self._step, donate_argnums=0).lower(state, shapes, bank).compile()

    def _step(self, state: TrainState, batch: Any, bank: Bank):
        grad = jax.value_and_grad(loss_and_metrics, has_aux=True)
        (loss, metrics), grads = grad(state.params, self.graphdef, batch, bank, self.recipe.compute)
        updates, optimizer = self.optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"loss": loss, "gradient_norm": optax.tree.norm(grads)}
        return TrainState(params=params, optimizer=optimizer, step=state.step + 1), metrics


def state_shapes(state: TrainState) -> Any:
    """The state with shapes in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def train(
    trainer: Trainer,
    directory: Path,
    *,
    num_workers: int,
    save_seconds: float = 120.0,
    log_steps: int = 20,
    until_step: int | None = None,
    until_seconds: float = float("inf"),
    on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    on_stage_end: Callable[[Stage, float], bool] = lambda stage, digit_accuracy: True,
) -> TrainState:
    """Runs the trainer's recipe from its last checkpoint in `directory`, or from the start, and leaves a checkpoint.

    Measurements are appended to `directory/metrics.jsonl`, a line each `log_steps` steps: those of that one step.

    Args:
        trainer: of the recipe.
        directory: of checkpoints and measurements.
        num_workers: processes that make batches; 0 makes them here.
        save_seconds: seconds between checkpoints.
        log_steps: steps between measurements.
        until_step: step to stop after, the recipe's last when None.
        until_seconds: seconds after which to stop, measured from the call.
        on_step: called with each measured step.
        on_stage_end: called where the length changes, with the stage that is over and its accuracy on digits,
            the mean of its last `STAGE_LINES` measurements; the run stops if it returns False.
    """
    start = last_save = time.perf_counter()
    recipe = trainer.recipe
    last_step = min(until_step or recipe.curriculum.num_steps, recipe.curriculum.num_steps)
    with ocp.CheckpointManager(
        directory.absolute() / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as saved:
        state = _restored(saved, trainer.initial_state())
        first = int(state.step)
        trainer.compile_ahead(state, first)
        metrics_path = directory / "metrics.jsonl"
        _cut_metrics(metrics_path, first)
        with (
            metrics_path.open("a") as log,
            Loader(recipe.curriculum.batch, range(first, last_step), num_workers) as batches,
        ):
            for step, batch in enumerate(batches, start=first):
                state, metrics = trainer.step(state, batch)
                seconds = time.perf_counter() - start
                if (step + 1) % log_steps == 0 or step + 1 == last_step:
                    line = _line(step, batch.tokens.shape[1], metrics, seconds)
                    print(json.dumps(line), file=log, flush=True)
                    on_step(step, line)
                if seconds > until_seconds or not _goes_on(recipe.curriculum, step, metrics_path, on_stage_end):
                    break
                if time.perf_counter() - last_save > save_seconds:
                    saved.save(step + 1, args=ocp.args.StandardSave(_as_arrays(state)))
                    last_save = time.perf_counter()
        if int(state.step) > first and saved.latest_step() != int(state.step):
            saved.save(int(state.step), args=ocp.args.StandardSave(_as_arrays(state)))
    return state


def _restored(saved: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """The newest checkpoint, or `state` if there is none."""
    if saved.latest_step() is None:
        return state
    leaves = saved.restore(saved.latest_step(), args=ocp.args.StandardRestore(_as_arrays(state)))
    return jax.tree.unflatten(jax.tree.structure(state), [jnp.asarray(leaves[key]) for key in _as_arrays(state)])


def _as_arrays(state: TrainState) -> dict[str, Array]:
    """The state's arrays by number, so that a checkpoint does not depend on the names of classes."""
    return {f"{number:05d}": leaf for number, leaf in enumerate(jax.tree.leaves(state))}


def _cut_metrics(path: Path, first_step: int) -> None:
    """Removes the lines that a run wrote after its last checkpoint."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < first_step]
        write_whole(path, "".join(line + "\n" for line in lines))


def _goes_on(curriculum: Curriculum, step: int, path: Path, on_stage_end: Callable[[Stage, float], bool]) -> bool:
    """Whether training goes on after the step: at a stage's end `on_stage_end` decides, given NaN if unmeasured."""
    if not curriculum.ends_stage(step):
        return True
    stage = curriculum.stage(step)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    accuracies = [line["digit_accuracy"] for line in lines if line["num_tokens"] == stage.num_tokens]
    return on_stage_end(stage, float(np.mean(accuracies[-STAGE_LINES:])) if accuracies else float("nan"))


def _line(step: int, num_tokens: int, metrics: dict[str, Array], seconds: float) -> dict[str, Any]:
    values = {name: float(np.asarray(value)) for name, value in metrics.items()}
    return {"step": step, "num_tokens": num_tokens, "seconds": round(seconds, 2), **values}
