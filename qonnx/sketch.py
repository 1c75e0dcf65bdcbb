"""How often each value occurred: a histogram that needs no range, and in which every calibrator finds its threshold.

An element is counted in the cell that the leading 20 bits of its float32 pattern name: the sign, the 8 bits of the
exponent and the first 11 bits of the mantissa. Hence

* the cell of an element does not depend on any other element: no first pass over the data finds a range, and neither
  the order of batches, nor their size, nor the order of merges changes a single count;
* a cell is 2^-11 = 0.05 % of its values wide, from 1.2e-38 to 3.4e38, so a threshold read off a cell's edge is at most
  0.05 % away from the one that all raw values give;
* there are 2^20 cells at most, of which a tensor fills a few ten thousand, however many samples are seen.

The idea is that of a histogram with cells of constant relative width (Masson et al., DDSketch, VLDB 2019), with the
logarithm read off the floating point format.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from qonnx.counting import SHIFT, Extremes, Table, counting, extremes

Floats: TypeAlias = npt.NDArray[np.float32]

# Mantissa bits that name a cell. Entropy calibration wants 2048 bins or more up to the largest magnitude: 2^11.
MANTISSA_BITS = 23 - SHIFT

_SIGN = np.uint32(0x80000000 >> SHIFT)
_INFINITE = np.uint32(0x7F800000 >> SHIFT)

# Elements that are worth fetching a table into the cache for.
_HOLD = 1 << 16


class Cells(NamedTuple):
    """Counted intervals [low, high), in increasing order and without overlap; the values in one cannot be told apart.

    Attributes:
        low: [cells] float64, the lower edges.
        high: [cells] float64, the upper edges.
        counts: [cells] int64, elements in each; never 0.
    """

    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class Sketch:
    """The non-empty cells of a histogram of float32 bit patterns. Made by `Counter` or `sketch`.

    Attributes:
        cells: [cells] uint32, the leading bits of the patterns, in increasing order.
        counts: [cells] int64, elements in each cell; never 0.
    """

    cells: npt.NDArray[np.uint32]
    counts: npt.NDArray[np.int64]

    @property
    def count(self) -> int:
        """Elements counted, NaN and infinite ones included."""
        return int(self.counts.sum())

    @property
    def nonfinite(self) -> int:
        """How many elements were NaN or infinite."""
        return int(self.counts[(self.cells & ~_SIGN) >= _INFINITE].sum())

    @property
    def zeros(self) -> int:
        """How many elements were 0, or so small (below 6e-42) that no type tells them from 0."""
        return int(self.counts[(self.cells & ~_SIGN) == 0].sum())

    @property
    def sum_squares(self) -> float:
        """The sum of the squares of the finite elements, each at the centre of its cell: 0.05 % off at most."""
        magnitude = self.cells & ~_SIGN
        known = (magnitude != 0) & (magnitude < _INFINITE)
        centre = (_edge(magnitude[known]) + _edge(magnitude[known] + np.uint32(1))) / 2
        return float(np.sum(self.counts[known] * np.square(centre)))

    def merge(self, other: Sketch) -> Sketch:
        """The histogram of both sets of elements together."""
        cells = np.union1d(self.cells, other.cells)
        counts = np.zeros(cells.size, np.int64)
        counts[np.searchsorted(cells, self.cells)] += self.counts
        counts[np.searchsorted(cells, other.cells)] += other.counts
        return Sketch(cells, counts)

    def magnitudes(self) -> Cells:
        """The distribution of |x| over the finite elements; zeros are the first cell, [0, 5.7e-42).

        Example:
            >>> low, high, counts = sketch(np.array([-1, 1, 2, np.inf], np.float32)).magnitudes()
            >>> print(low, high.round(4), counts)
            [1. 2.] [1.0005 2.001 ] [2 1]
        """
        magnitude = self.cells & ~_SIGN
        cells, inverse = np.unique(magnitude[magnitude < _INFINITE], return_inverse=True)
        counts = np.zeros(cells.size, np.int64)
        np.add.at(counts, inverse, self.counts[magnitude < _INFINITE])
        return Cells(_edge(cells), _edge(cells + np.uint32(1)), counts)

    def values(self) -> Cells:
        """The distribution of x over the finite elements, negative ones first."""
        magnitude = self.cells & ~_SIGN
        finite = magnitude < _INFINITE
        negative = finite & (self.cells >= _SIGN)
        positive = finite & ~negative
        low = np.concatenate([-_edge(magnitude[negative] + np.uint32(1))[::-1], _edge(magnitude[positive])])
        high = np.concatenate([-_edge(magnitude[negative])[::-1], _edge(magnitude[positive] + np.uint32(1))])
        return Cells(low, high, np.concatenate([self.counts[negative][::-1], self.counts[positive]]))


def _edge(magnitude: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """The lower edges of cells of positive values. That above the largest finite cell is 2^128, not infinity."""
    edge = (magnitude << np.uint32(SHIFT)).view(np.float32).astype(np.float64)
    return np.where(magnitude == _INFINITE, 2.0**128, edge)


class Counter:
    """A histogram that grows in place. Several threads may add to it.

    The table has one slot for every possible cell; the operating system gives memory only to the pages of it that are
    written, which are few, as real values lie in a few octaves.

    Every element is counted. Of a sample, even of every second element, the divergence that entropy calibration looks
    at often has its minimum elsewhere, up to a third away: it has several minima that are nearly equal.
    """

    def __init__(self) -> None:
        self._table = Table()
        self._held: list[Floats] = []
        self._lock = threading.Lock()
        self._count = counting()  # here, not in a thread: the first call may compile it

    def add(self, x: npt.NDArray[Any]) -> Extremes:
        """Counts the elements of an array of any shape and float type, as the float32 nearest to each.

        Small arrays are held until they are worth fetching the table into the cache for: do not change them afterwards.

        Returns:
            The smallest and the largest element; both are NaN if an element was.
        """
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
        with self._lock:
            if flat.size >= _HOLD:
                return self._count(flat, self._table)
            self._held.append(flat)
            if sum(part.size for part in self._held) >= _HOLD:
                self._count_held()
        return extremes(flat)

    def _count_held(self) -> None:
        for x in self._held:
            self._count(x, self._table)
        self._held.clear()

    def sketch(self) -> Sketch:
        """What was counted so far."""
        with self._lock:
            self._count_held()
            return Sketch(*self._table.counts())


def sketch(x: npt.NDArray[Any]) -> Sketch:
    """The histogram of one array."""
    counter = Counter()
    counter.add(x)
    return counter.sketch()
