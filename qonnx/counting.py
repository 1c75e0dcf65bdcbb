"""The inner loop of calibration: one is added to a table for each element, at the index that its leading bits name.

On the way it finds the smallest and the largest element, while both are in the cache. numba's loop takes 0.4 to 1.5
ns per element and lets go of the interpreter's lock, so that one batch is counted while another runs; NumPy's takes 2
ns and holds it. Both give the same.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import struct
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]
Extremes: TypeAlias = tuple[float, float]

# The trailing bits of a float32, which do not name a cell: see `qonnx.sketch`. A constant of the compiled loop.
SHIFT = 12

# Elements looked at at a time: the cells that they name stay in the cache until they are counted.
_CHUNK = 1 << 12
_NUMPY_CHUNK = 1 << 16

# Adding to a cell has to wait for what was just added to it. Neighbours are often alike, so elements of the two halves
# of a chunk are counted in turn; and behind a ReLU many are zeros, which have so many more cells.
_ZEROS = 32

# Most elements lie in so many octaves below the largest: their cells are fetched into the cache before any is needed.
_OCTAVES = 16
_LINE = 64

# A line of the cache holds so many elements.
_AHEAD = _LINE // 4

# Cells are read together, or not at all if they are empty: 2^11 of them, a page of memory in `Table.low`.
_PAGE = 11

# What a narrow cell holds. To look at each count whether that is reached would take a sixth of the time, so the number
# of elements bounds all cells at once: see `Table.room`.
_MOST = (1 << 16) - 1

# 0 - 1 in uint32: what is found for the smallest magnitude, less one, of zeros alone.
_NO_MAGNITUDE = 0xFFFFFFFF


class Table:
    """How many elements begin with each pattern of bits: `low + high`. Memory is that of the pages that are written.

    Attributes:
        low: [2**20 + 32] uint16, narrow, so that many cells fit into the cache. The last 32 are zeros, too.
        high: [2**20 + 32] int64, what does not fit into `low`.
        used: [2**20 / 2048 + 1] bool; a page of 2048 cells of which this is False is empty.
        room: [1] int64, so many more elements fit into `low`, even if all of them fall into its fullest cell.
    """

    def __init__(self) -> None:
        size = (1 << 32 - SHIFT) + _ZEROS
        self.low: npt.NDArray[np.uint16] = np.frombuffer(_zeros(2 * size), np.uint16)
        self.high: npt.NDArray[np.int64] = np.frombuffer(_zeros(8 * size), np.int64)
        self.used: npt.NDArray[np.bool_] = np.zeros((size >> _PAGE) + 1, np.bool_)
        self.room: npt.NDArray[np.int64] = np.full(1, _MOST)

    def counts(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """The cells that are not empty, in increasing order, and how many elements each has."""
        for part in (self.low, self.high):
            self.high[0] += part[-_ZEROS:].sum(dtype=np.int64)
            part[-_ZEROS:] = 0
        low, high = self.low[:-_ZEROS].reshape(-1, 1 << _PAGE), self.high[:-_ZEROS].reshape(-1, 1 << _PAGE)
        used = self.used[:-1]
        if used.all():  # `by_numpy` does not look for pages
            used = used & ((low.max(axis=1) > 0) | (high.max(axis=1) > 0))
        pages = np.flatnonzero(used)
        counts: npt.NDArray[np.int64] = (low[pages] + high[pages]).reshape(-1)
        full = np.flatnonzero(counts)
        cells = (pages[full >> _PAGE] << _PAGE) + (full & ((1 << _PAGE) - 1))
        return cells.astype(np.uint32), counts[full]


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
    table = "uint16[::1], int64[::1], boolean[::1], int64[::1]"
    signature = f"UniTuple(int32, 2)(Array(uint32, 1, 'C', readonly=True), {table})"
    for function in (_mark, _spill, _fetch):
        numba.extending.register_jitable(function)
    numba.extending.overload(_prefetch)(_prefetching(numba))
    try:  # kept on disk, as compiling takes seconds
        loop = numba.njit(signature, nogil=True, cache=True)(_loop)
    except Exception:  # files that are damaged, or that no folder takes
        loop = numba.njit(signature, nogil=True)(_loop)

    def by_numba(x: Floats, table: Table) -> Extremes:
        if not x.size:
            return extremes(x)
        keys = loop(x.view(np.uint32), table.low, table.high, table.used, table.room)
        low, high = struct.unpack("2f", struct.pack("2i", *(key if key >= 0 else key ^ 0x7FFFFFFF for key in keys)))
        return (math.nan, math.nan) if math.isnan(low) or math.isnan(high) else (low, high)

    by_numba(np.zeros(1, np.float32), Table())  # numba's first call takes as long as counting 50 million elements
    return by_numba


def by_numpy(x: Floats, table: Table) -> Extremes:
    """See `Count`."""
    table.used[:] = True
    # ufunc.at adds into the table without making another, unlike bincount. Its index must be int64 and is best
    # never negative: whether to wrap is a branch that signs, being random, mispredict.
    index = np.empty(min(_NUMPY_CHUNK, x.size), np.int64)
    for start in range(0, x.size, _NUMPY_CHUNK):
        chunk = x[start : start + _NUMPY_CHUNK].view(np.uint32)
        np.right_shift(chunk, SHIFT, out=index[: chunk.size])
        np.add.at(table.high, index[: chunk.size], np.int64(1))
    return extremes(x)


def extremes(x: npt.NDArray[np.floating[Any]]) -> Extremes:
    """What `Count` returns, of elements that are not counted."""
    return float(x.min(initial=np.inf)), float(x.max(initial=-np.inf))


def _loop(patterns: Any, low: Any, high: Any, used: Any, room: Any) -> Any:
    """The least and the most pattern, as integers in the order of the floats: NaN lies before -inf or behind inf."""
    least, most, magnitude = np.int32(0x7FFFFFFF), np.int32(-0x80000000), np.uint32(_NO_MAGNITUDE)
    zeros, cells = np.uint32(low.size - _ZEROS), np.empty(_CHUNK, np.uint32)
    for start in range(0, patterns.size, _CHUNK):
        chunk = patterns[start : start + _CHUNK]
        signed, slot = chunk.view(np.int32), np.uint32(0)
        if room[0] < chunk.size:
            _mark(used, magnitude, np.uint32(max(most, ~least)), least < 0)  # what was added until here
            room[0] = _MOST - _spill(low, high, used)
        room[0] -= chunk.size
        # No branches, so it is vectorized, and every result cut to 32 bits, as numba computes with 64 otherwise.
        for element in range(chunk.size):
            flipped = np.int32(np.int32(signed[element] >> np.int32(31)) & np.int32(0x7FFFFFFF))
            key = np.int32(signed[element] ^ flipped)
            least, most = min(least, key), max(most, key)
            # One less, so that zeros come last.
            magnitude = min(magnitude, np.uint32((chunk[element] & np.uint32(0x7FFFFFFF)) - np.uint32(1)))
            cell = np.uint32(chunk[element] >> np.uint32(SHIFT))
            cells[element] = cell if cell else np.uint32(zeros + np.uint32(slot & np.uint32(_ZEROS - 1)))
            slot = np.uint32(slot + np.uint32(1))
        if start == 0:
            _fetch(low, np.uint32(max(most, ~least)), least < 0)
        half = chunk.size // _AHEAD * (_AHEAD // 2)
        for first in range(0, half, _AHEAD // 2):
            _prefetch(patterns, start + _CHUNK + 2 * first)  # of the next chunk
            for element in range(first, first + _AHEAD // 2):  # an index that may be negative takes four instructions
                low[cells[np.uintp(element)]] += np.uint16(1)
                low[cells[np.uintp(half + element)]] += np.uint16(1)
        for element in range(2 * half, chunk.size):
            low[cells[element]] += np.uint16(1)
    _mark(used, magnitude, np.uint32(max(most, ~least)), least < 0)
    return least, most


def _mark(used: Any, smallest: Any, largest: Any, negative: Any) -> None:
    """Notes the pages of zeros, and of all magnitudes between two; the smallest is given less one."""
    sign = (0x80000000 >> SHIFT) >> _PAGE
    used[0] = used[-1] = True
    used[sign] |= negative
    if smallest != np.uint32(_NO_MAGNITUDE):
        for page in range((smallest >> SHIFT) >> _PAGE, ((largest >> SHIFT) >> _PAGE) + 1):
            used[page] = True
            used[sign + page] |= negative


def _spill(low: Any, high: Any, used: Any) -> Any:
    """Empties pages with a cell that is half full into `high`; returns the most that a cell of `low` still holds."""
    left = np.uint16(0)
    for page in range(used.size):
        if used[page]:
            cells = low[page << _PAGE : (page + 1) << _PAGE]
            most = np.uint16(0)
            for cell in range(cells.size):
                most = max(most, cells[cell])
            if most > _MOST // 2:
                for cell in range(cells.size):
                    high[(page << _PAGE) + cell] += np.int64(cells[cell])
                    cells[cell] = 0
            else:
                left = max(left, most)
    return np.int64(left)


def _fetch(low: Any, largest: Any, negative: Any) -> None:
    """Asks for the cells that lie below that of the largest magnitude."""
    cells, last, sign = _OCTAVES * ((1 << 23) >> SHIFT), largest >> SHIFT, 0x80000000 >> SHIFT
    for cell in range(last - min(last, cells), last + 1, _LINE // low.itemsize):
        _prefetch(low, cell)
        if negative:
            _prefetch(low, sign + cell)


def _prefetch(array: Any, index: Any) -> None:
    """Asks for an element that is needed soon. It may lie outside."""


def _prefetching(numba: Any) -> Any:
    """What numba is to compile instead of `_prefetch`: the processor's own instruction."""
    from llvmlite import ir

    def generated(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer, number = builder.gep(array.data, [arguments[1]]), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", (pointer.type,), kind)
        builder.call(function, [pointer, number(0), number(3), number(1)])  # to read, to the nearest cache, data
        return context.get_dummy_value()

    @numba.extending.intrinsic  # type: ignore[untyped-decorator]
    def prefetch(context: Any, array: Any, index: Any) -> Any:
        return numba.types.void(array, numba.types.intp), generated

    return lambda array, index: lambda array, index: prefetch(array, index)


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
