"""Figures of the tree's structure: sizes of folders, floors of imports, comments, and types that are missing.

    python scripts/house_figures.py [ROOT]

One line for each figure. The tests hold the tree to some of them. Every function takes the root of a checkout.
"""

import ast
import functools
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGES = ("pallas_kernels", "mmi_jax", "models")
TREES = (*PACKAGES, "tests", "scripts", "gpu_scripts", "tpu_scripts")
FAMILIES = r"models\.qwen\w*"
"""Names of the modules of one family of models."""

type Graph = dict[str, set[str]]
"""What each name imports."""


def main(root: Path) -> None:
    """Prints the figures."""
    rooms, files = room_graph(root), import_graph(root)
    folder, siblings = max(folder_sizes(root).items(), key=lambda item: item[1])
    figures = {
        "files of the packages": len(module_files(root)),
        "lines of the packages": sum(map(num_lines, module_files(root).values())),
        "most siblings in a folder": f"{siblings} ({folder})",
        "rooms": len(rooms),
        "floors": num_floors(rooms),
        "arrows between rooms": sum(map(len, rooms.values())),
        "circles of rooms": _listed(circles(rooms)),
        "circles of files": _listed(circles(files)),
        "comments per 100 code lines, packages": f"{comment_rate(root, PACKAGES):.1f}",
        "comments per 100 code lines, kernels": f"{comment_rate(root, ('pallas_kernels',)):.1f}",
        "lines with fmt: skip, packages": num_lines_with(root, "# fmt: skip", PACKAGES),
        "lines with fmt: skip, everywhere": num_lines_with(root, "# fmt: skip", TREES),
        "lines with : Any, packages": num_lines_with(root, r": Any\b", PACKAGES),
        "imports of a model family outside models": num_family_imports(root),
        "words of README": len((root / "README.md").read_text().split()),
        "lines of README": num_lines(root / "README.md"),
        "method: files, lines": method_size(root),
    }
    for name, value in figures.items():
        print(f"{name:42} {value}")


def module_files(root: Path) -> dict[str, Path]:
    """The packages' files by the name under which they are imported."""
    found = {}
    for path in (p for package in PACKAGES for p in sorted((root / package).rglob("*.py"))):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def import_graph(root: Path) -> Graph:
    """The modules of the packages that each of them imports, wherever in the file."""
    modules = module_files(root)
    return {name: set(_imports(name, path, modules)) - {name} for name, path in modules.items()}


def _imports(name: str, path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (full if full in modules else node.module for full in inner)


def room_graph(root: Path) -> Graph:
    """The graph of rooms: each folder and file on the first level of `mmi_jax`, and the other packages."""
    graph: Graph = {}
    for name, imported in import_graph(root).items():
        graph.setdefault(_room(name), set()).update(map(_room, imported))
    return {room: others - {room} for room, others in graph.items()}


def _room(name: str) -> str:
    package, *rest = name.split(".")
    return ".".join([package, *rest[:1]]) if package == "mmi_jax" else package


def num_floors(graph: Graph) -> int:
    """Names on the longest chain of imports, a circle counted as one floor."""
    circle_of = {name: frozenset(circle) for circle in circles(graph) for name in circle}

    @functools.cache
    def height(circle: frozenset[str]) -> int:
        below = {circle_of.get(d, frozenset([d])) for name in circle for d in graph.get(name, ())} - {circle}
        return 1 + max(map(height, below), default=0)

    return max(height(circle_of.get(name, frozenset([name]))) for name in graph)


def circles(graph: Graph) -> list[list[str]]:
    """Sets of names each of which imports, by way of others, every other one."""
    reach = {name: _reach(graph, name) for name in graph}
    groups = {frozenset(d for d in reach[name] if name in reach[d]) for name in graph if name in reach[name]}
    return sorted(map(sorted, groups))


def _reach(graph: Graph, start: str) -> set[str]:
    """All that a name imports, by way of others too; itself only if it stands in a circle."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - reached
        reached |= new
        waiting += new
    return reached


def folder_sizes(root: Path) -> dict[str, int]:
    """Siblings in each folder of the packages: modules and folders of modules, `__init__.py` left out."""
    sizes: dict[str, int] = {}
    for path in module_files(root).values():
        sizes.setdefault(str(path.parent.relative_to(root)), 0)
    for folder in sizes:
        children = (root / folder).iterdir()
        sizes[folder] = sum(
            path.suffix == ".py" and path.stem not in ("__init__", "__main__") or str(path.relative_to(root)) in sizes
            for path in children
        )
    return sizes


def comment_rate(root: Path, packages: tuple[str, ...]) -> float:
    """Lines with a comment that is no instruction to a tool, per 100 lines of code (docstrings are neither)."""
    comments = code = 0
    for path in (p for package in packages for p in sorted((root / package).rglob("*.py"))):
        text = path.read_text()
        docstrings = _docstring_lines(ast.parse(text))
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                comments += not re.match(r"# *(fmt|noqa|pyright|type|ruff)\b", token.string)
            elif token.string.strip():
                lines.update(range(token.start[0], token.end[0] + 1))
        code += len(lines - docstrings)
    return 100 * comments / code


def _docstring_lines(tree: ast.AST) -> set[int]:
    """Lines of strings that are statements of their own."""
    texts = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    return {line for node in texts for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def num_lines_with(root: Path, pattern: str, trees: tuple[str, ...]) -> int:
    """Lines of the Python files of these trees that a pattern matches somewhere; this file's own are left out."""
    paths = (path for tree in trees for path in sorted((root / tree).rglob("*.py")) if path.name != Path(__file__).name)
    return sum(bool(re.search(pattern, line)) for path in paths for line in path.read_text().splitlines())


def num_family_imports(root: Path) -> int:
    """Statements of `mmi_jax` and the scripts that import one family of models."""
    count = 0
    for path in (path for tree in ("mmi_jax", *TREES[-3:]) for path in sorted((root / tree).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            count += any(re.match(FAMILIES, name) for name in names)
    return count


def method_size(root: Path) -> str:
    """Files and lines of the method, as far as a folder tells it from the rest."""
    paths = [path for name, path in module_files(root).items() if name.startswith("mmi_jax.method")]
    return f"{len(paths)}, {sum(map(num_lines, paths))}" if paths else "no folder of its own"


def num_lines(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text().splitlines())


def _listed(groups: list[list[str]]) -> str:
    return "; ".join([str(len(groups)), *(" <-> ".join(group) for group in groups)])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
