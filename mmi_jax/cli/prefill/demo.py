"""The demo: a shipped video, the small trained model, a question with its right answer, and patterns that suit both."""

from mmi_jax import Blocks, Grid, PatternTable, TriShape, VerticalSlash
from mmi_jax.method.token_groups import FramePlace
from models.assets.demo import DEMO_ANSWERS, demo_question

PROMPT = demo_question("red")
MAX_NEW_TOKENS = 4
BLOCKS = Blocks(q=64, kv=32)
"""Smaller than a chip's tiles of 128: the demo's prompt would fill only 19 of those, too few to leave any out."""
NOTE = "The video also shows a blue, a yellow and a green card; ask for them with --prompt."
NUM_LAYERS, NUM_HEADS = 8, 6
"""Of the shipped model."""


def right_answer(prompt: str) -> str | None:
    """What the demo's model should say to `prompt` about the demo's video; None for a question of the user's own."""
    return {demo_question(colour): digit for colour, digit in DEMO_ANSWERS.items()}.get(prompt)


def demo_table() -> PatternTable:
    """Three patterns round-robin: the last queries dense, one place of every frame, the heaviest keys."""
    near = TriShape(sink=32, local=256, last=64)
    same_place_in_every_frame = Grid(strides=(FramePlace(),), use_slash=True, local=64, sink=32)
    content = VerticalSlash(vertical=256, slash=256, local=64)
    heads = (near, same_place_in_every_frame, content) * (NUM_HEADS // 3)
    return PatternTable(
        layers=(heads,) * NUM_LAYERS, model="the demo model", provenance={"source": "written by hand for the demo"}
    )
