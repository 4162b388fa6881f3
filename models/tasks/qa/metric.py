"""The metric: accuracy over all questions and by kind; open answers count where they are the right one, normalised."""

import dataclasses
import re
from collections.abc import Sequence

WORDS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ARTICLES = frozenset(("a", "an", "the"))
NUMBERS: dict[str, str] = {name: str(n) for n, name in enumerate(WORDS)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Questions answered right, of all questions and by kind."""

    correct: int
    num_questions: int
    by_kind: dict[str, tuple[int, int]]

    @property
    def accuracy(self) -> float:
        """Fraction of the questions answered right."""
        return self.correct / self.num_questions


def scores(kinds: Sequence[str], is_right: Sequence[bool]) -> Score:
    """The score of questions of these kinds.

    Raises:
        ValueError: no question.
    """
    if not kinds or len(kinds) != len(is_right):
        raise ValueError(f"a score needs answers to one question or more, got {len(kinds)} and {len(is_right)}")
    by_kind = {
        kind: (sum(r for k, r in zip(kinds, is_right, strict=True) if k == kind), kinds.count(kind))
        for kind in dict.fromkeys(kinds)
    }
    return Score(correct=sum(is_right), num_questions=len(kinds), by_kind=by_kind)


def matches(answer: str, expected: str) -> bool:
    """Whether an open answer is the expected one after normalising both.

    "The red car." matches "red car", "Two" matches "2", "red" does not match "red car".
    """
    return normalised(answer) == normalised(expected)


def normalised(text: str) -> str:
    """Lower case, numbers up to ten as digits, without punctuation and articles."""
    words = re.findall(r"[^\W_]+", text.lower())
    return " ".join(NUMBERS[word] if word in NUMBERS else word for word in words if word not in ARTICLES)
