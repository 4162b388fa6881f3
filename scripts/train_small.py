"""Training of the small model of models/assets/small; an earlier run that was stopped goes on. Needs the extra `dev`.

python scripts/train_small.py out/small                    # the recipe: about 8 minutes of an H200 and 16 cores
python scripts/train_small.py out/small --until-step 200   # stop early; the same command without it goes on
python scripts/train_small.py out/tiny --tiny              # a few steps of a toy on a CPU
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Annotated

import jax
import typer
from flax import nnx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models import Model, family_of
from models.small.config import small_config
from models.small.curriculum import Stage
from models.small.forward import Compute
from models.small.optimizer import OptimizerSettings
from models.small.plots import plot_training
from models.small.recipe import RECIPE, with_stages
from models.small.release import release
from models.small.stream import KINDS
from models.small.train import Recipe, Trainer, train

PRINT_SECONDS = 10.0
"""Seconds between lines where no progress bar can be shown."""


def main(
    directory: Annotated[Path, typer.Argument(help="Checkpoints, measurements, plots and the released model.")],
    num_workers: Annotated[int, typer.Option(help="Processes that make batches.")] = 14,
    until_step: Annotated[int | None, typer.Option(help="Step to stop after.")] = None,
    until_seconds: Annotated[float, typer.Option(help="Seconds to stop after.")] = float("inf"),
    save_seconds: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 120.0,
    stop_below: Annotated[
        float,
        typer.Option(help="Fraction of digits right at the end of a length, below which to stop with exit code 1."),
    ] = 0.0,
    tiny: Annotated[bool, typer.Option(help="A toy recipe, to see the script work.")] = False,
) -> None:
    """Trains; Ctrl-C loses at most the steps since the last checkpoint. The model is written however far it came."""
    recipe = tiny_recipe() if tiny else RECIPE
    if jax.default_backend() != "gpu":
        recipe = dataclasses.replace(recipe, compute=Compute(dtype="float32", attention="xla", remats=True))
    trainer = Trainer(recipe)
    unlearnt: list[str] = []
    printed = [-PRINT_SECONDS]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("compiling", total=recipe.curriculum.num_steps)

        def on_step(step: int, line: dict) -> None:
            accuracies = ", ".join(f"{kind} {line[f'{kind}_accuracy']:.0%}" for kind in KINDS)
            text = f"{line['num_tokens']} tokens, loss {line['question_loss']:.3f}, {accuracies}"
            progress.update(bar, completed=step + 1, description=text)
            if not progress.console.is_terminal and line["seconds"] > printed[-1] + PRINT_SECONDS:
                printed.append(line["seconds"])
                print(f"{line['seconds']:6.1f} s  step {step + 1:5d}  {text}", flush=True)

        def on_stage_end(stage: Stage, digit_accuracy: float) -> bool:
            if digit_accuracy < stop_below:
                unlearnt.append(f"{digit_accuracy:.0%} of digits right after {stage.num_tokens} tokens")
            return not unlearnt

        state = train(
            trainer,
            directory,
            num_workers=num_workers,
            until_step=until_step,
            until_seconds=until_seconds,
            save_seconds=save_seconds,
            log_steps=2 if tiny else 10,
            on_step=on_step,
            on_stage_end=on_stage_end,
        )
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    plot_training(lines, directory / "training.png")
    print(f"{int(state.step)} of {recipe.curriculum.num_steps} steps done; curves in {directory / 'training.png'}")
    shutil.rmtree(directory / "model", ignore_errors=True)  # of an earlier stop
    release(in_bfloat16(recipe, state.params), directory / "model")
    print(f"the model is in {directory / 'model'}")
    if unlearnt:
        print(f"stopped: {unlearnt[0]}, less than --stop-below {stop_below:.0%}; the same command goes on anyway")
        raise typer.Exit(1)


def in_bfloat16(recipe: Recipe, params) -> Model:
    """The model as it ships."""
    graphdef = nnx.split(family_of(recipe.model).abstract_model(recipe.model, dtype="bfloat16"))[0]
    return nnx.merge(graphdef, jax.tree.map(lambda p: p.astype("bfloat16"), params))


def tiny_recipe() -> Recipe:
    """Seconds on a CPU; it learns next to nothing."""
    return dataclasses.replace(
        with_stages((Stage(num_tokens=128, batch=2, num_steps=10), Stage(num_tokens=192, batch=1, num_steps=6))),
        model=small_config(num_layers=1, embed_dim=64, mlp_dim=64, num_heads=2, vision_dim=16),
        optimizer=OptimizerSettings(kind="muon", warmup_steps=4),
    )


if __name__ == "__main__":
    typer.run(main)
