"""`mmi` itself, `mmi show` and `mmi doctor`."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

from mmi_jax import AShape, Dense, Grid, PatternTable
from mmi_jax.cli import compile_cache, gpu_memory, main
from mmi_jax.cli.doctor import command


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_without_a_command_the_help_lists_them(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    for name in ("prefill", "show", "doctor", "aot"):
        assert f"\n  {name} " in printed


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"]])
def test_summaries_of_commands_are_whole_sentences_on_80_columns(arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(arguments) == 0
    summaries = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    assert len(summaries) >= 8
    for line in summaries:
        assert line.endswith(".") and not line.endswith("..."), line


def test_help_imports_no_packages_of_models_or_pictures():
    heavy = ("flax", "av", "matplotlib", "models", "tokenizers", "torch")
    code = f"""import sys
from mmi_jax.cli import main
main(["--help"])
for command in ("prefill", "search", "niah", "qa", "show", "doctor", "aot", "bench"):
    main([command, "--help"])
sys.exit(str([name for name in {heavy} if name in sys.modules] or ""))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_an_unknown_command_gives_one_line(capsys):
    assert main(["shwo"]) == 2
    assert capsys.readouterr().err.startswith("error: No such command 'shwo'")


def test_show_prints_layers_by_head_patterns_and_provenance(capsys, tmp_path):
    layers = ((Dense(), AShape(local=64)), (AShape(local=64), Grid()), (Grid(local=9), AShape(local=64)))
    table = PatternTable(layers=layers, model="tiny", provenance={"commit": "abc123"})
    table.save(tmp_path / "table.json")
    assert main(["show", str(tmp_path / "table.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in lines[:3]] == ["layer 0  D1 AS1", "layer 1  AS1 G1", "layer 2  G2 AS1"]
    (row,) = [line for line in lines if "AShape" in line]
    assert row.split("│")[1:4] == [" AS1  ", " 3     ", row.split("│")[3]]
    assert "AShape(sink=128, local=64)" in row
    assert "model: tiny" in lines and "commit: abc123" in lines


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read a pattern table"),
        ('{"version": 7}', "must be an object with version 1, got 7"),
        (
            '{"version": 1, "layrs": []}',
            "unknown keys layrs: known keys are version, model, provenance, patterns, layers",
        ),
    ],
)
def test_show_refuses_what_is_no_table(capsys, tmp_path, content, message):
    (tmp_path / "table.json").write_text(content)
    assert main(["show", str(tmp_path / "table.json")]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ") and message in line and printed.out == ""


def test_doctor_prints_versions_devices_backends_and_cache(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv(compile_cache.ENVIRONMENT_VARIABLE, str(tmp_path))
    (tmp_path / "jit_run-0-cache").write_bytes(bytes(2**20))
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for package in ("jax", "jaxlib", "flax", "mmi-jax"):
        assert metadata.version(package) in printed
    assert "cpu" in printed
    assert [name for name in ("reference", "xla") if f"│ {name}" not in printed] == []
    assert "compiled programs: 1, 1.0 MiB" in printed and str(tmp_path) in printed


def test_doctor_tells_why_a_backend_refuses(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("needs a Hopper GPU, got cpu")

    assert command.backend_status("xla") == "can run"
    monkeypatch.setattr(command, "block_sparse_attention", refuse)
    assert command.backend_status("xla") == "cannot run here: needs a Hopper GPU, got cpu"


def test_the_cache_directory_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache.default_cache_directory() == tmp_path / "mmi-jax" / "compiled"
    assert compile_cache.cache_contents(tmp_path / "absent") == compile_cache.CacheContents(num_programs=0, num_bytes=0)


def test_commands_take_nearly_all_of_a_gpu_unless_told_otherwise(capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    gpu_memory.take_memory(gpu_memory.NEARLY_ALL)
    assert gpu_memory.memory_fraction() == 0.5
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    assert main(["doctor", "--plan", "7b", "--tokens", "4096", "--device", "h200"]) == 0
    printed = capsys.readouterr().out
    assert (
        "of 134.1 GiB: it fits" in printed and "mmi takes 96% of this GPU, JAX in a program of your own 75%" in printed
    )
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    gpu_memory.take_memory(gpu_memory.ALONE)
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    assert os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION") == "0.92"


def test_doctor_plans_a_prefill_that_fits(capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    arguments = ["--plan", "7b", "--tokens", "1000000", "--device", "h200", "--pattern", "AShape"]
    assert main(["doctor", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "padded to 1,048,576, need at most" in printed and "of 132.7 GiB: it fits" in printed
    (tower,) = [line for line in printed.splitlines() if "vision tower's batches" in line]
    assert "0.6 GiB" in tower and "embed" in tower
    (cache,) = [line for line in printed.splitlines() if "cache: keys and values" in line]
    assert "2 x 28 x 1 x 1048576 x 4 x 128" in cache and "56.0 GiB" in cache


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1048576", "--device", "72GiB"], "1 x 1,048,576 tokens must fit the device's memory: it needs"),
        (["--tokens", "1048576", "--device", "72GiB"], "the device has 72.0 GiB. Changes that fit: at most"),
        (["--tokens", "2000000", "--device", "h200"], "a prompt must have 1 to 1048576 tokens"),
        (["--tokens", "0", "--device", "h100"], "--tokens and --batch must be at least 1, got 0 and 1"),
        (["--device", "h300"], "--device must be one of a100, h100, h200, v4"),
        ([], "does not report its memory: expected --device, got none"),
    ],
)
def test_doctor_refuses_a_prefill_that_does_not_fit(capsys, arguments, message):
    assert main(["doctor", "--plan", "7b", *arguments]) == 2
    assert message in capsys.readouterr().err
