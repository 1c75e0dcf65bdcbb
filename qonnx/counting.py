"""The inner loop of calibration: one is added to a table for each element, at the index that its leading bits name.

On the way it finds the smallest and the largest element, while both are in the cache. numba's loop takes about 0.7 ns
per element and lets go of the interpreter's lock, so that one batch is counted while another runs; NumPy's takes 2 ns
and holds it. Both give the same.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]
Extremes: TypeAlias = tuple[float, float]

# Elements looked at at a time: they, and the indices (int64) that NumPy makes of them, stay in the cache until they are
# counted.
_CHUNK = 1 << 14
_NUMPY_CHUNK = 1 << 16

# Adding to a cell has to wait for what was just added to it. Neighbours are often alike, so elements of so many parts
# of a chunk are counted in turn; and behind a ReLU many are zeros, which have so many more cells.
_PARTS = 8
_ZEROS = 4 * _PARTS

_FULL = np.int64(1 << 16)


class Table:
    """How many elements begin with each pattern of bits: `low + high`. Memory is that of the pages that are written.

    Args:
        bits: how many of the leading bits of a float32 name a cell.

    Attributes:
        shift: the other bits.
        low: [2**bits + 32] uint16, narrow, so that many cells fit into the cache. The last 32 are zeros, too.
        high: [2**bits + 32] int64, what does not fit into `low`.
    """

    def __init__(self, bits: int) -> None:
        self.shift = 32 - bits
        size = (1 << bits) + _ZEROS
        self.low: npt.NDArray[np.uint16] = np.frombuffer(_zeros(2 * size), np.uint16)
        self.high: npt.NDArray[np.int64] = np.frombuffer(_zeros(8 * size), np.int64)

    def counts(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """The cells that are not empty, in increasing order, and how many elements each has."""
        for part in (self.low, self.high):
            self.high[0] += part[-_ZEROS:].sum(dtype=np.int64)
            part[-_ZEROS:] = 0
        cells = np.flatnonzero((self.low != 0) | (self.high != 0))
        return cells.astype(np.uint32), self.low[cells] + self.high[cells]


Count: TypeAlias = Callable[[Floats, Table], Extremes]
"""Adds one to the cell of each element of a contiguous array.

Returns the smallest and the largest element; both are NaN if an element was, and of no elements they are inf and -inf.
"""


@functools.cache
def counting() -> Count:
    """The quicker of the two that can be had: numba's where it is installed."""
    try:
        import numba
    except ImportError:
        return by_numpy
    # An array that is only read may be one that can be written, too.
    signature = "UniTuple(int32, 2)(Array(uint32, 1, 'C', readonly=True), uint32, uint16[::1], int64[::1])"
    # Not kept on disk: compiling takes 0.4 s, hardly more than loading, and damaged files would end a run.
    numba.extending.register_jitable(_add)
    loop = numba.njit(signature, nogil=True)(_loop)

    def by_numba(x: Floats, table: Table) -> Extremes:
        keys = np.array(loop(x.view(np.uint32), table.shift, table.low, table.high), np.int32)
        low, high = _reordered(keys).view(np.float32)
        if np.isnan(low) or np.isnan(high):
            low = high = np.float32(np.nan)
        return (float(low), float(high)) if x.size else extremes(x)

    return by_numba


def by_numpy(x: Floats, table: Table) -> Extremes:
    """See `Count`."""
    # ufunc.at adds into the table without making another, unlike bincount. Its index must be int64 and is best
    # never negative: whether to wrap is a branch that signs, being random, mispredict.
    index = np.empty(min(_NUMPY_CHUNK, x.size), np.int64)
    for start in range(0, x.size, _NUMPY_CHUNK):
        chunk = x[start : start + _NUMPY_CHUNK].view(np.uint32)
        np.right_shift(chunk, table.shift, out=index[: chunk.size])
        np.add.at(table.high, index[: chunk.size], np.int64(1))
    return extremes(x)


def extremes(x: npt.NDArray[np.floating[Any]]) -> Extremes:
    """What `Count` returns, of elements that are not counted."""
    return float(x.min(initial=np.inf)), float(x.max(initial=-np.inf))


def _reordered(patterns: Any) -> Any:
    """Makes integers of float32 patterns that are in the order of the floats, and the reverse.

    NaN comes before -inf or behind inf, by its sign.
    """
    return patterns ^ ((patterns >> 31) & np.int32(0x7FFFFFFF))


def _loop(patterns: Any, shift: Any, low: Any, high: Any) -> Any:
    least, most = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    zeros = np.uint32(low.size - _ZEROS)
    for start in range(0, patterns.size, _CHUNK):
        chunk = patterns[start : start + _CHUNK]
        signed, smallest = chunk.view(np.int32), np.int32(0x7FFFFFFF)
        for element in range(signed.size):  # integers, and a loop of their own: so it is vectorized
            key = signed[element] ^ ((signed[element] >> 31) & np.int32(0x7FFFFFFF))  # `_reordered`
            smallest, most = min(smallest, key), max(most, key)
        least = min(least, smallest)
        length = chunk.size // _PARTS
        parts = chunk[: _PARTS * length].reshape(_PARTS, length)
        if smallest == 0:  # the output of a ReLU
            for element in range(length):
                for part in range(_PARTS):
                    cell = parts[part, element] >> shift
                    slot = np.uint32(zeros + np.uint32(4 * part + (element & 3)))
                    _add(low, high, cell if cell else slot)
        else:
            for element in range(length):
                for part in range(_PARTS):
                    _add(low, high, parts[part, element] >> shift)
        for element in range(parts.size, chunk.size):
            _add(low, high, chunk[element] >> shift)
    return least, most


def _add(low: Any, high: Any, cell: Any) -> None:
    count = np.uint16(low[cell] + np.uint16(1))
    low[cell] = count
    if count == 0:
        high[cell] += _FULL


def _zeros(size: int) -> mmap.mmap:
    """Bytes of which only pages that are written are in memory.

    Unlike those of np.zeros, which asks for huge pages for so large an array. A mapping that were not private would
    hold what is read, too.
    """
    mapped = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapped.madvise(mmap.MADV_NOHUGEPAGE)
    return mapped
