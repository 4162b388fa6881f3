"""Texts of the tasks: questions, and documents that stand between the frames."""

from pathlib import Path

import numpy as np

from models.tasks.pictures import COLOURS

DIGITS = tuple("0123456789")
LETTERS = tuple("ABCD")
MATCHING_QUESTION = "Which digit was on this picture before?"
_CORPUS = Path(__file__).parents[1] / "assets" / "demo_text.txt"


def card_question(colour: int) -> str:
    """The question for the digit on a card, by the number of its colour."""
    return f"Which digit is on the {tuple(COLOURS)[colour]} card?"


def options(digits: tuple[int, ...]) -> str:
    """Digits offered under letters, to stand behind a question."""
    return " " + ", ".join(f"{letter}: {digit}" for letter, digit in zip(LETTERS, digits, strict=True)) + "."


def sentences() -> list[str]:
    """The sentences that documents are made of."""
    return [line.strip() for line in _CORPUS.read_text(encoding="utf-8").splitlines() if line.strip()]


def document(num_sentences: int, rng: np.random.Generator) -> str:
    """A paragraph of sentences drawn at random, a line each."""
    lines = sentences()
    return "\n".join(lines[i] for i in rng.integers(0, len(lines), num_sentences)) + "\n"
