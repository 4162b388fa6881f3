"""tpu_scripts as far as a machine without a TPU can go: every command is printed, the small parts run on the CPU."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main

from mmi_jax.bench.checks.kernel_rules import RULE_CASES
from mmi_jax.bench.plans import PLAN_CASES
from mmi_jax.cli import app
from models.assets.demo import DEMO_VIDEO
from models.testing.random_checkpoint import write_random_checkpoint
from pallas_kernels.attention.cases import CASES

ROOT = Path(__file__).parents[2]
MODEL, VIDEO = "Qwen/Qwen2.5-VL-7B-Instruct", "my video.mp4"
SCRIPTS = {
    "run_tests.sh": [],
    "bench.sh": [],
    "prefill.sh": [MODEL, VIDEO, "--fps", "1"],
}


def run(script: str, *arguments: str, **environment: str) -> str:
    """What the script prints."""
    command = ["bash", str(ROOT / "tpu_scripts" / script), *arguments]
    done = subprocess.run(command, env=os.environ | environment, text=True, capture_output=True, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def commands(printed: str) -> list[list[str]]:
    """The commands of a dry run, as the shell would read them; what a pipe does with their output is left out."""
    lines = printed.splitlines()
    assert lines and all(line.startswith("+ ") for line in lines)
    return [shlex.split(re.sub(r" \| tee \S+$", "", line[2:])) for line in lines]


def mmi_commands(printed: str) -> list[list[str]]:
    """The arguments of the commands that are `mmi`."""
    head = [".venv/bin/python", "-m", "mmi_jax.cli"]
    return [command[3:] for command in commands(printed) if command[:3] == head]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_every_command_and_runs_none(script, tmp_path):
    results = tmp_path / "results"
    printed = run(script, *SCRIPTS[script], DRY_RUN="1", RESULTS=str(results))
    assert ["make", ".venv/.installed-tpu"] in commands(printed)
    assert ["doctor"] in mmi_commands(printed)
    assert not results.exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_mmi_has_every_option_that_a_script_names(script):
    for arguments in mmi_commands(run(script, *SCRIPTS[script], DRY_RUN="1")):
        command: Any = typer.main.get_command(app).commands[arguments[0]]  # pyright: ignore
        command = command.commands[arguments[1]] if arguments[0] == "bench" else command
        known = {name for option in command.params for name in option.opts}
        assert {word for word in arguments if word.startswith("--")} <= known


def test_the_bench_names_known_cases_and_writes_a_file_each():
    benches = [arguments for arguments in mmi_commands(run("bench.sh", DRY_RUN="1")) if arguments[0] == "bench"]
    assert {arguments[1] for arguments in benches} == {"check", "attention", "plans"}
    named = [a[n + 1] for a in benches for n, word in enumerate(a) if word == "--case"]
    assert named and set(named) <= {*CASES, *PLAN_CASES, *RULE_CASES}
    files = [arguments[arguments.index("--json-file") + 1] for arguments in benches]
    assert len(files) == len(set(files)) == len(benches)


def test_the_video_and_the_options_arrive_as_they_were_given():
    dense, sparse = [
        a for a in mmi_commands(run("prefill.sh", *SCRIPTS["prefill.sh"], DRY_RUN="1")) if a[0] == "prefill"
    ]
    assert dense[:5] == ["prefill", "--model", MODEL, "--video", VIDEO]
    assert "--mesh" in dense and dense[-3:] == ["--fps", "1", "--json"]
    assert sparse[-3:] == ["--pattern", "Grid", "--json"]


def test_on_a_slice_every_host_runs_the_same_command():
    printed = run("prefill.sh", "--slice", "pod", "us-central1-a", MODEL, VIDEO, "--fps", "1", DRY_RUN="1")
    (command,) = commands(printed)
    assert (
        command[:9] == "gcloud compute tpus tpu-vm ssh pod --zone us-central1-a --worker".split()
        and command[9] == "all"
    )
    remote = command[-1]
    assert remote.startswith("cd ~/mmi-jax && DISTRIBUTED=1 tpu_scripts/prefill.sh ")
    assert shlex.split(remote.split("prefill.sh ")[1]) == [MODEL, VIDEO, "--fps", "1"]
    on_host = run("prefill.sh", MODEL, VIDEO, "--fps", "1", DRY_RUN="1", DISTRIBUTED="1")
    assert all("--distributed" in a and "--mesh" not in a for a in mmi_commands(on_host) if a[0] == "prefill")


@pytest.mark.parametrize("arguments", [[], ["model"], ["--slice", "pod", "zone", "model"]])
def test_missing_arguments_are_named(arguments):
    done = subprocess.run(
        ["bash", str(ROOT / "tpu_scripts/prefill.sh"), *arguments], text=True, capture_output=True, check=False
    )
    assert done.returncode == 2 and done.stderr.startswith("usage: ")


@pytest.mark.slow
def test_the_small_parts_run_on_a_cpu(tmp_path):
    cpu = dict(PLATFORM="cpu", RESULTS=str(tmp_path), JAX_PLATFORMS="cpu")
    run("run_tests.sh", "tests/test_imports.py", **cpu)
    run("bench.sh", **cpu)
    assert 'failures="0"' in (tmp_path / "tests.xml").read_text()
    for name in ("attention", "plans"):
        (case,) = json.loads((tmp_path / f"{name}.json").read_text())["cases"]
        assert case["implementation"] == "xla" and case["median_ms"] > 0
    assert json.loads((tmp_path / "check.json").read_text())["cases"][0]["case"] == "tiny"
    assert "attention backend" in (tmp_path / "doctor.txt").read_text()


@pytest.mark.slow
def test_the_prefill_runs_on_cpu_devices(tmp_path):
    model = tmp_path / "model"
    write_random_checkpoint(model)
    results = tmp_path / "results"
    flags = "--xla_force_host_platform_device_count=2"
    options = ["--max-frames", "4", "--dtype", "float32", "--max-new-tokens", "2"]
    run(
        "prefill.sh", str(model), str(DEMO_VIDEO), *options,
        PLATFORM="cpu", RESULTS=str(results), JAX_PLATFORMS="cpu", XLA_FLAGS=flags,
    )  # fmt: skip
    for name, pattern in (("dense", "Dense"), ("sparse", "Grid")):
        found = json.loads((results / f"prefill-{name}.json").read_text())
        assert found["report"]["patterns"][0][0] == pattern and len(found["new_tokens"]) > 0


def test_prefill_refuses_the_patterns_it_compares():
    command = ["bash", str(ROOT / "tpu_scripts/prefill.sh"), MODEL, VIDEO, "--pattern", "AShape"]
    done = subprocess.run(command, env=os.environ | {"DRY_RUN": "1"}, text=True, capture_output=True)
    assert done.returncode == 2 and "expected no --pattern or --table, got --pattern" in done.stderr


def test_prefill_finds_files_from_where_it_was_started(tmp_path):
    (tmp_path / "model").mkdir()
    command = ["bash", str(ROOT / "tpu_scripts/prefill.sh"), "model", "nowhere.mp4"]
    done = subprocess.run(command, env=os.environ | {"DRY_RUN": "1"}, text=True, capture_output=True, cwd=tmp_path)
    assert f"--model {tmp_path}/model --video nowhere.mp4" in done.stdout
