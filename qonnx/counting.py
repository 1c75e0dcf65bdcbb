"""The inner loop of calibration: one is added to a table for each element, at the index that its leading bits name.

On the way it finds the smallest and the largest element, while both are in the cache. numba's loop takes about 1 ns per
element and lets go of the interpreter's lock, so that one batch is counted while another runs; NumPy's takes 2 ns and
holds it. Both give the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Table: TypeAlias = npt.NDArray[np.int32]
Floats: TypeAlias = npt.NDArray[np.float32]
Extremes: TypeAlias = tuple[float, float]

Count: TypeAlias = Callable[[Floats, int, Table], Extremes]
"""Adds one to `table[pattern >> shift]` for the bit pattern of each element, however many there are.

Returns the smallest and the largest element; both are NaN if an element was, and of no elements they are inf and -inf.
"""

# Elements looked at at a time: they, and the indices (int64) that NumPy makes of them, stay in the cache until they are
# counted.
_CHUNK = 1 << 14
_NUMPY_CHUNK = 1 << 16


@functools.cache
def counting() -> Count:
    """The quicker of the two that can be had: numba's where it is installed."""
    try:
        import numba
    except ImportError:
        return by_numpy
    # An array that is only read may be one that can be written, too.
    signature = "UniTuple(int32, 2)(Array(uint32, 1, 'C', readonly=True), uint32, int32[::1])"
    # Not kept on disk: compiling takes 0.3 s, hardly more than loading, and damaged files would end a run.
    loop = numba.njit(signature, nogil=True)(_loop)

    def by_numba(x: Floats, shift: int, table: Table) -> Extremes:
        keys = np.array(loop(x.view(np.uint32), shift, table), np.int32)
        low, high = _reordered(keys).view(np.float32)
        if np.isnan(low) or np.isnan(high):
            low = high = np.float32(np.nan)
        return (float(low), float(high)) if x.size else extremes(x)

    return by_numba


def by_numpy(x: Floats, shift: int, table: Table) -> Extremes:
    """See `Count`."""
    # ufunc.at adds into the table without making another, unlike bincount. Its index must be int64 and is best
    # never negative: whether to wrap is a branch that signs, being random, mispredict.
    index = np.empty(min(_NUMPY_CHUNK, x.size), np.int64)
    for start in range(0, x.size, _NUMPY_CHUNK):
        chunk = x[start : start + _NUMPY_CHUNK].view(np.uint32)
        np.right_shift(chunk, shift, out=index[: chunk.size])
        np.add.at(table, index[: chunk.size], np.int32(1))
    return extremes(x)


def extremes(x: npt.NDArray[np.floating[Any]]) -> Extremes:
    """What `Count` returns, of elements that are not counted."""
    return float(x.min(initial=np.inf)), float(x.max(initial=-np.inf))


def _reordered(patterns: Any) -> Any:
    """Makes integers of float32 patterns that are in the order of the floats, and the reverse.

    NaN comes before -inf or behind inf, by its sign.
    """
    return patterns ^ ((patterns >> 31) & np.int32(0x7FFFFFFF))


def _loop(patterns: Any, shift: Any, table: Any) -> Any:
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for start in range(0, patterns.size, _CHUNK):
        chunk = patterns[start : start + _CHUNK]
        signed = chunk.view(np.int32)
        for element in range(signed.size):  # integers, and a loop of their own: so it is vectorized
            key = signed[element] ^ ((signed[element] >> 31) & np.int32(0x7FFFFFFF))  # `_reordered`
            low, high = min(low, key), max(high, key)
        for element in range(chunk.size):
            table[chunk[element] >> shift] += 1
    return low, high
