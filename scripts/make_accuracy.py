"""The page of evidence, docs/accuracy.md: a model's answers with sparse attention, its heads, and the limits.

    python scripts/make_accuracy.py --model DIR --tokens 8192 --tokens 32768 --target-density 0.2

`mmi search` runs three times (ours, without boundaries, without Grid; the trials are run once), `mmi niah` on all tasks
and methods, and heads are drawn. Everything is kept in --work: a stage whose result is there is not run again, and a
killed one goes on where it stopped. With --page-only neither is run, for results that were computed on another machine
and copied; but pictures are drawn, and recall is measured where recall.json is missing or of other tables, which at
32,768 tokens takes one core of a CPU a quarter of an hour, most of it to compile. The page is written from these
results alone; notes by hand are in docs/accuracy_notes.md, which is put at its end.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from accuracy_page import write_page

from mmi_jax import Blocks, PatternTable, prefill
from mmi_jax.cli import main
from mmi_jax.cli.pictures import write_figure
from mmi_jax.cli.samples import DEFAULT_TASKS, SampleSource, haystack_of
from mmi_jax.files import write_whole
from mmi_jax.method.patterns import Boundary2D, Dense, Grid, Pattern, QBoundary
from mmi_jax.method.plan import plan_heads, prompt_geometry
from mmi_jax.method.tables.pattern_table import load_table
from mmi_jax.plots import table_plots
from mmi_jax.plots.attention_map import plot_attention
from mmi_jax.plots.mask_plot import plot_mask
from mmi_jax.search.activations import LayerActivations, layer_activations
from mmi_jax.search.costs import DENSITY
from mmi_jax.search.scores import Choice, Scores, read_scores
from mmi_jax.search.trials.journal import read_journal
from mmi_jax.search.trials.measurement import modalities_of
from mmi_jax.search.trials.trial import trial_of
from models import Processor, open_checkpoint

ROOT = Path(__file__).parents[1]
TABLES = {"ours": (), "no inter-modality": ("QBoundary", "Boundary2D"), "no Grid": ("Grid",)}
"""Searched methods by name, and the patterns that each excludes."""

BASELINES = ("minference", "a-shape", "tri-shape", "sf-fixed", "sf-strided", "swin", "block-topk")
PICTURE_PRICE = 0.3
"""Error that a head may make to save all of its tiles, when the heads to draw are chosen: the largest of
`joint_trials.PRICES`, so that sparse heads are drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `accuracy`."""

    model: str
    work: Path
    output: Path
    tasks: tuple[str, ...]
    tokens: tuple[int, ...]
    calibration_tokens: int
    samples: int
    target_density: float
    depths: int
    samples_per_cell: int
    candidates: str
    scale: float
    dtype: str
    costs: str | None
    picture_tokens: int
    side_by_side: int

    @property
    def pictures(self) -> Path:
        """Where pictures go."""
        return self.output.with_suffix("")

    def table_file(self, name: str) -> Path:
        """The searched table of a method."""
        return self.work / f"{name.replace(' ', '-')}.json"


def run_search(options: Options) -> None:
    """The searched tables that are not there yet."""
    for name, excluded in TABLES.items():
        if not options.table_file(name).exists():
            _run(
                "search",
                model=options.model,
                task=options.tasks,
                tokens=options.calibration_tokens,
                samples=options.samples,
                held_out_samples=options.samples,
                target_density=options.target_density,
                candidates=options.candidates,
                scale=options.scale,
                exclude=excluded,
                cost_model=options.costs,
                dtype=options.dtype,
                journal=options.work / "search.jsonl",
                output=options.table_file(name),
            )


def run_niah(options: Options) -> None:
    """The grid of tasks, lengths, depths and methods, unless it is filled."""
    if not (options.work / "niah" / "results.json").exists():
        _run(
            "niah",
            model=options.model,
            task=options.tasks,
            tokens=options.tokens,
            depths=options.depths,
            samples=options.samples_per_cell,
            method=("dense", *(f"{name}={options.table_file(name)}" for name in TABLES), *BASELINES),
            match_cost="ours",
            cost_model=options.costs,
            dtype=options.dtype,
            parallel_compilations=options.side_by_side,
            output=options.work / "niah",
        )


def _run(command: str, **options: str | Path | int | float | tuple[str | int, ...] | None) -> None:
    """One command of `mmi`; an option that is a tuple is given once for each of its values."""
    arguments = [command]
    for name, value in options.items():
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        arguments += [word for one in values for word in (f"--{name.replace('_', '-')}", str(one))]
    if status := main(arguments):
        raise SystemExit(status)


def example_prompt(processor: Processor, num_tokens: int) -> Any:
    """One prompt of at most so many tokens, with text and video."""
    source = SampleSource(processor=processor, haystack=haystack_of("generated"))
    return processor(list(source.sample("mm-niah", num_tokens=num_tokens, depth=0.5, seed=1).parts))


def measure_recall(work: Path, model: Any, prompt: Any, table: PatternTable) -> dict[str, Any]:
    """Density and recall of every head on one prompt, kept in `work`; measured again for another length or table."""
    path, made_of = work / "recall.json", {"tokens": prompt.tokens.shape[1], "table": repr(table.layers)}
    kept = json.loads(path.read_text()) if path.exists() else {}
    if any(kept.get(name) != value for name, value in made_of.items()):
        report = prefill(model, prompt, table=table, may_run_dense=False).report
        kept = made_of | {"density": report.density.tolist(), "recall": report.recall.tolist()}
        write_whole(path, json.dumps(kept))
    return kept


def search_scores(options: Options, modalities: tuple[int, ...], table: PatternTable) -> Scores:
    """The scores behind the tables: those of the trials that every calibration prompt and layer has."""
    entries = [entry for entry in read_journal(options.work / "search.jsonl")[1] if "trials" in entry]
    keys: dict[tuple[str, int], set[str]] = {}
    for entry in entries:
        keys.setdefault((entry["prompt"], entry["layer"]), set()).update(entry["trials"])
    max_trials = max(map(len, keys.values()))
    names = sorted({prompt for (prompt, _), measured in keys.items() if len(measured) == max_trials})
    trials = [trial_of(key) for key in sorted(set.intersection(*(keys[key] for key in keys if key[0] in names)))]
    lengths = dict.fromkeys(names, options.calibration_tokens)
    return read_scores(entries, lengths, trials, num_layers=table.num_layers, modalities=modalities, blocks=Blocks())


def best_of_kind(scores: Scores, kind: type[Pattern]) -> tuple[int, int, Pattern, float] | None:
    """Layer, head, pattern and error of the head that a kind of pattern suits best; None where none was tried.

    Among 2D-Boundary patterns are those of the intra-modality step, with pairs of different modalities dense.
    """
    own = [
        Choice(pattern=t.pattern(scores.modalities), trials=(t,) * len(scores.modalities))
        for t in scores.by_trial
        if t.step == "own" and t.candidate != Dense()
    ]
    heads = []
    for layer in range(scores.num_layers):
        for head in range(scores.num_heads):
            of_head = scores.options(layer, head, DENSITY) + [scores.option(c, layer, head, DENSITY) for c in own]
            for option in of_head:
                if isinstance(option.item.pattern, kind):
                    price = option.error + PICTURE_PRICE * option.cost
                    heads.append((price, layer, head, option.item.pattern, option.error))
    return min(heads, key=lambda row: row[:3])[1:] if heads else None


def draw_head(options: Options, activations: LayerActivations, layer: int, head: int, pattern: Pattern) -> list[str]:
    """Pictures of one head's attention and mask before and after permutation; their names."""
    q, k, layout = activations.q[0], activations.k[0], jax.tree.map(lambda x: x[0], activations.layout)
    kv_head = head // (q.shape[1] // k.shape[1])
    geometry = prompt_geometry(layout, [pattern], num_queries=q.shape[0], q_start=jnp.int32(0), blocks=Blocks())
    scale = q.shape[-1] ** -0.5
    one_q, one_k = q[:, head : head + 1], k[:, kv_head : kv_head + 1]
    plan = plan_heads([pattern], one_q, one_k, geometry, scale=scale, blocks=Blocks())
    name = f"{type(pattern).__name__}-layer{layer}-head{head}"
    title = f"layer {layer}, head {head}: {type(pattern).__name__}"
    figures = {
        f"attention-{name}.png": plot_attention(
            plan, 0, one_q[:, 0], one_k[:, 0], layout.pos, scale=scale, title=title
        ),
        f"mask-{name}.png": plot_mask(plan, 0, layout, title=title),
    }
    return [write_figure(options.pictures / file, figure).name for file, figure in figures.items()]


def draw_heads(options: Options, model: Any, prompt: Any, scores: Scores, table: PatternTable) -> list[dict[str, Any]]:
    """What is shown of a Grid, a Q-Boundary and a 2D-Boundary head; kinds that were never tried are left out."""
    chosen = {kind.__name__: best_of_kind(scores, kind) for kind in (Grid, QBoundary, Boundary2D)}
    drawn = {name: head for name, head in chosen.items() if head is not None}
    last = max((layer for layer, *_ in drawn.values()), default=-1)
    shown = []
    for n, activations in enumerate(layer_activations(model, prompt, blocks=Blocks(), num_layers=last + 1)):
        for kind, (layer, head, pattern, error) in drawn.items():
            if layer == n:
                files = draw_head(options, activations, layer, head, pattern)
                given = repr(table.layers[layer][head])
                place = {"kind": kind, "layer": layer, "head": head}
                shown.append({**place, "pattern": repr(pattern), "error": error, "given": given, "files": files})
    return shown


def make(options: Options, *, runs: bool) -> None:
    """All stages, the page last."""
    options.work.mkdir(parents=True, exist_ok=True)
    options.pictures.mkdir(parents=True, exist_ok=True)
    if runs:
        run_search(options)
        run_niah(options)
    results = json.loads((options.work / "niah" / "results.json").read_text())
    tables = {name: load_table(options.table_file(name)) for name in TABLES}
    checkpoint = open_checkpoint(options.model)
    processor = checkpoint.read_processor()
    prompt = example_prompt(processor, options.picture_tokens)
    model = checkpoint.load_model(dtype=jnp.dtype(options.dtype))
    recall = measure_recall(options.work, model, example_prompt(processor, options.calibration_tokens), tables["ours"])
    scores = search_scores(options, modalities_of(prompt.layout), tables["ours"])
    shown = draw_heads(options, model, prompt, scores, tables["ours"])
    write_figure(options.pictures / "patterns.png", table_plots.plot_patterns(tables["ours"]))
    if tables["ours"].scores is not None:
        write_figure(options.pictures / "scores.png", table_plots.plot_scores(tables["ours"].scores))
    for path in (options.work / "niah").glob("*.png"):
        (options.pictures / path.name).write_bytes(path.read_bytes())
    notes = ROOT / "docs" / "accuracy_notes.md"
    write_page(
        options.output,
        results,
        tables,
        recall,
        shown,
        picture_tokens=prompt.tokens.shape[1],
        notes=notes.read_text() if notes.exists() else "",
        command=command_of(options),
    )
    print(f"wrote {options.output} and pictures into {options.pictures}")


def command_of(options: Options) -> str:
    """The command that writes the same page again, as far as figures depend on it."""
    path = Path(options.model).resolve()
    model = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    words = [f"--model {model}", *(f"--task {name}" for name in options.tasks)]
    words += [*(f"--tokens {n}" for n in options.tokens), f"--samples {options.samples}"]
    return " ".join(["python scripts/make_accuracy.py", *words, f"--target-density {options.target_density}"])


def accuracy(
    model: Annotated[str, typer.Option(help="Checkpoint directory.")],
    work: Annotated[Path, typer.Option(help="Results of all stages.")] = Path("out/accuracy"),
    output: Annotated[Path, typer.Option(help="The page.")] = ROOT / "docs" / "accuracy.md",
    task: Annotated[list[str] | None, typer.Option(help="As for mmi niah.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Lengths of the prompts.")] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="Of the search: the longest of --tokens.")] = None,
    samples: Annotated[int, typer.Option(help="Samples of each task, for calibration and as many to check it on.")] = 1,
    target_density: Annotated[float, typer.Option(help="Of the searched tables.")] = 0.2,
    depths: Annotated[int, typer.Option(help="Depths of the needle.")] = 5,
    samples_per_cell: Annotated[int, typer.Option(help="Samples of each cell.")] = 4,
    candidates: Annotated[str, typer.Option(help="As for mmi search.")] = "all",
    scale: Annotated[float, typer.Option(help="As for mmi search.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="Type the model computes in.")] = "bfloat16",
    costs: Annotated[str | None, typer.Option(help="As for mmi search.")] = None,
    picture_tokens: Annotated[int, typer.Option(help="Of the prompt whose heads are drawn.")] = 4096,
    side_by_side: Annotated[int, typer.Option(help="As for mmi niah.")] = 1,
    page_only: Annotated[bool, typer.Option("--page-only", help="Run neither search nor niah.")] = False,
) -> None:
    """Write the page of evidence for a model."""
    lengths = tuple(tokens or (4096,))
    options = Options(
        model=model,
        work=work,
        output=output,
        tasks=tuple(task or DEFAULT_TASKS),
        tokens=lengths,
        calibration_tokens=calibration_tokens or max(lengths),
        samples=samples,
        target_density=target_density,
        depths=depths,
        samples_per_cell=samples_per_cell,
        candidates=candidates,
        scale=scale,
        dtype=dtype,
        costs=costs,
        picture_tokens=picture_tokens,
        side_by_side=side_by_side,
    )
    make(options, runs=not page_only)


if __name__ == "__main__":
    typer.run(accuracy)
