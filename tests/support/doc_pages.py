"""Code blocks of the README and of the pages in `docs/`."""

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
RECORDS = {"log.md", "accuracy.md", "accuracy_notes.md"}
"""Pages that tell what was measured on a day; they hold no examples."""
LANGUAGES = {"python", "sh", "console", "text"}
"""`python` and `sh` are run; the lines of `console` need a device, a download or much time, and are parsed."""


class Block(NamedTuple):
    """One fenced block: its language, text, and first line in the page."""

    language: str
    text: str
    line: int


def pages() -> list[Path]:
    """The README and all pages of `docs/` with examples."""
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted(path for path in DOCS.rglob("*.md") if path.name not in RECORDS),
    ]


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order."""
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    found = [Block(match[1].strip(), match[2], text[: match.start()].count("\n") + 2) for match in fences]
    return [block for block in found if not languages or block.language in languages]


def commands(block: Block) -> list[list[str]]:
    """The command lines of a block, cut into words, without comments; a line that ends in a backslash goes on."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def notebook_cells(path: Path) -> list[str]:
    """The code cells of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
