"""Patterns as JSON and as text, and back; every damaged form is refused with its name."""

import inspect
import json

import pytest

from mmi_jax import (
    AShape,
    BlockTopK,
    Boundary2D,
    Dense,
    Grid,
    Pattern,
    QBoundary,
    SparseTransformerFixed,
    SparseTransformerStrided,
    SwinWindow,
    TriShape,
    VerticalSlash,
)
from mmi_jax.method.tables.pattern_json import from_json, parse, to_json
from mmi_jax.method.token_groups import FramePlace, RankPhase, RowPlace

ALL = [
    Dense(),
    AShape(sink=0, local=7),
    TriShape(last=3),
    VerticalSlash(vertical=5),
    Grid(strides=(RankPhase(9), FramePlace(), RowPlace()), use_hline=False, use_slash=True),
    BlockTopK(num_blocks=4),
    QBoundary({0: VerticalSlash(), 1: Grid(local=3), 7: Dense()}, other=AShape()),
    Boundary2D({(1, 1): Grid(strides=(RankPhase(2),)), (0, 1): TriShape(), (9, 2): Dense()}, other=BlockTopK()),
    SparseTransformerFixed(stride=6),
    SparseTransformerStrided(stride=6),
    SwinWindow(frames=2, is_shifted=True),
]


@pytest.mark.parametrize("pattern", ALL, ids=lambda p: type(p).__name__)
def test_every_pattern_comes_back_from_json(pattern):
    assert from_json(json.loads(json.dumps(to_json(pattern)))) == pattern


def test_the_table_of_patterns_is_complete():
    concrete, queue = set(), [Pattern]
    while queue:
        classes = queue.pop().__subclasses__()
        queue += classes
        concrete |= {cls for cls in classes if cls.__module__.startswith("mmi_jax.") and not inspect.isabstract(cls)}
    assert {type(pattern) for pattern in ALL} == concrete


def test_the_written_form():
    assert to_json(QBoundary({1: AShape(sink=0, local=7)})) == {
        "pattern": "QBoundary",
        "inner": {"vision": {"pattern": "AShape", "sink": 0, "local": 7}},
        "other": {"pattern": "Dense"},
    }
    assert to_json(Boundary2D({(0, 1): Dense()}))["inner"] == {"text,vision": {"pattern": "Dense"}}
    assert to_json(Grid(strides=(RankPhase(9), RowPlace())))["strides"] == [
        {"key": "RankPhase", "stride": 9},
        {"key": "RowPlace"},
    ]


def test_missing_fields_take_their_defaults():
    assert from_json({"pattern": "AShape", "local": 9}) == AShape(local=9)


def test_a_pattern_of_a_user_cannot_be_written():
    class Mine(Pattern):
        def parts(self, scope):
            return []

    class Dense(Mine):
        pass

    for pattern in (Mine(), Dense()):
        with pytest.raises(ValueError, match="only AShape, BlockTopK, .* can be written as JSON, got"):
            to_json(pattern)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, 'an object with the key "pattern", got None'),
        ([], 'an object with the key "pattern"'),
        ({"sink": 1}, 'an object with the key "pattern"'),
        ({"pattern": "Foo"}, "unknown pattern 'Foo': expected one of AShape, BlockTopK"),
        ({"pattern": ["Grid"]}, r"unknown pattern \['Grid'\]: expected one of"),
        ({"pattern": "AShape", "sinks": 1}, "AShape has unknown keys sinks: known keys are sink, local"),
        ({"pattern": "SparseTransformerFixed"}, "SparseTransformerFixed lacks the keys stride"),
        ({"pattern": "QBoundary"}, "QBoundary lacks the keys inner"),
        ({"pattern": "AShape", "sink": 1.5}, r"AShape.sink must be of type int, got 1.5"),
        ({"pattern": "AShape", "sink": True}, "AShape.sink must be of type int, got True"),
        ({"pattern": "AShape", "sink": None}, "AShape.sink must be of type int, got None"),
        ({"pattern": "AShape", "sink": -1}, "sink"),
        ({"pattern": "Grid", "use_hline": 1}, "Grid.use_hline must be of type bool, got 1"),
        ({"pattern": "SparseTransformerFixed", "stride": "6"}, "SparseTransformerFixed.stride must be of type int"),
        ({"pattern": "Grid", "strides": 5}, "Grid.strides must be of type .*got 5"),
        ({"pattern": "Grid", "strides": {"key": "RowPlace"}}, "Grid.strides must be of type"),
        ({"pattern": "Grid", "strides": [5]}, 'an object with the key "key", got 5'),
        ({"pattern": "Grid", "strides": [{"key": "Foo"}]}, "unknown key 'Foo': expected one of FramePlace, RankPhase"),
        ({"pattern": "Grid", "strides": [{"key": "RankPhase", "stride": "a"}]}, "RankPhase.stride must be of type int"),
        ({"pattern": "Grid", "strides": [{"key": "RankPhase", "stride": 1}]}, "at least 2 tokens, got 1"),
        ({"pattern": "Grid", "strides": []}, "must name at least one stride"),
        ({"pattern": "QBoundary", "inner": []}, r"QBoundary.inner must be of type .*got \[\]"),
        ({"pattern": "QBoundary", "inner": {"smell": {"pattern": "Dense"}}}, "unknown modality 'smell'"),
        ({"pattern": "QBoundary", "inner": {"vision": 5}}, 'an object with the key "pattern", got 5'),
        ({"pattern": "QBoundary", "inner": {"text,vision": {"pattern": "Dense"}}}, "QBoundary.inner must be of type"),
        ({"pattern": "Boundary2D", "inner": {"vision": {"pattern": "Dense"}}}, "Boundary2D.inner must be of type"),
        ({"pattern": "QBoundary", "inner": {"0": {"pattern": "Dense"}}, "other": 3}, "QBoundary.other must be of type"),
        (
            {"pattern": "QBoundary", "inner": {"0": to_json(QBoundary({1: Dense()}))}},
            "must be an intra-modality pattern",
        ),
    ],
)
def test_damaged_json_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        from_json(value)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("Grid", Grid()),
        ("Dense:", Dense()),
        ("AShape:sink=0,local=7", AShape(sink=0, local=7)),
        ("Grid:use_slash=true,use_hline=False,local=64", Grid(use_slash=True, use_hline=False, local=64)),
        ("SparseTransformerStrided:stride=24", SparseTransformerStrided(stride=24)),
    ],
)
def test_text_forms(text, pattern):
    assert parse(text) == pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown pattern ''"),
        ("grid", "unknown pattern 'grid'"),
        ("Grid:local", "name=number or name=true.false, got 'local'"),
        ("Grid:local=", "name=number or name=true.false, got 'local='"),
        ("Grid:local=1.5", "got 'local=1.5'"),
        ("Grid:local=--5", "got 'local=--5'"),
        ("Grid:local=\u00b2", "got 'local="),
        ("Grid:near=5", "Grid has unknown keys near: known keys are strides"),
        ("Grid:local=true", "Grid.local must be of type int, got True"),
        ("Grid:local=1,local=2", "a field must be given once, got 'local' again"),
        ("Grid:pattern=2", "a field must be given once, got 'pattern' again"),
        ("AShape:sink=-5", "sink"),
        ("QBoundary", "QBoundary lacks the keys inner"),
    ],
)
def test_damaged_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)
