"""Structure of the tree: imports point one way, through few floors and no circle, and folders stay small."""

import ast
import re
from pathlib import Path

import pytest
from house_figures import circles, folder_sizes, import_graph, num_floors, room_graph

ROOT = Path(__file__).parents[1]
MAX_FLOORS, MAX_SIBLINGS = 8, 12
MAY_NOT_IMPORT = {
    "pallas_kernels": {"mmi_jax", "models", "tests", "tpu_scripts", "flax"},
    "mmi_jax": {"models", "tests", "tpu_scripts"},
    "models": {"tests", "tpu_scripts"},
}
FLOORS = (
    ("pallas_kernels",),
    ("layout", "sharding", "files"),
    ("method",),
    ("engine", "flax"),
    ("models", "search", "plots", "bench"),
    ("aot",),
    ("cli",),
)
"""Folders and files of `mmi_jax`, and the other packages: each imports from floors above its own in this list only."""
ROOT_FILES = {"__init__.py", "flax.py", "layout.py", "sharding.py", "files.py", "py.typed"}
ONE_OF_A_KIND = {
    "mmi_jax/method/patterns": "a pattern each",
    "mmi_jax/cli": "a folder for each command",
    "models/tasks": "a benchmark task each",
}
"""Folders that may have more siblings."""


def imported_packages(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", MAY_NOT_IMPORT)
def test_imports_point_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no files in {package}"
    is_root = {path for path in files if path.relative_to(ROOT).as_posix().startswith(("mmi_jax/cli.", "mmi_jax/cli/"))}
    wrong = {str(path): bad for path in files if (bad := imported_packages(path) & MAY_NOT_IMPORT[package])}
    assert not {path: bad for path, bad in wrong.items() if Path(path) not in is_root or bad - {"models"}}


def test_folders_import_from_lower_floors_only():
    floor_of = {name: n for n, floor in enumerate(FLOORS) for name in floor}
    graph = room_graph(ROOT)
    graph.pop("mmi_jax")  # the public names, of any floor
    rooms = {room.removeprefix("mmi_jax."): {d.removeprefix("mmi_jax.") for d in graph[room]} for room in graph}
    rooms.pop("integrations", None)
    assert not set(rooms) - set(floor_of), "a new folder or file needs a floor"
    upward = {
        (room, below)
        for room, imported in rooms.items()
        for below in imported - {"mmi_jax"}
        if floor_of[below] >= floor_of[room]
    }
    assert not upward


def test_there_are_few_floors_and_no_circles():
    assert num_floors(room_graph(ROOT)) <= MAX_FLOORS
    assert circles(room_graph(ROOT)) == [] and circles(import_graph(ROOT)) == []


def test_nobody_imports_the_integrations():
    inside = "mmi_jax.integrations"
    graph = import_graph(ROOT)
    assert not {
        m for m, found in graph.items() if not m.startswith(inside) and any(d.startswith(inside) for d in found)
    }


def test_folders_are_small():
    sizes = {folder: n for folder, n in folder_sizes(ROOT).items() if folder not in ONE_OF_A_KIND}
    assert not {folder: n for folder, n in sizes.items() if n > MAX_SIBLINGS}


def test_the_root_of_the_library_holds_only_what_is_public_or_shared():
    assert {path.name for path in (ROOT / "mmi_jax").iterdir() if path.is_file()} <= ROOT_FILES


def test_the_commands_name_files_that_are_there():
    """A test file that moves takes its name in the Makefile along."""
    named = re.findall(r"\btests/[\w/.]+", (ROOT / "Makefile").read_text())
    assert named and not [path for path in named if not (ROOT / path).exists()]
