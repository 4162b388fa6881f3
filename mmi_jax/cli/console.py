"""Terminal output: progress on stderr, tables on either stream."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def stderr_console() -> Console:
    """The console of progress and warnings."""
    return Console(stderr=True, highlight=False)


def stdout_console() -> Console:
    """The console of results."""
    return Console(highlight=False)


@contextlib.contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Callable[..., None]]:
    """A bar that the yielded function moves: `update(done, total)`; further arguments are ignored."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeElapsedColumn(), console=stderr_console()) as progress:
        task = progress.add_task(label, total=None)

        def update(done: int, total: int, *_) -> None:
            progress.update(task, completed=done, total=total)

        yield update


@contextlib.contextmanager
def work_bar(unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with the remaining time, moved by `update(done, total, what)`; work done before is not timed."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=stderr_console()) as progress:
        task = progress.add_task("", total=None)

        def update(done: int, total: int, what: str) -> None:
            if progress.tasks[0].total != total:  # new work, of which some may be done already
                progress.reset(task, total=total, completed=done)
            progress.update(task, completed=done, description=what)

        yield update


@contextlib.contextmanager
def spinner(label: str) -> Iterator[Callable[[str], None]]:
    """A spinner with the elapsed time; the yielded function sets the stage: `stage("compiling")`."""
    columns = (SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=stderr_console()) as progress:
        task = progress.add_task(label, total=1)
        yield lambda stage: progress.update(task, description=f"{label}: {stage}")
        progress.update(task, completed=1)
