"""`mmi prefill` killed while it writes: no file is half written under its final name, and the next run works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from models.testing.random_checkpoint import write_random_checkpoint

pytestmark = pytest.mark.slow

HALF_A_WRITE = """
import sys, time
from jax._src.lru_cache import LRUCache
from matplotlib.figure import Figure
from mmi_jax.cli import main

def stop_within(path, content):
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        print("half", path, file=sys.stderr, flush=True)
        time.sleep(600)

put, savefig = LRUCache.put, Figure.savefig

def half_an_entry(cache, key, content):
    if key.startswith("jit_prefill_layer-"):  # which takes seconds to compile
        stop_within(cache.path / f"{key}-cache", content)
    put(cache, key, content)

def half_a_picture(figure, path, **options):
    savefig(figure, path, **options)
    if "density" in str(path):
        stop_within(path, open(path, "rb").read())

if sys.argv[1] == "program":
    LRUCache.put = half_an_entry
else:
    Figure.savefig = half_a_picture
sys.exit(main(sys.argv[2:]))
"""
"""A run that stops, for ever, with half of a cached program or of a picture on the disk."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    write_random_checkpoint(path := tmp_path_factory.mktemp("random") / "model")
    return path


def arguments(model: Path, directory: Path) -> list[str]:
    return [
        "prefill", "--model", str(model), "--prompt", "What is it?", "--dtype", "float32", "--max-new-tokens", "2",
        "--cache-dir", str(directory / "programs"), "--plots", str(directory / "plots"), "--json",
    ]  # fmt: skip


def killed_while_writing(what: str, arguments: list[str]) -> Path:
    """The file that a run was writing when it was killed."""
    command = [sys.executable, "-c", HALF_A_WRITE, what, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            if line.startswith("half "):
                process.kill()
                return Path(line.split(maxsplit=1)[1].strip())
            seen.append(line)
    raise AssertionError("".join(seen))


def run(arguments: list[str]) -> tuple[dict, str]:
    """What an undisturbed run prints, and its standard error."""
    done = subprocess.run([sys.executable, "-m", "mmi_jax.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_a_run_killed_within_a_picture_leaves_none_of_that_name(model, tmp_path):
    command = arguments(model, tmp_path)
    temporary = killed_while_writing("picture", command)
    plots = tmp_path / "plots"
    assert temporary.parent.parent == plots and temporary.parent.name.startswith(".density")
    assert [path.name for path in plots.glob("[!.]*")] == ["patterns.png"], "whole ones only"
    printed, _ = run(command)
    assert len(printed["plots"]) >= 3 and str(plots / "density.png") in printed["plots"]
    for path in printed["plots"]:
        with Image.open(path) as picture:
            picture.load()


def test_a_run_killed_within_a_kept_program_costs_the_next_one_a_compilation(model, tmp_path):
    command = arguments(model, tmp_path)
    entry = killed_while_writing("program", command)
    cut = entry.stat().st_size
    printed, stderr = run(command)
    assert cut > 0 and "was unreadable: compiled again" in stderr and entry.stat().st_size > cut
    again, stderr = run(command)
    assert again["new_tokens"] == printed["new_tokens"] and "unreadable" not in stderr
    assert os.listdir(tmp_path / "plots") and not list((tmp_path / "programs").glob("*.tmp"))
