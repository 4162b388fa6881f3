"""The stages of `mmi search`: prompts, trials, the best table within the budget, the held-out check, the file."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp

from mmi_jax import PatternTable
from mmi_jax.bench.timing.machine import machine
from mmi_jax.cli import console
from mmi_jax.cli.digest import run_on
from mmi_jax.cli.search.options import SearchOptions
from mmi_jax.cli.search.prompts import Prompts, calibration_prompts, held_out_prompts, importance_prompts
from mmi_jax.cli.show.table_view import print_table
from mmi_jax.method.tables.cost_model import CostModel
from mmi_jax.search.candidates import Candidates
from mmi_jax.search.choice import SearchResult, choose_patterns, relative_costs
from mmi_jax.search.costs import cost_models, default_costs
from mmi_jax.search.importance import ABLATED
from mmi_jax.search.run import Search
from mmi_jax.search.scores import Scores
from mmi_jax.search.trials.journal import Journal
from mmi_jax.search.trials.measurement import METRICS, modalities_of
from mmi_jax.search.trials.trial import first_trials
from models import Prompt, open_checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSummary:
    """A finished search: the table, and the errors behind it."""

    table: PatternTable
    calibration_error: float
    held_out_error: float | None


def run_search(options: SearchOptions) -> SearchSummary:
    """Searches, writes the table and prints it.

    Raises:
      ValueError: a prompt cannot be made, the work file is another search's, or the target cannot be reached; what was
        measured stays in the work file.
    """
    out = console.stderr_console()
    checkpoint = open_checkpoint(options.model)
    processor = checkpoint.read_processor()
    with console.spinner("prompts"):
        prompts = calibration_prompts(processor, options.calibration)
        importance = importance_prompts(processor, options.calibration) if options.weights_by_importance else None
        held_out = held_out_prompts(processor, options.calibration)
    candidates = options.read_candidates()
    journal = Journal(options.journal, _run_of(options, checkpoint.directory, prompts, importance))
    with console.progress_bar("loading weights", "tensors") as on_tensor:
        model = checkpoint.load_model(dtype=jnp.dtype(options.dtype), on_tensor=on_tensor)
    name = options.cost_model or default_costs()
    costs = cost_models()[name]
    out.print(forecast(candidates, prompts.by_name, model.config, name, costs), markup=False, soft_wrap=True)
    start = time.perf_counter()
    with console.work_bar("trials") as on_trial:
        search = Search(model=model, journal=journal, on_trial=on_trial)
        weights = (
            search.importance_weights(importance.by_name, answer_rows=importance.answer_rows) if importance else None
        )
        scores = search.calibrate(prompts.by_name, candidates, answer_rows=prompts.answer_rows, weights=weights)
    with console.spinner("choosing"):
        best = choose_patterns(scores, options.target.value, costs, excluded=options.excluded)
    on_others = None
    if held_out.by_name:
        with console.work_bar("trials") as on_trial:
            search = dataclasses.replace(search, on_trial=on_trial)
            search.measure(held_out.by_name, best.trials, "held-out prompts", answer_rows=held_out.answer_rows)
        on_others = search.scores(held_out.by_name, best.trials, weights)
    provenance = _provenance(options, journal, name, best, scores, costs, on_others)
    provenance["seconds of this run"] = f"{time.perf_counter() - start:.0f}"
    table = PatternTable(
        layers=tuple(tuple(choice.pattern for choice in row) for row in best.choices),
        model=Path(options.model).name,
        provenance=provenance,
        scores=best.scores,
    )
    table.save(options.output)
    print_table(table, console.stdout_console())
    print(f"wrote {options.output}")
    held_out_error = None if on_others is None else best.error_on(on_others)
    return SearchSummary(table=table, calibration_error=best.error_on(scores), held_out_error=held_out_error)


def _run_of(options: SearchOptions, directory: Path, prompts: Prompts, importance: Prompts | None) -> dict[str, str]:
    """What the trials' figures are and depend on: a journal of anything else is refused."""
    run = run_on(options.model, directory, options.dtype)
    run |= {"measured": ", ".join(METRICS), "calibration": prompts.description}
    return run if importance is None else run | {"heads weighted": f"by {ABLATED} on {importance.description}"}


def _provenance(
    options: SearchOptions,
    journal: Journal,
    cost_name: str,
    best: SearchResult,
    scores: Scores,
    costs: CostModel,
    on_others: Scores | None,
) -> dict[str, str]:
    """The provenance of the table, as text by name."""
    candidates = options.read_candidates()
    error = best.error_on(scores)
    where = machine()
    provenance = {
        "source": "mmi search",
        **journal.run,
        "target": str(options.target.value),
        "costs": f"{cost_name} ({'counted tiles' if cost_name == 'tiles' else 'milliseconds'})",
        "attention cost": _highest(best.relative_costs, "calibration prompt"),
        "error": f"{error:.6g} (mean over heads{', weighted,' if options.weights_by_importance else ''} of the "
        "relative squared error of the attention output; half of it is that of the rows from which answers are read, "
        "where a prompt has such)",
        "candidates": f"{len(candidates.within)} within, {len(candidates.across)} across modalities, "
        f"{len(scores.by_trial)} trials",
        "excluded": ", ".join(sorted(options.excluded)) or "nothing",
        "date": where["date"],
        "commit": where["commit"],
        "jax": where["jax"],
    }
    if on_others is not None:
        held_out_error = best.error_on(on_others)
        provenance["held-out cost"] = _highest(relative_costs(best.choices, on_others, costs), "held-out prompt")
        provenance["held-out error"] = f"{held_out_error:.6g} ({held_out_error / max(error, 1e-12) - 1:+.1%})"
    return provenance


def _highest(costs: Mapping[str, float], what: str) -> str:
    """The cost of the most expensive prompt, and the mean."""
    name, cost = max(costs.items(), key=lambda item: item[1])
    mean = sum(costs.values()) / len(costs)
    return (
        f"{cost:.4f} of dense, speed-up {1 / cost:.2f}, on the most expensive {what} ({name}); {mean:.4f} on their mean"
    )


def forecast(candidates: Candidates, prompts: Mapping[str, Prompt], config, cost_name: str, costs: CostModel) -> str:
    """How many calls the search makes, and how long they take where the cost model is in milliseconds."""
    first = next(iter(prompts.values()))
    trials = first_trials(candidates, modalities_of(first.layout))
    calls = len(trials) * config.num_layers * len(prompts)
    text = f"{len(trials)} trials x {config.num_layers} layers x {len(prompts)} prompts = {calls:,} attention calls"
    if cost_name == "tiles":
        return text
    tokens = max(prompt.tokens.shape[1] for prompt in prompts.values())
    most = calls * costs.dense(config.num_heads, tokens) / 1e3
    return f"{text}, at most {most:.0f} s by the cost model of {cost_name} without compiling {len(trials)} programs"
