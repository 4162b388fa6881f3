"""Pictures of the documentation: one head before and after permutation, the six of how it works, and every pattern.

Run `python scripts/make_pictures.py` from the root of the repository. It also writes the gallery in `docs/patterns.md`:
a pattern that is registered appears in it by itself.
"""

import dataclasses
import io
import re
from pathlib import Path

from matplotlib.figure import Figure
from method_pictures import METHOD_PICTURES
from PIL import Image

from mmi_jax import Blocks, Boundary2D, Dense, Grid, Pattern, Plan, QBoundary, TokenLayout, VerticalSlash
from mmi_jax.bench.synthetic import GRID_SLASH, synthetic_qkv
from mmi_jax.layout import TEXT, VISION, concatenate, text_tokens, vision_tokens
from mmi_jax.method.patterns import PATTERNS
from mmi_jax.method.token_groups import FramePlace
from mmi_jax.plots.mask_plot import plot_mask

DOCS = Path(__file__).parent.parent / "docs"
PICTURES = DOCS / "pictures"
GALLERY = re.compile(r"(<!-- gallery[^\n]*-->\n).*?(<!-- end of the gallery -->)", re.DOTALL)

HEAD_DIM = 64
BLOCKS = Blocks(q=16, kv=16)
LAYOUT = concatenate([text_tokens(16), vision_tokens(16, 4, 6), text_tokens(32)])
"""16 frames, so that one place in all frames fills one kv block of 16 tokens, as 128 frames fill one of 128."""

GRID = Grid(strides=(FramePlace(),), use_slash=True, local=24, sink=16)
EXAMPLES: dict[type[Pattern], Pattern] = {
    Grid: GRID,
    QBoundary: QBoundary({VISION: Grid(strides=(FramePlace(),), local=24, sink=16, tail=0), TEXT: Dense()}),
    Boundary2D: Boundary2D({
        (VISION, VISION): Grid(strides=(FramePlace(),), local=24, sink=16, tail=0),
        (TEXT, VISION): VerticalSlash(vertical=32, slash=32, local=16),
    }),
}  # fmt: skip
"""Patterns of the gallery whose fields are not all numbers."""

SMALL = {
    "sink": 16, "local": 24, "last": 32, "vertical": 32, "slash": 96, "num_blocks": 5, "stride": 24,
    "frames": 4, "rows": 2, "columns": 3,
}  # fmt: skip
"""Fields of all other patterns, for a prompt of 432 tokens."""


def plan_of(pattern: Pattern, layout: TokenLayout) -> Plan:
    """The plan of one head whose synthetic queries and keys show a grid with slashes."""
    q, k, _ = synthetic_qkv(layout, (GRID_SLASH,), num_kv_heads=1, head_dim=HEAD_DIM, dtype="float32")
    return pattern.plan(q, k, layout, blocks=BLOCKS)


def example_of(cls: type[Pattern]) -> Pattern:
    """The pattern with sizes that suit the pictures' prompt, where `SMALL` knows them; its own example otherwise."""
    if cls in EXAMPLES:
        return EXAMPLES[cls]
    example = cls.example()
    fields = {field.name for field in dataclasses.fields(example)}  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(example, **{name: size for name, size in SMALL.items() if name in fields})


def gallery() -> str:
    """The gallery's Markdown; draws its pictures."""
    entries = []
    for cls in PATTERNS:
        pattern = example_of(cls)
        plan = plan_of(pattern, LAYOUT)
        title = f"{cls.__name__}, density {float(plan.density()[0]):.2f}"
        save(plot_mask(plan, 0, LAYOUT, title=title), PICTURES / "patterns" / f"{cls.__name__}.png", dots_per_inch=64)
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        entries.append(
            f"### {cls.__name__}\n\n{summary}\n\n"
            f"![{cls.__name__} before and after permutation](pictures/patterns/{cls.__name__}.png)\n\n"
            f"*`{pattern!r}`*\n"
        )
    return "\n".join(entries)


def save(figure: Figure, path: Path, *, dots_per_inch: int = 100) -> None:
    """Writes the picture with a palette of 128 colours, a quarter of the bytes of true colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dots_per_inch)
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Writes all pictures, and the gallery between its marks."""
    plan = plan_of(GRID, LAYOUT)
    title = "A Grid head over text, a video of 16 frames of 4 x 6 tokens, and text"
    save(plot_mask(plan, 0, LAYOUT, title=title), PICTURES / "mask.png")
    for name, draw in METHOD_PICTURES.items():
        save(draw(plan, LAYOUT), PICTURES / f"{name}.png")
    page = DOCS / "patterns.md"
    page.write_text(GALLERY.sub(lambda marks: marks[1] + "\n" + gallery() + "\n" + marks[2], page.read_text()))


if __name__ == "__main__":
    main()
