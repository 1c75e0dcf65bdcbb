"""How far a command is: one line on a terminal, rewritten in place and gone at the end; nothing in a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qonnx.observation import Progress


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Says on standard error what is going on, and for how long; the function that it gives changes the text."""
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)  # the stream as it is now: exporters redirect it while they work
    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    bar = Bar(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda text: bar.update(task, description=text)


@contextlib.contextmanager
def calibrating(then: str = "") -> Iterator[Callable[[Progress], None]]:
    """The same for calibration: how far it is, how fast, and how long it will take.

    Args:
        then: what comes after the last batch.
    """
    with working("preparing") as say:

        def show(progress: Progress) -> None:
            if then and progress.batches == progress.total:
                say(f"{then}; calibrated on {progress.samples} samples, {progress.rate:.1f} a second")
            else:
                say(f"calibrating: {so_far(progress)}")

        yield show


def so_far(progress: Progress) -> str:
    """How far and how fast in a few words.

    >>> from qonnx.observation import Progress
    >>> so_far(Progress(12, 96, 3.0, 32.0, total=40, left=7.0)), so_far(Progress(12, 96, 3.0, 32.0))
    ('12 of 40 batches, 32.0 samples/s, 7 s left', '12 batches, 32.0 samples/s')
    """
    total = "" if progress.total is None else f" of {progress.total}"
    left = "" if progress.left is None else f", {_duration(progress.left)} left"
    return f"{progress.batches}{total} batches, {progress.rate:.1f} samples/s{left}"


def _duration(seconds: float) -> str:
    """In the unit that people would use.

    >>> _duration(7.2), _duration(600), _duration(9000)
    ('7 s', '10 min', '2.5 h')
    """
    for unit, name, digits in ((3600.0, "h", 1), (60.0, "min", 0)):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.{digits}f} {name}"
    return f"{seconds:.0f} s"
