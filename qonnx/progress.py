"""How far a command is: one line on a terminal, rewritten in place and gone at the end; nothing in a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
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
def calibrating(total: int, then: str = "") -> Iterator[Callable[[Progress], None]]:
    """The same for calibration: how far it is, how fast, and how long it will take.

    Args:
        total: how many batches there are.
        then: what comes after the last of them.
    """
    with working("preparing") as say:

        def show(progress: Progress) -> None:
            if then and progress.batches >= total:
                say(f"{then}; calibrated on {progress.samples} samples, {progress.rate:.1f} a second")
            else:
                left = progress.seconds / progress.batches * max(total - progress.batches, 0)
                so_far = f"{progress.batches} of {total} batches, {progress.rate:.1f} samples/s"
                say(f"calibrating: {so_far}, {left:.0f} s left")

        yield show


def batch_count(data: Path, max_batches: int | None, hold_out: bool = False) -> int:
    """How many batches calibration will see, for the time left; 1 where the data cannot be read, which ends it."""
    from qonnx.data import HoldOut

    files = sum(file.suffix in (".npz", ".npy") for file in data.iterdir()) if data.is_dir() else 1
    count = min(files, max_batches or files)
    return sum(1 for _ in HoldOut(({} for _ in range(count)), samples=0)) if hold_out else count
