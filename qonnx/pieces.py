"""How many samples of a batch are calibrated at a time.

A calibration run holds all activations of a batch. Memory that is touched for the first time is slow, and what does
not fit into the cache is read from memory once more to be counted: two samples at a time cost MobileNetV2 two thirds of
the time and half the memory that batches of eight do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from qonnx.errors import DataError
from qonnx.passes.augment import Statistic
from qonnx.rebatch import Batch, cut, has_batch_axis, rows
from qonnx.runtime import Session

Array = npt.NDArray[Any]

# Of each output its bytes, and what is compared.
_Kept: TypeAlias = Mapping[str, tuple[int, Array]]

# What may be observed at a time.
_BYTES = 1 << 26

# How many elements of a sample of each activation are compared: so many runs of so many.
_RUNS = 32
_RUN = 64

# How far results of samples run apart and together may differ: kernels add in another order for another number of
# samples. Elements near 0 may differ by more of themselves, but few do.
_TOLERANCE = 1e-3
_FEW = 0.01

# What an output says of two samples together, from what it says of each.
_JOINED: Mapping[Statistic, np.ufunc] = {
    Statistic.COUNT: np.add,
    Statistic.SUM_SQUARES: np.add,
    Statistic.MINIMUM: np.minimum,
    Statistic.MAXIMUM: np.maximum,
    Statistic.CHANNEL_MINIMUM: np.minimum,
    Statistic.CHANNEL_MAXIMUM: np.maximum,
}


class Apart(NamedTuple):
    """What it told to run two samples of a batch apart.

    Attributes:
        per_byte: how many bytes are observed for a byte that is fed.
        ends: what the observers returned of the first and of the last sample. Who reads them may take out what is done.
    """

    per_byte: float
    ends: tuple[Batch, Batch]


def run_apart(
    runner: Session, batch: Batch, outputs: Mapping[str, Statistic], pool: Executor, independent: bool = False
) -> Callable[[], Apart | None]:
    """Begins to run the first and the last sample of a batch.

    Samples must not be run apart where the first axis is time, or where a mean is taken over all of them. Unless the
    graph tells that, the two are run together and apart, and all that is observed must be the same; a dependence
    that two samples do not show, such as one of every third, is not found.

    Args:
        runner: the model with observers.
        batch: the first one.
        outputs: what each output of the runner holds.
        pool: the threads that will run the model.
        independent: what the graph tells, see `qonnx.independence`.

    Returns:
        What waits until they are run, and returns what that told; None where batches must not be run in pieces.
    """
    if not has_batch_axis(batch, runner.inputs) or rows(batch) < 2 or not all(array.size for array in batch.values()):
        return lambda: None
    tried = {name: array[[0, -1]] for name, array in batch.items()}
    if not independent and all(np.array_equal(*array) for array in tried.values()):
        return lambda: None  # what two equal samples have in common is not what all have

    def kept(results: Batch, samples: int) -> _Kept:
        return {name: (results[name].nbytes, _kept(results[name], outputs[name], samples)) for name in outputs}

    both = None if independent else pool.submit(lambda: kept(runner.run(tried), 2))
    ends = [pool.submit(runner.run, end) for end in cut(tried, 2)]

    def ended() -> Apart | None:
        try:
            together = None if both is None else both.result()
            first, last = (end.result() for end in ends)
        except DataError:  # it runs on some numbers of samples only; if not even on this one, the batch itself says so
            return None
        if together is not None and not _alike(outputs, together, kept(first, 1), kept(last, 1)):
            return None
        observed = sum(_observed(end[name], statistic) for end in (first, last) for name, statistic in outputs.items())
        return Apart(observed / sum(array.nbytes for array in tried.values()), (first, last))

    return ended


def _observed(output: Array, statistic: Statistic) -> int:
    """The bytes of an output, or of what was reduced to it."""
    return output.nbytes + (4 * int(output) if statistic is Statistic.COUNT else 0)


def _alike(outputs: Mapping[str, Statistic], together: _Kept, first: _Kept, last: _Kept) -> bool:
    """Whether all that was observed of two samples together is what was observed of them apart."""
    for name, statistic in outputs.items():
        (size, found), (half, one), (rest, other) = together[name], first[name], last[name]
        if statistic is Statistic.ELEMENTS:
            alike = size == 2 * half == 2 * rest and _same(found, np.concatenate([one, other]))
        else:
            alike = one.shape == other.shape and _same(found, _JOINED[statistic](one, other))
        if not alike:
            return False
    return True


def pieces(batch: Batch, per_byte: float | None) -> Iterator[Batch]:
    """The batch in parts that are about equally large, each of so few samples that little enough is observed.

    >>> batch = {"x": np.zeros((8, 1 << 20), np.float32)}
    >>> [part["x"].shape[0] for part in pieces(batch, 3.5)]
    [4, 4]
    """
    alike = len({array.shape[:1] for array in batch.values()}) == 1
    size = sum(array.nbytes for array in batch.values())
    count = min(rows(batch), math.ceil(size * per_byte / _BYTES)) if per_byte is not None and alike else 1
    return cut(batch, count) if count > 1 else iter((batch,))


def _kept(array: Array, statistic: Statistic, samples: int) -> Array:
    """What is compared: of large activations a few elements of each sample, from all of it, a row each."""
    if statistic is not Statistic.ELEMENTS:
        return array
    if array.ndim == 0 or array.shape[0] % samples:
        return np.zeros((samples, 0))
    whole = array.reshape(samples, -1)
    if whole.shape[1] <= _RUNS * _RUN:
        return whole.copy()
    starts = np.arange(_RUNS) * (whole.shape[1] - _RUN) // (_RUNS - 1)
    return whole[:, (starts[:, np.newaxis] + np.arange(_RUN)).reshape(-1)]


def _same(one: Array, other: Array) -> bool:
    if one.shape != other.shape or not one.size or not (np.isfinite(one).all() and np.isfinite(other).all()):
        return False
    x, y = (array.reshape(-1).astype(np.float64) for array in (one, other))
    # By element, as one that is huge would hide all others.
    return bool(np.mean(np.abs(x - y) > _TOLERANCE * np.abs(x)) <= _FEW)
