"""Text in lines: figures in columns, names last.

A name is never folded and a figure never cut off, so that lines can be copied, searched and sorted; the same lines go
to a terminal and into a pipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from qonnx.comparison import Difference
    from qonnx.plan import LayerPlan

# How many layers a list names before it only counts the rest.
MOST = 12

GOOD, BAD, TITLE = "bold green", "bold yellow", "bold"


def warning_lines(warnings: Iterable[str]) -> Iterator[Text]:
    """One line each."""
    return (Text(f"warning: {warning}", BAD) for warning in warnings)


def differences(entries: Sequence[Difference]) -> list[Text]:
    """One line a value, figures first; for integers the share of equal elements."""
    rows = [("SQNR dB", "cosine", "largest error", "")]
    for entry in entries:
        name = f"{entry.name} ({entry.op})" if entry.op else entry.name
        if math.isnan(entry.agreement):
            rows.append((f"{entry.sqnr_db:.1f}", f"{entry.cosine:.5f}", f"{entry.max_error:.3g}", name))
        else:
            rows.append(("", "", f"{percent_text(entry.agreement)} equal", name))
    return columns(rows, right=3)


def nonfinite(entry: Difference) -> bool:
    """Whether the quantized model made values NaN or infinite."""
    return entry.nonfinite > entry.nonfinite_reference


def columns(rows: Sequence[tuple[str, ...]], right: int, *, sentences: bool = False) -> list[Text]:
    """Columns under one another, the first `right` of them flush right; the last is as long as it likes.

    Args:
        rows: the cells of each line.
        right: how many columns are flush right.
        sentences: the last column holds sentences, which a terminal may fold.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)] if rows else []
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column < right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        text = "  ".join([*cells, row[-1]]).rstrip()
        lines.append(Text(text) if sentences else line(text))
    return lines


def line(text: str) -> Text:
    """A line that is never folded."""
    return Text(text, no_wrap=True, overflow="ignore")


def by_reason(layers: Sequence[LayerPlan]) -> list[Text]:
    """Each reason once, with the layers that it keeps in float."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.reason, []).append(f"{layer.path or layer.node} ({layer.op})")
    lines: list[Text] = []
    said = 0
    for reason, names in groups.items():
        if said >= MOST:
            return [*lines, Text(f"  ... and {len(layers) - said} more: --save-plan lists them all")]
        if len(names) == 1:
            lines.append(Text(f"  {names[0]}: {reason}"))
        else:
            lines += [Text(f"  {reason}"), *named(names, MOST - said, "    ")]
        said += len(names)
    return lines


def named(names: Sequence[str], most: int = MOST, indent: str = "  ") -> list[Text]:
    """The first names, a line each, and how many more there are."""
    lines = [line(indent + name) for name in names[:most]]
    if len(names) > most:
        lines.append(line(f"{indent}... and {len(names) - most} more"))
    return lines


def size_text(size: int) -> str:
    """A size that keeps two digits or more.

    >>> size_text(999), size_text(59_879), size_text(90_265_600)
    ('999 B', '59.9 kB', '90.3 MB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"


def percent_text(share: float) -> str:
    """A percentage that is not rounded to 0 % or 100 % unless it is.

    >>> percent_text(0.158), percent_text(0.00042), percent_text(0.99996), percent_text(1.0)
    ('16%', '0.042%', '99.996%', '100%')
    """
    percent = 100 * share
    if 0 < percent < 10:
        return f"{percent:.2g}%"
    if 99 < percent < 100:
        return f"{percent:.{-math.floor(math.log10(100 - percent))}f}%"
    return f"{percent:.0f}%"


def shape_text(shape: Iterable[int]) -> str:
    """Sizes of a tensor.

    >>> shape_text((8, 3, 224, 224))
    '8x3x224x224'
    """
    return "x".join(map(str, shape))


def count(number: int, noun: str) -> str:
    """A number of things.

    >>> count(1, "batch"), count(2, "batch"), count(0, "layer")
    ('1 batch', '2 batches', '0 layers')
    """
    plural = f"{noun}es" if noun.endswith(("ch", "s", "x")) else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"
