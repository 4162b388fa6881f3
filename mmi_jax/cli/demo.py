"""The demo: a shipped video, a tiny random model built on the spot, and patterns that suit its heads."""

import hashlib
import inspect
from pathlib import Path

from mmi_jax import Blocks, Grid, PatternTable, SwinWindow, TriShape, VerticalSlash
from mmi_jax.console import spinner
from mmi_jax.keys import FramePlace
from models import demo

PROMPT = "What happens in this video?"
MAX_NEW_TOKENS = 8
BLOCKS = Blocks(q=64, kv=32)
"""Smaller than a chip's tiles of 128: the demo's prompt would fill only 19 of those, too few to leave any out."""

NOTE = (
    "The demo model's weights are random and untrained: what it says means nothing, and its sparse answer need not "
    "equal the dense one."
)


def built_model(directory: Path) -> Path:
    """The demo model's checkpoint inside `directory`, built unless one of this version stands there."""
    version = hashlib.sha256(inspect.getsource(demo).encode() + demo.DEMO_TEXT.read_bytes()).hexdigest()[:8]
    path = directory / f"model-{version}"
    if not path.exists():
        with spinner("building the demo model"):
            demo.build_demo_model(path)
    return path


def demo_table() -> PatternTable:
    """What `models.demo` shapes the four heads of each kv group to look at, as patterns."""
    near_in_time = TriShape(sink=32, local=384, last=64)
    same_place_in_every_frame = Grid(strides=(FramePlace(),), use_slash=True, local=64, sink=32)
    same_row_in_every_frame = SwinWindow(frames=64, rows=1, columns=64, sink=32)
    content = VerticalSlash(vertical=256, slash=256, local=64)
    heads = (near_in_time, same_place_in_every_frame, same_row_in_every_frame, content) * 2
    return PatternTable(
        layers=(heads,) * 4, model="the demo model", provenance={"source": "written by hand for the demo model's heads"}
    )
