"""`mmi niah` without a model: sizes of the baselines, the journal, results, and refusals."""

import dataclasses
from typing import Any

import pytest

from mmi_jax import AShape
from mmi_jax.cli import main
from mmi_jax.cli.niah.answers import Answers, PromptBatch, prompt_batches
from mmi_jax.cli.niah.journal_entries import read_cells
from mmi_jax.cli.niah.options import NiahOptions
from mmi_jax.cli.niah.results import heat_maps, means_table, remember_methods, results_of
from mmi_jax.cli.niah.run import Runner
from mmi_jax.cli.niah.sizes import Sizes, layers_looked_at
from mmi_jax.cli.samples import SampleSource, haystack_of
from mmi_jax.search.costs import cost_models
from mmi_jax.search.trials.journal import Journal
from models import family_of, presets
from models.small.config import small_processor


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def niah_options(directory, **changes) -> NiahOptions:
    values: dict[str, Any] = dict(
        model="m",
        tasks=("v_niah",),
        haystack="generated",
        tokens=(1024,),
        num_depths=1,
        samples=1,
        methods=("a-shape", "swin"),
        tables={},
        matched_method="dense",
        cost_tolerance=0.1,
        output=directory,
        dtype="float32",
        cost_model=None,
        batch=1,
        parallel_compilations=1,
        seed=0,
    )
    return NiahOptions(**values | changes)


def abstract_model():
    config = dataclasses.replace(presets()["3b"], num_layers=1)
    return family_of(config).abstract_model(config)


def sizes_of(directory, **changes) -> Sizes:
    source = SampleSource(processor=small_processor(), haystack=haystack_of("generated"))
    journal = Journal(directory / "cells.jsonl", {"model": "m"})
    options = niah_options(directory, **changes)
    return Sizes(options=options, model=abstract_model(), source=source, costs=cost_models()["tiles"], journal=journal)


@pytest.fixture(scope="module")
def batch() -> PromptBatch:
    source = SampleSource(processor=small_processor(), haystack=haystack_of("generated"))
    sample = source.sample("v_niah", num_tokens=1024, depth=0.5, seed=0)
    return prompt_batches(source.processor, [sample], batch=1, num_rows=1)[0]


def answers(cost: float) -> Answers:
    return Answers(correct=1, questions=1, cost=cost, dense_cost=1.0, density=cost, prompt_tokens=1024.0)


def cell(method: str, cost: float, task: str = "v_niah", tokens: int = 1024, depth: float = 0.5) -> dict[str, Any]:
    place = {"kind": "cell", "task": task, "tokens": tokens, "depth": depth, "method": method}
    return place | dataclasses.asdict(answers(cost)) | {"pattern": "x"}


@pytest.fixture
def sized(monkeypatch) -> list[tuple[str, int, float | None]]:
    """Which baselines got a size, for how many tokens and to cost what; the size is a thousand times that."""
    sizes = []

    def fake_sizes(self, methods, tokens, fraction, batch):
        sizes.extend((method, tokens, fraction) for method in methods)
        return [(AShape(sink=128, local=round(1000 * fraction)), fraction) for _ in methods]

    monkeypatch.setattr(Sizes, "_sized", fake_sizes)
    return sizes


def test_a_baseline_is_sized_once_for_each_task_and_length_to_what_the_matched_cell_costs(
    tmp_path, monkeypatch, sized, batch
):
    monkeypatch.setattr(
        "mmi_jax.cli.niah.sizes.evaluate", lambda *_: pytest.fail("the matched method was evaluated again")
    )
    for row in (cell("dense", 0.2), cell("dense", 0.3, task="mm_niah"), cell("dense", 0.4, tokens=2048)):
        sizes_of(tmp_path).journal.add(row)
    for _ in range(2):  # the second as after a kill: from the journal alone
        sizes = sizes_of(tmp_path)
        assert sizes.fit(["a-shape"], "v_niah", 1024, batch) == {"a-shape": AShape(128, 200)}
        both = sizes.fit(["swin", "a-shape"], "mm_niah", 1024, batch)
        assert both == {"swin": AShape(128, 300), "a-shape": AShape(128, 300)}
        assert sizes.fit(["a-shape"], "v_niah", 2048, batch) == {"a-shape": AShape(128, 400)}
    assert sized == [("a-shape", 1024, 0.2), ("swin", 1024, 0.3), ("a-shape", 1024, 0.3), ("a-shape", 2048, 0.4)]


def test_a_matched_method_without_cells_is_evaluated_once_for_each_task_and_length(tmp_path, monkeypatch, sized, batch):
    costs = iter((0.2, 0.3))
    monkeypatch.setattr("mmi_jax.cli.niah.sizes.evaluate", lambda *_: answers(next(costs)))
    for _ in range(2):
        sizes = sizes_of(tmp_path)
        for method in ("a-shape", "swin"):
            sizes.fit([method], "v_niah", 1024, batch)
            sizes.fit([method], "mm_niah", 1024, batch)
    assert sized == [(method, 1024, fraction) for method in ("a-shape", "swin") for fraction in (0.2, 0.3)]
    assert next(costs, None) is None


def test_without_a_method_to_match_sizes_are_those_of_the_paper(tmp_path, batch):
    sizes = sizes_of(tmp_path, matched_method=None)
    assert sizes.fit(["a-shape"], "v_niah", 1024, batch) == {"a-shape": AShape(sink=128, local=4096)}


def test_the_matched_method_is_evaluated_before_the_baselines_whatever_the_order(tmp_path, monkeypatch, sized):
    evaluated = []

    def answer(model, batches, pattern, costs):
        evaluated.append(pattern)
        return answers(1.0 if pattern is None else 0.9)

    monkeypatch.setattr("mmi_jax.cli.niah.run.evaluate", answer)
    sizes = sizes_of(tmp_path, methods=("a-shape", "dense"))
    runner = Runner(
        options=sizes.options, model=abstract_model(), source=sizes.source, costs=sizes.costs, journal=sizes.journal
    )
    place = ("v_niah", 1024, 0)
    runner.fill(place, runner.batches(*place), lambda step: None)
    assert evaluated == [None, AShape(128, 1000)] and sized == [("a-shape", 1024, 1.0)]
    assert not runner.missing(place, sizes.options.methods)


@pytest.mark.parametrize(
    ("num_layers", "expected"), [(1, [0]), (3, [0, 1, 2]), (8, [1, 3, 5, 7]), (28, [3, 10, 17, 24])]
)
def test_layers_looked_at_are_spread_over_the_depth(num_layers, expected):
    assert layers_looked_at(num_layers) == expected


def test_results_hold_every_cell_of_the_journal_in_the_order_first_named(tmp_path):
    journal = Journal(tmp_path / "cells.jsonl", {"model": "m"})
    remember_methods(journal, ("dense", "ours", "swin"))
    for method in ("ours", "swin"):  # killed before dense was evaluated
        journal.add(cell(method, 0.2, tokens=2048))
    remember_methods(journal, ("a-shape", "dense"))
    for method in ("a-shape", "dense"):
        journal.add(cell(method, 0.2))
    length = len(journal.entries)
    remember_methods(journal, ("swin",))
    assert len(journal.entries) == length
    results = results_of(niah_options(tmp_path), journal)
    cells = [(c["tokens"], c["method"]) for c in results.cells]
    assert cells == [(1024, "dense"), (1024, "a-shape"), (2048, "ours"), (2048, "swin")]
    assert list(results.methods) == ["dense", "ours", "swin", "a-shape"]
    table = means_table("v_niah", results)
    assert [list(column.cells)[1] for column in table.columns[:3]] == ["ours", "", "100.0%"]
    titles = [axes.get_title() for axes in heat_maps("v_niah", results).axes]
    assert titles[:4] == [f"{method}, cost 20.0%" for method in results.methods]


def test_cells_of_0_1_0_are_read_under_the_present_names(tmp_path):
    journal = Journal(tmp_path / "cells.jsonl", {"model": "m"})
    now = cell("dense", 0.2)
    journal.add({("asked" if name == "questions" else name): value for name, value in now.items()})
    assert read_cells(journal) == [now]


@pytest.mark.parametrize("source", ["cell", "entry", "entry of 0.1.0"])
def test_another_cost_than_the_matched_one_is_marked_at_each_length(tmp_path, source):
    """Also where the matched method is not among the methods. Of both baselines the mean is equal."""
    journal = Journal(tmp_path / "cells.jsonl", {"model": "m"})
    remember_methods(journal, ("dense", "a-shape", "swin"))
    for tokens, fraction in ((1024, 0.4), (2048, 0.2)):
        place = {"task": "v_niah", "tokens": tokens, "method": "dense"}
        entries = {
            "cell": cell("dense", fraction, tokens=tokens),
            "entry": {"kind": "matched cost", **place, "fraction": fraction},
            "entry of 0.1.0": {"kind": "share", **place, "share": fraction},
        }
        journal.add(entries[source])
    for method, costs in {"a-shape": (0.41, 0.19), "swin": (0.35, 0.25)}.items():
        for tokens, cost in zip((1024, 2048), costs, strict=True):
            journal.add(cell(method, cost, tokens=tokens))
    table = means_table("v_niah", results_of(niah_options(tmp_path), journal))
    shown = dict(zip(table.columns[0].cells, table.columns[4].cells, strict=True))
    assert shown == ({"dense": "30.0%"} if source == "cell" else {}) | {"a-shape": "30.0%", "swin": "30.0% (not equal)"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "magic"], "unknown method 'magic': expected one of dense, minference"),
        (["--method", "dense", "--method", "dense"], "a method must be named once"),
        (["--task", "hay"], "unknown task 'hay': expected one of v-niah"),
        (["--match-cost", "ours"], "--match-cost must name a method with a table, got 'ours'"),
        (["--samples", "0"], "must be at least 1"),
        (["--cost-tolerance", "-1"], "--cost-tolerance must be a fraction of 0 or more, got -1.0"),
        (["--method", "ours=absent.json"], "absent.json: cannot read a pattern table"),
    ],
)
def test_what_niah_refuses_before_it_loads_anything(options, message, tmp_path, capsys):
    assert main(["niah", "--model", "m", "--output", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
