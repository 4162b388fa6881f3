"""Imports point one way: tests, tpu_scripts -> models -> mmi_jax -> pallas_kernels -> jax."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_NOT_IMPORT = {
    "pallas_kernels": {"mmi_jax", "models", "tests", "tpu_scripts", "flax"},
    "mmi_jax": {"models", "tests", "tpu_scripts"},
    "models": {"tests", "tpu_scripts"},
}


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
