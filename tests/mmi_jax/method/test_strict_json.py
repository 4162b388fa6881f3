"""Strict JSON: files, keys and types; what is refused names the place."""

import pytest

from mmi_jax.method.tables.strict_json import check_keys, check_type, read_json


def test_what_fits_passes(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [[1, 0.5], []], "b": {"x": "y"}}')
    value = check_keys(read_json(tmp_path / "a.json", "a file"), "a file", ("a",), ("b", "c"))
    check_type(value["a"], list[list[float]], "a")
    check_type(value["b"], dict[str, str], "b")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"a file must be an object with the keys a, b, got \[\]"),
        ({"a": 1, "z": 2}, "a file has unknown keys z: known keys are a, b, c"),
        ({"c": 1}, "a file lacks the keys a, b: got c"),
        ({}, "lacks the keys a, b: got none"),
    ],
)
def test_keys_that_do_not_fit_are_named(value, message):
    with pytest.raises(ValueError, match=message):
        check_keys(value, "a file", ("a", "b"), ("c",))


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ([1, True], list[float], r"x\[1\] must be of type float, got True"),
        ({"k": ["a", 2]}, dict[str, list[str]], r"x\['k'\]\[1\] must be of type str, got 2"),
        ("a", list, "x must be of type list, got 'a'"),
    ],
)
def test_the_place_of_a_wrong_type_is_named(value, kind, message):
    with pytest.raises(ValueError, match=message):
        check_type(value, kind, "x")
