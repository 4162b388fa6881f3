"""`mmi search`, `mmi niah` and `mmi qa` on the demo's model: what they write, that they go on, what they refuse."""

import csv
import json

import av
import jax
import numpy as np
import pytest

import mmi_jax
from mmi_jax import AShape, Dense, PatternTable, VerticalSlash
from mmi_jax.cli import main
from mmi_jax.method.tables.pattern_table import load_table, uniform_table
from models.testing.random_checkpoint import write_random_checkpoint

TOKENS = "700"  # 64 of them for every two frames


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("models") / "demo"
    write_random_checkpoint(directory)
    return str(directory)


@pytest.fixture
def candidates(tmp_path) -> str:
    path = tmp_path / "candidates.json"
    path.write_text(json.dumps([{"pattern": "AShape", "sink": 128, "local": 64}]))
    return str(path)


@pytest.mark.slow
def test_a_search_writes_a_table_and_another_target_needs_no_trials(model, candidates, tmp_path, capsys, monkeypatch):
    output = tmp_path / "table.json"
    options = ["search", "--model", model, "--task", "v-niah", "--tokens", TOKENS, "--held-out-samples", "1"]
    options += ["--dtype", "float32", "--candidates", candidates, "--output", str(output), "--cost-model", "tiles"]
    assert main([*options, "--target-density", "0.9"]) == 0
    table = load_table(output)
    assert table.scores is not None and (table.num_layers, table.num_heads) == (4, 8)
    assert AShape(128, 64) in sum(table.layers, ()) and len(set(sum(table.layers, ()))) > 1
    assert np.mean(table.scores.density) <= 0.9 + 1e-6
    assert {"weights", "calibration", "device", "date", "commit", "target", "held-out error"} <= set(table.provenance)
    printed = capsys.readouterr().out
    assert (
        "error of each head, per mille" in printed and "cost of each head" in printed and "fraction of time" in printed
    )
    work = (tmp_path / "table.work.jsonl").read_bytes()
    monkeypatch.setattr("mmi_jax.search.trials.measurement.Meter.__call__", lambda *_: pytest.fail("a trial ran again"))
    assert main([*options, "--target-density", "1", "--exclude", "AShape"]) == 0
    assert {p for row in load_table(output).layers for p in row} == {Dense()}
    assert (tmp_path / "table.work.jsonl").read_bytes() == work
    assert main(["search", *options[1:], "--target-density", "0.9", "--seed", "7"]) == 2
    assert "holds the pieces of another run: calibration was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "search needs --model DIRECTORY_OR_HUB_NAME, or --from-minference FILE"),
        (["--model", "m"], "one of --target-speedup and --target-density: got None and None"),
        (["--model", "m", "--target-speedup", "2", "--target-density", "0.5"], "one of --target-speedup and"),
        (["--model", "m", "--target-speedup", "0.5"], "a target speed-up must be at least 1, got 0.5"),
        (["--model", "m", "--target-density", "0"], "a target density must be above 0 and at most 1, got 0.0"),
        (["--model", "m", "--target-density", "0.5"], "search needs calibration prompts"),
        (["--model", "m", "--target-density", "0.5", "--video", "absent.mp4"], "no such file: absent.mp4"),
        (
            ["--model", "m", "--target-density", "0.5", "--task", "v-niah", "--exclude", "Gird"],
            "--exclude must name patterns, AShape",
        ),
        (
            ["--model", "m", "--target-density", "0.5", "--task", "v-niah", "--cost-model", "x"],
            "--cost-model must be one of",
        ),
        (["--model", "m", "--target-density", "0.5", "--task", "v-niah", "--candidates", "x"], "or a JSON file"),
        (["--model", "m", "--target-density", "0.5", "--task", "v-niah", "--scale", "0"], "a positive factor, got 0"),
    ],
)
def test_what_a_search_refuses_before_it_loads_anything(options, message, tmp_path, capsys):
    assert main(["search", "--output", str(tmp_path / "table.json"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "table.json").exists()


MINFERENCE = [
    {"0": ["vertical_and_slash", 1000, 6096, 336], "1": ["stream_llm", 128, 1024, 5]},
    {"0": ["block_sparse", 10, 1, 0.9], "1": ["vertical_and_slash", 10, 20, 1]},
]


def test_a_table_of_minference_is_shown_and_converted(tmp_path, capsys):
    path = tmp_path / "minference.json"
    path.write_text(json.dumps(MINFERENCE))
    assert main(["show", str(path)]) == 0
    assert "VerticalSlash(vertical=1000, slash=6096" in capsys.readouterr().out
    assert main(["search", "--from-minference", str(path), "--output", str(tmp_path / "table.json")]) == 0
    layers = load_table(tmp_path / "table.json").layers
    assert layers[0] == (VerticalSlash(1000, 6096, local=100), AShape(128, 1024))
    assert repr(layers[1]) == "(BlockTopK(num_blocks=50), VerticalSlash(vertical=30, slash=50, local=100, last_q=64))"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "a table of MInference is a list over layers"),
        (
            [{"0": ["vertical_and_slash", 1, 2, 3], "2": ["stream_llm", 1, 2, 3]}],
            "layer 0: heads must be numbered 0 to 1",
        ),
        ([{"0": ["dense", 1, 2, 3]}], "layer 0, head 0: a head must be"),
        ([{"0": ["vertical_and_slash", "many", 2, 3]}], "layer 0, head 0: a head must be"),
    ],
)
def test_what_is_no_table_of_minference(value, message, tmp_path, capsys):
    path = tmp_path / "minference.json"
    path.write_text(json.dumps(value))
    assert main(["search", "--from-minference", str(path), "--output", str(tmp_path / "table.json")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_niah_fills_a_grid_and_goes_on_where_it_stopped(model, tmp_path, capsys, monkeypatch):
    uniform_table(AShape(sink=128, local=32), num_layers=4, num_heads=8).save(tmp_path / "ours.json")
    output = tmp_path / "niah"
    options = ["niah", "--model", model, "--task", "v-niah", "--tokens", TOKENS, "--depths", "2", "--samples", "1"]
    options += ["--dtype", "float32", "--output", str(output), "--cost-model", "tiles", "--parallel-compilations", "2"]
    options += ["--table", str(tmp_path / "ours.json"), "--method", "dense", "--method", "ours", "--method", "a-shape"]
    prefill, calls = mmi_jax.prefill, []

    def killed(*args, **kwargs):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(kwargs["table"])
        return prefill(*args, **kwargs)

    monkeypatch.setattr(mmi_jax, "prefill", killed)
    assert main(options) == 130
    assert not (output / "results.csv").exists()
    monkeypatch.setattr(mmi_jax, "prefill", prefill)
    assert main(options) == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "cells.jsonl",
        "results.csv",
        "results.json",
        "v_niah.png",
    ]
    with open(output / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["depth"]) for row in rows] == [
        (name, depth) for depth in ("0.0", "1.0") for name in ("dense", "ours", "a-shape")
    ]
    cost = {row["method"]: float(row["cost fraction"]) for row in rows}
    assert cost["dense"] == pytest.approx(1, abs=0.05) and cost["ours"] < 0.95
    assert cost["a-shape"] == pytest.approx(cost["ours"], rel=0.1)
    cells = (output / "cells.jsonl").read_bytes()
    monkeypatch.setattr(mmi_jax, "prefill", lambda *_, **__: pytest.fail("a cell ran again"))
    assert main(options) == 0 and (output / "cells.jsonl").read_bytes() == cells
    assert "not equal" not in capsys.readouterr().out
    monkeypatch.setattr(mmi_jax, "prefill", prefill)
    first = rows
    assert main([*options[: options.index("--method")], "--method", "minference"]) == 0
    with open(output / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row for row in rows if row["method"] != "minference"] == first and len(rows) == 8
    assert "% (not equal)" in capsys.readouterr().out  # its smallest size costs more than ours at 700 tokens


@pytest.mark.slow
def test_niah_refuses_prompts_too_short_for_a_task(model, tmp_path, capsys):
    assert (
        main(["niah", "--model", model, "--output", str(tmp_path / "out"), "--tokens", "700", "--task", "match"]) == 2
    )
    assert "the task needs 32 pairs of frames" in capsys.readouterr().err


def write_video(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 32
        for n in range(4):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 40 * n, np.uint8), format="rgb24"))
            )
        container.mux(stream.encode())


@pytest.mark.slow
def test_qa_answers_every_question_once(model, tmp_path, capsys, monkeypatch):
    data = tmp_path / "data"
    (data / "dataset").mkdir(parents=True)
    write_video(data / "v_one.mp4")
    questions = [{"video_name": "one", "question": f"what is {n}", "question_id": f"v_one_{n}"} for n in range(2)]
    answers = [{"answer": "yes", "type": 3, "question_id": question["question_id"]} for question in questions]
    (data / "dataset" / "test_q.json").write_text(json.dumps(questions))
    (data / "dataset" / "test_a.json").write_text(json.dumps(answers))
    options = ["qa", "--model", model, "--dataset", "activitynet-qa", "--data", str(data), "--dtype", "float32"]
    options += ["--output", str(tmp_path / "answers.jsonl"), "--max-new-tokens", "2"]
    assert main(options) == 0
    assert "yes or no" in capsys.readouterr().out
    monkeypatch.setattr(mmi_jax, "prefill", lambda *_, **__: pytest.fail("a question was answered again"))
    assert main(options) == 0
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3
    assert main([*options, "--pattern", "AShape"]) == 2
    assert "pieces of another run: patterns was null" in capsys.readouterr().err


def test_a_table_with_scores_is_drawn(tmp_path, capsys):
    from mmi_jax.method.tables.pattern_table import HeadScores

    scores = HeadScores(error=((0.1, 0.0),), density=((0.2, 1.0),), cost=((1.0, 4.0),), dense_cost=4.0)
    table = PatternTable(layers=((AShape(), Dense()),), scores=scores, provenance={"target": "half"})
    table.save(tmp_path / "table.json")
    assert load_table(tmp_path / "table.json") == table
    assert main(["show", str(tmp_path / "table.json"), "--plots", str(tmp_path / "plots")]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "layer 0  AS1 D1"
    assert "layer 0   100    0" in lines and "layer 0    25  100" in lines
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["patterns.png", "scores.png"]
