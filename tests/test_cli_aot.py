"""`mmi aot`: what it refuses at once, and, where the TPU compiler is installed, small programs compiled by it."""

import importlib.util
import json

import pytest

from mmi_jax import AShape, Dense, PatternTable, VerticalSlash
from mmi_jax.cli import aot, main

SMALL = ["aot", "--topology", "v5e:2x2", "--preset", "3b", "--layers", "1", "--tokens", "4096", "--block-q", "256"]
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "8b"], "--preset must be one of 3b, 7b, 32b, 72b, got '8b'"),
        (["--layers", "37"], "--layers must be 1 to 36, those of 3b: got 37"),
        (["--layers", "0"], "--layers must be 1 to 36, those of 3b: got 0"),
        (["--topology", "v5e:2"], "one of v4, v5e, v5p, v6e, tpu7x and its shape, as in v5e:4x4: got 'v5e:2'"),
        (["--density", "0"], "--density must be above 0 and at most 1, got 0.0"),
        (["--block-q", "200"], "--block-q must be a multiple of 128, got 200"),
        (["--pattern", "Gird"], "unknown pattern 'Gird': expected one of AShape"),
        (["--table", "t.json", "--pattern", "Grid"], "--table and --pattern exclude each other"),
        (["--table", "nosuch.json"], "nosuch.json: cannot read a pattern table"),
    ],
)
def test_refusals_are_one_line_and_need_no_compiler(capsys, monkeypatch, options, message):
    monkeypatch.setattr(aot, "_check_compiler", lambda: pytest.fail("refuse before asking for the compiler"))
    assert main([*SMALL, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_table_for_another_model_is_refused(capsys, tmp_path):
    PatternTable(layers=((Dense(),) * 4,) * 3, model="tiny").save(tmp_path / "table.json")
    assert main([*SMALL, "--table", str(tmp_path / "table.json")]) == 2
    assert "expected 36 layers of 16 heads, got 3 layers of 4 heads (table for tiny)" in capsys.readouterr().err


def test_without_the_compiler_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(SMALL) == 2
    assert (
        "needs the TPU compiler, libtpu: install the extra tpu, pip install 'mmi-jax[tpu]'" in capsys.readouterr().err
    )


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_a_small_model_compiles_and_has_its_figures(capsys, tmp_path, topology):
    """On v6e its two groups of heads differ, so that devices branch."""
    path, table = tmp_path / "aot.json", tmp_path / "table.json"
    window = AShape(local=512)
    others = window if topology == "v5e:2x2" else VerticalSlash(vertical=256, slash=256)
    PatternTable(layers=((window,) * 8 + (others,) * 8,) * 36).save(table)
    assert main([*SMALL, "--topology", topology, "--table", str(table), "--json-file", str(path)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed.strip().splitlines()[-1])
    assert found == json.loads(path.read_text())
    assert (found["fits"], found["chips"], found["mesh"]) == (True, 4, {"sequence": 2, "heads": 2})
    assert 0 < found["argument_bytes"] < found["total_bytes"] < found["hbm_bytes_per_device"]
    assert found["kernel"]["vmem_bytes"] < found["kernel"]["vmem_limit_bytes"]
    assert all(0.1 < region["mxu"] <= 1 for region in found["kernel"]["compute_regions"])
    least = found["least_seconds"]
    assert 0 < least["hbm"] and least["all"] >= max(least["matmul"] + least["attention"], least["hbm"]) * 0.999
    assert "of it arguments" in printed and "- Each unit is never idle" in printed


@pytest.mark.slow
@needs_compiler
def test_the_weights_of_a_large_model_do_not_fit_a_small_slice(capsys):
    assert main(["aot", "--topology", "v5e:2x2", "--preset", "72b", "--tokens", "4096"]) == aot.DOES_NOT_FIT
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert not found["fits"] and found["total_bytes"] > found["limit_bytes"] > 15 * 2**30


@pytest.mark.slow
@needs_compiler
def test_a_shape_that_no_slice_has_is_refused(capsys):
    assert main([*SMALL, "--topology", "v5e:7x3"]) == 2
    assert "error: the TPU compiler must know the topology: got 'v5e:7x3'" in capsys.readouterr().err
