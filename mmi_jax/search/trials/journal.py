"""The journal of a long run: finished pieces, one JSON line each, so that a killed run goes on where it stopped."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

type JournalEntry = Mapping[str, Any]
"""One finished piece: JSON values by name."""


class Journal:
    """A file of JSON lines: the first says what the run is, every other is one finished piece.

    A line is appended in one write and flushed to the disk, and a last line cut short by a kill is dropped when the
    file is opened again, so a reader sees whole pieces only.
    """

    def __init__(self, path: str | os.PathLike[str], run: JournalEntry):
        """Opens the journal, or begins it.

        Args:
          path: of the file.
          run: what the pieces depend on, JSON values.

        Raises:
          ValueError: the file is no journal, or one of another run; the message names what differs.
        """
        self.path = Path(path)
        self._run = json.loads(json.dumps(dict(run)))
        self._entries: list[JournalEntry] = []
        if lines := _whole_lines(self.path) if self.path.exists() else []:
            _check_same_run(self.path, lines[0], self._run)
            self._entries += lines[1:]
        else:
            self._append({"run": self._run})

    @property
    def run(self) -> dict[str, Any]:
        """What the pieces depend on."""
        return dict(self._run)

    @property
    def entries(self) -> tuple[JournalEntry, ...]:
        """The finished pieces, in the order they were added."""
        return tuple(self._entries)

    def matching(self, **values: object) -> list[JournalEntry]:
        """The finished pieces that have these values, in the order they were added."""
        return [entry for entry in self._entries if all(entry.get(name) == value for name, value in values.items())]

    def add(self, entry: JournalEntry) -> None:
        """Keeps one finished piece; it is on the disk when this returns."""
        entry = json.loads(json.dumps(dict(entry)))  # what a later run will read: same values, same types
        self._append(entry)
        self._entries.append(entry)

    def _append(self, value: JournalEntry) -> None:
        line = (json.dumps(value) + "\n").encode()
        with open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def read_journal(path: str | os.PathLike[str]) -> tuple[JournalEntry, tuple[JournalEntry, ...]]:
    """What the run was, and its finished pieces.

    Raises:
      ValueError: no such file, or no journal.
    """
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    lines = _whole_lines(Path(path))
    if not lines:
        raise ValueError(f"{path}: the journal is empty")
    return lines[0]["run"], tuple(lines[1:])


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of the file, which is cut after the last whole one; none if its first was never finished."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: a journal must hold one JSON object a line: {error}") from error
    is_ours = all(isinstance(line, dict) for line in lines) and content.startswith(b'{"run": '[: len(content)])
    if not is_ours or (lines and set(lines[0]) != {"run"}):
        raise ValueError(f'{path}: a journal must begin with a line {{"run": ...}}; delete the file to begin anew')
    if len(whole) < len(content):
        with open(path, "ab") as file:
            file.truncate(len(whole))
    return lines


def _check_same_run(path: Path, first: dict[str, Any], run: dict[str, Any]) -> None:
    earlier = first["run"]
    if earlier == run:
        return
    differing = sorted(name for name in {*earlier, *run} if earlier.get(name) != run.get(name))
    changes = "; ".join(f"{name} was {_short(earlier.get(name))}, is {_short(run.get(name))}" for name in differing)
    raise ValueError(f"{path} holds the pieces of another run: {changes}; name another file or delete this one")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
