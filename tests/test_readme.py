"""The README's first example runs as it stands, and every name in its other examples exists."""

import ast
import builtins
import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"```(\w*)\n(.*?)```", README.read_text(), flags=re.DOTALL)
    return [text for found, text in fenced if found == language]


def test_the_first_example_runs():
    exec(compile(blocks("python")[0], "README.md", "exec"), {"__name__": "readme"})


def test_every_import_of_the_examples_exists():
    imports = [line for block in blocks("python") for line in block.splitlines() if re.match(r"(from|import) ", line)]
    assert len(imports) >= 5
    for line in imports:
        exec(line, {})


def test_the_examples_use_no_name_that_neither_they_nor_those_before_them_bind():
    bound = set(dir(builtins))
    for statement in (statement for block in blocks("python") for statement in ast.parse(block).body):
        nodes = list(ast.walk(statement))
        stored, loaded = (
            {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, context)}
            for context in (ast.Store, ast.Load)
        )
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        later = {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
        assert loaded <= bound | (stored - later), ast.unparse(statement)
        imports = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
        bound |= stored | {alias.asname or alias.name for alias in imports}


def test_every_file_of_the_tree_exists():
    root = README.parent
    tree = blocks("")[1]
    folders = [name for line in tree.splitlines() if not line.startswith(" ") for name in re.findall(r"(\w+)/", line)]
    assert {"pallas_kernels", "mmi_jax", "models", "tests", "tpu_scripts"} <= set(folders)
    for folder in folders:
        assert (root / folder).is_dir()
    for name in ("block_index.py", "attention.py", "estimate.py", "assemble.py", "plan.py", "engine.py", "flax.py"):
        assert name in tree and list(root.glob(f"*/{name}"))
