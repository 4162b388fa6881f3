"""The demo's video, text, trained model and questions: files of this folder."""

from pathlib import Path

_ASSETS = Path(__file__).parent
DEMO_TEXT = _ASSETS / "demo_text.txt"
CHAT_TEMPLATE = _ASSETS / "chat_template.jinja"
DEMO_MODEL = _ASSETS / "small"
"""The checkpoint that `models.small` trains."""
DEMO_VIDEO = _ASSETS / "demo.mp4"
"""72 seconds: at `DEMO_FPS` frames per second 288 frames, and 2,304 tokens of the demo's model."""
DEMO_FPS = 4
DEMO_ANSWERS = {"red": "7", "blue": "3", "yellow": "9", "green": "4"}
"""The cards in the video, in order: colour and digit."""


def demo_question(colour: str) -> str:
    """The question about a card."""
    return f"Which digit is on the {colour} card?"
