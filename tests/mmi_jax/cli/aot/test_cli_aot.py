"""`mmi aot`: what it refuses at once, and, where the TPU compiler is installed, small programs compiled by it."""

import dataclasses
import importlib.util
import json
import shlex
import sys
import types
from pathlib import Path

import pytest

from mmi_jax import AShape, Blocks, Dense, PatternTable, VerticalSlash
from mmi_jax.cli import main
from mmi_jax.cli.aot import child, command
from mmi_jax.sharding import make_mesh
from models import family_of, presets

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
        (["--tokens", str(2**31)], "--tokens must be 1 to 1073741824, as positions are int32: got 2147483648"),
        (["--json-file", "nodir/x.json"], "a file in a directory that exists, got 'nodir/x.json'"),
        (["--json-file", "."], "--json-file must be a file in a directory that exists, got '.'"),
    ],
)
def test_refusals_are_one_line_and_need_no_compiler(capsys, monkeypatch, options, message):
    monkeypatch.setattr(command, "_check_compiler", lambda: pytest.fail("refuse before asking for the compiler"))
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


def memory(padded_tokens: int, *, fits: bool) -> dict:
    """A line of the child that compiles the prefill."""
    sizes = dict(hbm_bytes_per_device=16 * 2**30, argument_bytes=10**9, total_bytes=15 * 10**9)
    where = dict(device="TPU v5 lite", devices=4, chips=4, mesh={"sequence": 2, "heads": 2})
    limit = None if fits else 10**10
    return where | sizes | dict(padded_tokens=padded_tokens, fits=fits, limit_bytes=limit, compile_seconds=1.0)


def kernel() -> dict:
    """The line of the child that compiles the kernel."""
    tile = dict(block_q=256, tile_kv=512, vmem_bytes=2**20, vmem_limit_bytes=2**24)
    seconds = dict(all=1.0, matmul=0.5, attention=0.5, hbm=0.1, links=0.1)
    work = dict(hbm_bytes=dict(weights=10**9), link_bytes=dict(weights=10**9))
    schedule = dict(compute_regions=[], bundles_elsewhere=9)
    return {"kernel": tile | schedule, "lower_bound_seconds": seconds, "work": work, "assumptions": []}


@pytest.fixture
def children(monkeypatch) -> types.SimpleNamespace:
    """Children that compile nothing: `prefill` is what the first one says; `options` what they got."""
    children = types.SimpleNamespace(prefill=[memory(4096, fits=True)], options=[])

    def child(options, **_):
        children.options.append(options)
        if options.dump is None:
            return iter(children.prefill)
        if not children.prefill[-1]["fits"]:
            raise ValueError("compiling ended with status 1: RESOURCE_EXHAUSTED")
        return iter([kernel()])

    monkeypatch.setattr(command, "_child", child)
    monkeypatch.setattr(command, "_check_compiler", lambda: None)
    return children


def test_a_prompt_that_does_not_fit_has_its_verdict_and_no_kernel(capsys, children, tmp_path):
    children.prefill = [memory(10_485_760, fits=False)]
    path = tmp_path / "aot.json"
    assert main([*SMALL, "--tokens", "10000000", "--json-file", str(path)]) == command.DOES_NOT_FIT
    printed = capsys.readouterr().out
    assert "memory of each device: 15.00 GB of 10.00 GB, does not fit, 1.00 GB of it arguments" in printed
    result = json.loads(printed.strip().splitlines()[-1])
    assert result == json.loads(path.read_text()) and "kernel" not in result
    assert (result["fits"], result["padded_tokens"], len(children.options)) == (False, 10_485_760, 1)


def test_the_results_are_printed_before_the_file_is_written(capsys, children, monkeypatch, tmp_path):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    assert main([*SMALL, "--json-file", str(tmp_path / "aot.json")]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out.strip().splitlines()[-1])["fits"] and "kernel tile: 256 queries" in out
    assert err.endswith("error: no space left\n")


def test_the_kernel_is_compiled_at_the_padded_length_that_was_found(children, monkeypatch, tmp_path):
    """The last bucket of a search, 123 * 8192, is no bucket of a longer table: it would be padded to 128 * 8192."""
    children.prefill = [memory(1_007_616, fits=True)]
    assert main([*SMALL, "--longest", "--tokens", "1010000"]) == 0
    (_, options) = children.options
    assert (options.tokens, options.longest) == (1_007_616, False)
    lengths = []

    def compile_kernel(target, num_tokens):
        lengths.append(num_tokens)
        raise NotImplementedError("no need of the compiler")

    monkeypatch.setattr(child.compile_ahead, "compile_kernel", compile_kernel)
    config = dataclasses.replace(presets()["7b"], num_layers=1)
    model = family_of(config).abstract_model(config)
    mesh = make_mesh(list(range(16)), num_kv_heads=config.num_kv_heads)
    target = child.compile_ahead.Target(model=model, table=options.patterns(), mesh=mesh, blocks=Blocks(q=512))
    with pytest.raises(NotImplementedError, match="no need of the compiler"):
        child.kernel_figures(options, target, tmp_path)
    assert lengths == [1_007_616] and target.buckets(2**21).length_for(1_007_616) == 2**20


def test_a_crash_of_the_child_shows_its_own_error(capsys, monkeypatch, tmp_path):
    """Not JAX's note on the frames that it leaves out."""
    python = tmp_path / "python"
    crash = shlex.join([sys.executable, "-c", "import jax; jax.jit(lambda x: {}['lost'])(1)"])
    python.write_text(f"#!/bin/sh\nexec {crash}\n")
    python.chmod(0o755)
    monkeypatch.setattr(command, "_check_compiler", lambda: None)
    monkeypatch.setattr(sys, "executable", str(python))
    assert main(SMALL) == 2
    assert capsys.readouterr().err.endswith("error: compiling ended with status 1: KeyError: 'lost'\n")


def test_help_says_what_prefill_itself_takes(capsys):
    assert main(["aot", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "4,194,304 tokens on several devices, 1,048,576 on one" in words


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
    result = json.loads(printed.strip().splitlines()[-1])
    assert result == json.loads(path.read_text())
    assert (result["fits"], result["chips"], result["mesh"]) == (True, 4, {"sequence": 2, "heads": 2})
    assert 0 < result["argument_bytes"] < result["total_bytes"] < result["hbm_bytes_per_device"]
    assert result["kernel"]["vmem_bytes"] < result["kernel"]["vmem_limit_bytes"]
    assert all(0.1 < region["mxu"] <= 1 for region in result["kernel"]["compute_regions"])
    bound = result["lower_bound_seconds"]
    assert 0 < bound["hbm"] and bound["all"] >= max(bound["matmul"] + bound["attention"], bound["hbm"]) * 0.999
    assert "of it arguments" in printed and "- Each unit is never idle" in printed


@pytest.mark.slow
@needs_compiler
def test_the_weights_of_a_large_model_do_not_fit_a_small_slice(capsys):
    assert main(["aot", "--topology", "v5e:2x2", "--preset", "72b", "--tokens", "4096"]) == command.DOES_NOT_FIT
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert not result["fits"] and result["total_bytes"] > result["limit_bytes"] > 15 * 2**30


@pytest.mark.slow
@needs_compiler
def test_a_shape_that_no_slice_has_is_refused(capsys):
    assert main([*SMALL, "--topology", "v5e:7x3"]) == 2
    assert "error: the TPU compiler must know the topology: got 'v5e:7x3'" in capsys.readouterr().err
