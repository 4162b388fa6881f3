"""PatternTable: saved and loaded, and every damaged file refused with its name."""

import json
import os

import pytest
from test_pattern_json import ALL

from mmi_jax import AShape, Dense, Grid, PatternTable
from mmi_jax.method.tables.pattern_table import load_table, uniform_table

TABLE = PatternTable(
    layers=(tuple(ALL), tuple(reversed(ALL))),
    model="tiny",
    provenance={"calibration": "two videos", "score": "0.98"},
)


ZEROS = [[0, 0], [0, 0]]
SCORES = {"error": ZEROS, "density": ZEROS, "cost": ZEROS, "dense_cost": 1}


def written(**changes) -> dict:
    value = {
        "version": 1,
        "model": "m",
        "provenance": {"date": "today"},
        "patterns": {"a": {"pattern": "Dense"}, "b": {"pattern": "AShape", "sink": 1}},
        "layers": [["a", "b"], ["b", "b"]],
    }
    return {key: field for key, field in (value | changes).items() if field is not ...}


def test_a_table_of_every_pattern_comes_back(tmp_path):
    TABLE.save(tmp_path / "table.json")
    assert load_table(tmp_path / "table.json") == TABLE
    assert os.listdir(tmp_path) == ["table.json"]


def test_each_pattern_is_written_once(tmp_path):
    uniform_table(Grid(), num_layers=5, num_heads=6).save(tmp_path / "table.json")
    value = json.loads((tmp_path / "table.json").read_text())
    assert list(value["patterns"]) == ["Grid-0"] and value["layers"] == [["Grid-0"] * 6] * 5


def test_a_table_written_by_hand(tmp_path):
    (tmp_path / "table.json").write_text(json.dumps(written()))
    table = load_table(str(tmp_path / "table.json"))
    assert table.layers == ((Dense(), AShape(sink=1)), (AShape(sink=1), AShape(sink=1)))
    assert (table.num_layers, table.num_heads, table.model) == (2, 2, "m")


@pytest.fixture
def full_disk(monkeypatch):
    """Files can be written but not put in place."""

    def replace(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", replace)


def test_a_failed_save_leaves_nothing(tmp_path, full_disk):
    with pytest.raises(OSError, match="no space left"):
        TABLE.save(tmp_path / "table.json")
    assert os.listdir(tmp_path) == []


def test_a_failed_save_keeps_the_file_that_was_there(tmp_path, full_disk):
    (tmp_path / "table.json").write_text(json.dumps(written()))
    with pytest.raises(OSError, match="no space left"):
        TABLE.save(tmp_path / "table.json")
    assert os.listdir(tmp_path) == ["table.json"] and load_table(tmp_path / "table.json").model == "m"


def test_a_saved_table_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "other").write_text("")
    TABLE.save(tmp_path / "table.json")
    assert (tmp_path / "table.json").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "an object with version 1, got 'list'"),
        (written(version=2), "an object with version 1, got 2"),
        (written(version=...), "an object with version 1, got None"),
        (written(extra=1, more=2), "has unknown keys extra, more: known keys are version, model, provenance, patterns"),
        (written(provenance=..., layers=...), "lacks the keys layers, provenance: got version"),
        (written(model=None), "model must be of type str, got None"),
        (written(provenance=["x"]), r"provenance must be of type dict, got \['x'\]"),
        (written(provenance={"score": 0.5}), r"provenance\['score'\] must be of type str, got 0.5"),
        (written(patterns=[]), r"patterns must be of type dict, got \[\]"),
        (written(layers={"0": ["a"]}), "layers must be of type list"),
        (written(layers=["aa"]), r"layers\[0\] must be of type list, got 'aa'"),
        (written(layers=[["a", 1]]), r"layers\[0\]\[1\] must be of type str, got 1"),
        (
            written(layers=[["a", {"pattern": "Dense"}]]),
            r"layers\[0\]\[1\] must be of type str, got {'pattern'",
        ),
        (written(layers=[["a", "c"], ["a", "d"]]), "layers name undefined patterns c, d: defined are a, b"),
        (written(layers=[["a", "b"], ["a"]]), "same number of heads, at least 1: got {1, 2}"),
        (
            written(scores=[1]),
            r"scores must be an object with the keys error, density, cost, dense_cost, got \[1\]",
        ),
        (
            written(scores=SCORES | {"recall": []}),
            "scores has unknown keys recall: known keys are error, density, cost, dense_cost, weight",
        ),
        (written(scores=SCORES | {"error": 3}), "scores.error must be of type list, got 3"),
        (
            written(scores=SCORES | {"error": [[0, "x"], [0, 0]]}),
            r"error\[0\]\[1\] must be of type float, got 'x'",
        ),
        (written(scores=SCORES | {"cost": [[0, 1], [0, -1]]}), "scores.cost must hold finite numbers, none negative"),
        (written(scores=SCORES | {"error": [[0, 0]]}), "one number for each head, got heads"),
        (written(scores={k: [[0]] for k in SCORES} | {"dense_cost": 1}), "expected 2 layers of 2 heads, got heads"),
        (written(scores=SCORES | {"dense_cost": 0}), "scores.dense_cost must be a positive number, got 0.0"),
        (written(layers=[]), "same number of heads, at least 1"),
        (written(layers=[[], []]), "same number of heads, at least 1: got {0}"),
        (written(patterns={"a": {"pattern": "Foo"}, "b": {"pattern": "Dense"}}), "unknown pattern 'Foo'"),
        (written(patterns={"a": 5, "b": {"pattern": "Dense"}}), 'an object with the key "pattern", got 5'),
    ],
)
def test_damaged_tables_are_refused(tmp_path, value, message):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=f"table.json: .*{message}"):
        load_table(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_files_that_are_no_json_are_refused(tmp_path, content):
    (tmp_path / "table.json").write_bytes(content)
    with pytest.raises(ValueError, match="table.json: cannot read a pattern table"):
        load_table(tmp_path / "table.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json: cannot read a pattern table"):
        load_table(tmp_path / "nowhere.json")


def test_a_table_for_another_model_is_refused():
    table = uniform_table(Dense(), num_layers=2, num_heads=4)
    table.check_fits(num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match="expected 3 layers of 4 heads, got 2 layers of 4 heads .table for an unnamed"):
        table.check_fits(num_layers=3, num_heads=4)
