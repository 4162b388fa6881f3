"""gpu_scripts: the dry run names commands, tests, cases and options that exist."""

import argparse
import fnmatch
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmi_jax.bench.checks.kernel_rules import RULE_CASES
from mmi_jax.bench.plans import PLAN_CASES
from mmi_jax.cli import main
from mmi_jax.cli.bench.start_child import warm_up
from models.qwen2_5_vl import presets
from models.testing import TINY_PRESET
from pallas_kernels.attention.cases import CASES
from pallas_kernels.attention.hopper import gpu_tuned

ROOT = Path(__file__).parents[2]


@pytest.fixture
def commands(tmp_path):
    """The commands of the dry run with an interpreter given, each split into words."""
    environment = os.environ | {"DRY_RUN": "1", "PYTHON": "some-python"}
    script = [str(ROOT / "gpu_scripts/check_hopper.sh"), str(tmp_path / "results")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    assert not (tmp_path / "results").exists()
    lines = done.stdout.splitlines()
    assert all(line.startswith("+ ") for line in lines)
    return [shlex.split(line[2:]) for line in lines]


def test_the_dry_run_runs_the_battery_the_million_tokens_and_the_sanitizer(commands):
    text = [" ".join(command) for command in commands]
    for wanted in ("-k mosaic_gpu", "-k on_the_device", "random128 28/4 1024K", "is_bit_equal", "bench check"):
        assert any(wanted in line for line in text), wanted
    tools = [command[command.index("--tool") + 1] for command in commands if "compute-sanitizer" in command]
    assert tools == ["memcheck", "racecheck"]


def test_files_and_cases_of_the_dry_run_exist(commands):
    words = [word for command in commands for word in command]
    tests = [word for word in words if word.startswith("tests/")]
    assert len(tests) == 5 and all((ROOT / word).is_file() for word in tests)
    benches = [command[command.index("bench") + 1 :] for command in commands if "bench" in command]
    assert [bench[0] for bench in benches] == ["check", "attention", "check", "check"]
    for bench in benches:
        known = CASES if bench[0] == "attention" else RULE_CASES
        assert all(bench[n + 1] in known for n, word in enumerate(bench) if word == "--case")


def test_options_of_the_dry_run_exist(commands, capsys):
    for command in commands:
        if "bench" in command:
            start = command.index("bench")
            assert main([*command[start : start + 2], "--help"]) == 0
            known = capsys.readouterr().out
            assert all(word in known for word in command[start:] if word.startswith("--"))


BENCH_HOPPER = [sys.executable, str(ROOT / "gpu_scripts/bench_hopper.py")]


@pytest.fixture
def jobs(tmp_path):
    """The words after `bench` of every command of the other script's dry run."""
    dry_run = [*BENCH_HOPPER, str(tmp_path), "--dry-run", "--before", str(tmp_path)]
    done = subprocess.run(dry_run, capture_output=True, text=True, check=True)
    assert not list(tmp_path.iterdir())
    lines = [line for line in done.stdout.splitlines() if " bench " in line]
    return [line.partition(" bench ")[2] for line in lines]


def test_jobs_name_options_and_cases_that_exist(jobs, capsys):
    assert len(jobs) == 9
    for job in jobs:
        command = job.split()[0]
        assert main(["bench", command, "--help"]) == 0
        known = capsys.readouterr().out
        assert all(word in known for word in job.split() if word.startswith("--"))
        for case in re.findall(r"--case (.+?)(?= --|$)", job):
            assert fnmatch.filter(PLAN_CASES if command == "plans" else CASES, case), case


def test_a_job_that_fails_or_lasts_too_long_does_not_stop_the_others(tmp_path):
    interpreter = tmp_path / "python"
    interpreter.write_text("""#!/bin/sh
case "$*" in *524288*) exit 7 ;; *1048576*) sleep 60 ;; *131072*) echo "$PWD $CUDA_VISIBLE_DEVICES" ;; esac
""")
    interpreter.chmod(0o755)
    names = ["plans-128k", "plans-512k", "plans-1m"]
    options = ["--seconds", "2", "--gpus", "5", "6", "7"]
    environment = os.environ | {"PYTHON": str(interpreter)}
    done = subprocess.run(
        [*BENCH_HOPPER, str(tmp_path), "--only", *names, *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    outcomes = dict(line.split(": ", 1) for line in done.stdout.splitlines() if not line.startswith("+"))
    assert [outcomes[name].split()[0] for name in names] == ["done", "status", "ended"]
    assert (tmp_path / "plans-128k.log").read_text().split()[0] == str(ROOT)
    assert (tmp_path / "gpu_tuned.json").read_text() == gpu_tuned.PATH.read_text()


def hopper(*arguments, **environment):
    """What the script did."""
    words = [*BENCH_HOPPER, *map(str, arguments)]
    return subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.fixture
def interpreter(tmp_path):
    """A Python that is killed in the plans of `--before` and prints what else it is asked for."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\ncase "$*" in *-before.json*) kill -9 $$ ;; *) echo "$*" ;; esac\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["results", "--only", "plans"], {}, "jobs must be of plans-128k, .*, got plans"),
        (["python"], {}, "results must be a directory that can be written, got .*python"),
        (["python/below"], {}, "results must be a directory that can be written, got .*python/below"),
        (["results", "--before", "nowhere"], {}, "--before must be a directory, got .*nowhere"),
        (["results", "--gpus", "0", "0"], {}, "--gpus must be different numbers, got .'0', '0'."),
        (["results"], dict(CUDA_VISIBLE_DEVICES=""), "--gpus must be different numbers, got .''."),
    ],
)
def test_bad_arguments_are_refused(tmp_path, monkeypatch, interpreter, arguments, environment, message):
    monkeypatch.chdir(tmp_path)
    done = hopper(*arguments, PYTHON=interpreter, **environment)
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "results").exists()


def test_no_failure_costs_what_else_is_computed(tmp_path, interpreter):
    (tmp_path / "gpu_tuned.json").write_text("tuned before")
    (tmp_path / "broken.json").write_text('{"cases": [{"ca')
    (tmp_path / "plans-1m.log").mkdir()
    options = ["--only", "plans-128k", "plans-1m", "plans-32-8", "--gpus", "0", "--before", tmp_path]
    done = hopper(tmp_path, *options, PYTHON=interpreter)
    outcomes = [line for line in done.stdout.splitlines() if not line.startswith("+")]
    assert [re.sub(" +", " ", line)[:27] for line in outcomes] == [
        "broken cannot be read: JSON",
        "plans-128k: status -9 after",
        "plans-1m: not run: [Errno 2",
        "plans-32-8: done in 0 s",
    ]
    assert done.returncode == 1, done.stderr
    assert "plans-128k.json" in (tmp_path / "plans-128k.log").read_text(), "the command after the one that was killed"
    assert (tmp_path / "gpu_tuned.json").read_text() == "tuned before"


def test_a_script_that_is_told_to_end_ends_its_jobs_and_says_what_became_of_them(tmp_path):
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho begun\nsleep 60\n")
    interpreter.chmod(0o755)
    command = [*BENCH_HOPPER, str(tmp_path), "--only", "plans-1m", "plans-32-8", "--gpus", "0"]
    script = subprocess.Popen(command, env=os.environ | {"PYTHON": str(interpreter)}, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "plans-1m.log"
    while not (log.exists() and log.read_text()):
        assert script.poll() is None
        time.sleep(0.02)
    script.terminate()
    lines = [line for line in script.communicate(timeout=20)[0].splitlines() if not line.startswith("+")]
    assert [re.sub(r"\d+ s$", "n s", line) for line in lines] == [
        "plans-1m: status -9 after n s",
        "plans-32-8: not begun: no time left",
    ]
    assert script.returncode == 1


def test_the_status_is_0_where_all_jobs_are_done(tmp_path, interpreter):
    done = hopper(tmp_path, "--only", "plans-1m", "plans-32-8", "--gpus", "0", PYTHON=interpreter)
    assert done.returncode == 0, done.stderr
    outcomes = [line.partition(" in ")[0] for line in done.stdout.splitlines()]
    assert outcomes[-2:] == ["plans-1m: done", "plans-32-8: done"]


@pytest.mark.slow
def test_a_start_s_programs_are_read_back_by_the_prefill_that_is_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY_PRESET)
    time_starts = runpy.run_path(str(ROOT / "gpu_scripts/time_starts.py"))
    warm_up(preset="tiny", layers=None, table="mix", dtype="float32", tokens=1024, directory=str(tmp_path))
    kept = sorted(tmp_path.glob("prefill_layer-*"))
    options = argparse.Namespace(preset="tiny", layers=None, tables=["mix"], dtype="float32", tokens=[1024], repeats=1)
    time_starts["prefill_times"](options, tmp_path)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["seconds"] > 0 and kept and sorted(tmp_path.glob("prefill_layer-*")) == kept
