"""The inner loop of calibration: one is added to a table for each element, at the index that its leading bits name.

numba's loop takes about 0.8 ns per element and lets go of the interpreter's lock, so that one batch is counted while
another runs; NumPy's takes 1.7 ns and holds it. Both give the same counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Table: TypeAlias = npt.NDArray[np.int32]
Count: TypeAlias = Callable[[npt.NDArray[np.uint32], int, Table], None]

# Elements converted at a time: the indices (int64) of a chunk stay in the cache until they are counted.
_CHUNK = 1 << 15


@functools.cache
def counting() -> Count:
    """The quicker of the two that can be had: numba's where it is installed."""
    try:
        import numba
    except ImportError:
        return by_numpy
    read_only = numba.types.Array(numba.uint32, 1, "C", readonly=True)  # arrays that may be written pass, too
    signature = numba.void(read_only, numba.uint32, numba.int32[::1])
    # Not kept on disk: compiling takes 0.3 s, hardly more than loading, and damaged files would end a run.
    compiled: Count = numba.njit(signature, nogil=True)(_loop)
    return compiled


def by_numpy(patterns: npt.NDArray[np.uint32], shift: int, table: Table) -> None:
    """Adds one to `table[pattern >> shift]` for each pattern, however many there are."""
    # ufunc.at adds into the table without making another, unlike bincount. Its index must be int64 and is best
    # never negative: whether to wrap is a branch that signs, being random, mispredict.
    index = np.empty(min(_CHUNK, patterns.size), np.int64)
    for start in range(0, patterns.size, _CHUNK):
        chunk = patterns[start : start + _CHUNK]
        np.right_shift(chunk, shift, out=index[: chunk.size])
        np.add.at(table, index[: chunk.size], np.int32(1))


def _loop(patterns: Any, shift: Any, table: Any) -> None:
    for element in range(patterns.size):
        table[patterns[element] >> shift] += 1
