"""Outputs of `docs/quickstart.ipynb`: runs its code cells in order and writes what they print and return.

Run `JAX_PLATFORMS=cpu python scripts/run_quickstart.py` from the root of the repository: a reader may have no GPU.
"""

import ast
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"
DOTS_PER_INCH = 75


def main() -> None:
    """Executes the notebook in place."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "quickstart"}
    code_cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code_cells, start=1):
        cell["outputs"] = run_cell("".join(cell["source"]), number, namespace)
        cell["execution_count"] = number
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def run_cell(source: str, number: int, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    """The outputs of one cell: what it prints, and the value of its last line if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {number}", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue()})
    if value is not None:
        result = {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": shown(value)}
        outputs.append(result)
    return outputs


def shown(value: Any) -> dict[str, str]:
    """How a notebook shows a value: a figure as a picture of 128 colours, all others as text."""
    if not isinstance(value, Figure):
        return {"text/plain": repr(value)}
    drawn, small = io.BytesIO(), io.BytesIO()
    value.savefig(drawn, dpi=DOTS_PER_INCH)
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return {"text/plain": "a figure", "image/png": base64.b64encode(small.getvalue()).decode()}


if __name__ == "__main__":
    main()
