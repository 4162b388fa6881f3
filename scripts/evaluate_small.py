"""Accuracy of the small model, dense, by task, length and depth; a table, and a JSON line per cell.

python scripts/evaluate_small.py out/accuracy.jsonl                        # all lengths, on a GPU
python scripts/evaluate_small.py out/accuracy.jsonl --lengths 2048:4       # on a CPU, 4 samples per cell
python scripts/evaluate_small.py out/accuracy.jsonl --lengths "32768:8 65536:6:v_niah,mm_niah"
"""

import collections
import json
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.table import Table

from models import open_checkpoint
from models.assets.demo import DEMO_MODEL
from models.small.evaluate import Cell, evaluate
from models.small.forward import Compute
from models.tasks import TASKS

BATCH_TOKENS = 131_072
"""Tokens that run at once."""


def main(
    path: Annotated[Path, typer.Argument(help="File of results, a JSON line per batch of samples.")],
    model: Annotated[Path, typer.Option(help="Checkpoint of the small model.")] = DEMO_MODEL,
    lengths: Annotated[
        str, typer.Option(help="TOKENS:SAMPLES[:TASKS] of the prompts, in order; samples per task and depth.")
    ] = "2048:16 8192:16 32768:16 65536:16",
    depths: Annotated[
        str, typer.Option(help="Depths of the needle, as fractions of the prompt.")
    ] = "0,0.25,0.5,0.75,1",
    fps: Annotated[float, typer.Option(help="Frames per second of the videos.")] = 2.0,
    held_out: Annotated[bool, typer.Option(help="Also with digits of writers the model never saw.")] = True,
    num_workers: Annotated[int, typer.Option(help="Processes that make prompts.")] = 2,
) -> None:
    """Runs all cells."""
    is_gpu = jax.default_backend() == "gpu"
    compute = Compute() if is_gpu else Compute(dtype="float32", attention="xla")
    cells = [
        Cell(task=task, num_tokens=n, depth=depth, first_seed=seed, num_samples=count, is_held_out=is_held_out, fps=fps)
        for n, samples, tasks in map(_length, lengths.split())
        for is_held_out in ([False, True] if held_out else [False])
        for task in tasks
        for depth in map(float, depths.split(","))
        for seed, count in _pieces(samples, max(1, BATCH_TOKENS // n) if is_gpu else 1)
    ]
    left = collections.Counter((cell.num_tokens, cell.is_held_out, cell.task) for cell in cells)
    counts = collections.defaultdict(lambda: [0, 0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        loaded = open_checkpoint(model).load_model(dtype=jnp.dtype(compute.dtype))
        for result in evaluate(loaded, cells, compute=compute, num_workers=num_workers):
            print(json.dumps(result), file=file, flush=True)
            key = result["num_tokens"], result["is_held_out"], result["task"]
            counts[key][0] += result["num_right"]
            counts[key][1] += result["num_questions"]
            left[key] -= 1
            if not left[key]:
                print(
                    f"{key[0]:6d} tokens, held out {key[1]!s:5}  {key[2]:8} {counts[key][0]} of {counts[key][1]}",
                    flush=True,
                )
    table = Table("tokens", "digits", *TASKS)
    for num_tokens, is_held_out in dict.fromkeys(key[:2] for key in counts):
        rows = [counts[num_tokens, is_held_out, task] for task in TASKS]
        accuracies = [f"{right / total:.1%} of {total}" if total else "" for right, total in rows]
        table.add_row(f"{num_tokens:,}", "held out" if is_held_out else "trained on", *accuracies)
    Console().print(table)


def _length(text: str) -> tuple[int, int, list[str]]:
    """Tokens, samples and tasks of `TOKENS:SAMPLES[:TASKS]`."""
    num_tokens, samples, *tasks = text.split(":")
    names = tasks[0].split(",") if tasks else list(TASKS)
    if unknown := set(names) - set(TASKS):
        raise typer.BadParameter(f"tasks must be some of {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")
    return int(num_tokens), int(samples), names


def _pieces(num_samples: int, max_samples: int) -> list[tuple[int, int]]:
    """(first seed, samples) of equal batches; seeds beyond any step of the training."""
    count = max(n for n in range(1, min(num_samples, max_samples) + 1) if num_samples % n == 0)
    return [(10**6 + start, count) for start in range(0, num_samples, count)]


if __name__ == "__main__":
    typer.run(main)
