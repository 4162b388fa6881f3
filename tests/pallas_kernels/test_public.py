"""The public names of pallas_kernels: each can be imported, is documented, and nothing else is offered."""

import ast
import inspect
from pathlib import Path

import pytest

import pallas_kernels


def imported_names() -> list[str]:
    """Names that the package's first file imports under themselves."""
    tree = ast.parse(Path(inspect.getfile(pallas_kernels)).read_text())
    aliases = [alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert all(alias.asname == alias.name for alias in aliases)
    return [alias.name for alias in aliases]


def documented_constants(path: Path) -> set[str]:
    """Constants of a module with a docstring in the line after them."""
    body = ast.parse(path.read_text()).body
    return {
        node.targets[0].id
        for node, after in zip(body, body[1:], strict=False)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    }


def test_all_names_what_is_imported():
    assert sorted(pallas_kernels.__all__) == sorted(imported_names())


@pytest.mark.parametrize("name", pallas_kernels.__all__)
def test_every_public_name_is_documented(name):
    value = getattr(pallas_kernels, name)
    if isinstance(value, int):
        root = Path(inspect.getfile(pallas_kernels)).parent
        assert name in documented_constants(root / "notation.py") | documented_constants(root / "block_index.py")
    else:
        assert inspect.getdoc(value)
