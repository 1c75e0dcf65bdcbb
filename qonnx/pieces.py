"""How many samples of a batch are calibrated at a time.

A calibration run returns all activations of a batch. Memory that is touched for the first time is slow, and what does
not fit into the cache is read from memory once more to be counted: two samples at a time cost MobileNetV2 two thirds of
the time and half the memory that batches of eight do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qonnx.rebatch import Batch, cut, has_batch_axis, rows
from qonnx.runtime import Session

Array = npt.NDArray[Any]

# What may be returned at a time.
_BYTES = 1 << 26

# Samples on which it is seen how much that is, and whether they depend on each other; of each result so many elements.
_TRIED = 2
_COMPARED = 1 << 16

# How far results of samples run apart and together may differ, as a share of their norm: kernels add in another order
# for another number of samples.
_TOLERANCE = 1e-3


def samples_at_a_time(runner: Session, batch: Batch, activations: Collection[str], pool: Executor) -> int | None:
    """How many samples of batches like this one to run at a time; None for all.

    All where it matters whether they are apart, as where the first axis is time and not samples, or where a mean is
    taken over all samples: two are run together and apart, and must give the same.

    Args:
        runner: the model that is calibrated.
        batch: the first one.
        activations: outputs of the runner that are whole activations; all others are small.
        pool: the threads that will run the model.
    """
    if rows(batch) <= _TRIED or not activations or not has_batch_axis(batch, runner.inputs):
        return None

    def run(part: Batch) -> tuple[int, list[_Beginning]]:
        results = runner.run(part)
        samples = rows(part)
        found = [beginning for name in activations for beginning in _beginnings(results[name], samples)]
        return sum(array.nbytes for array in results.values()), found

    tried = {name: array[:_TRIED] for name, array in batch.items()}
    (size, together), *apart = pool.map(run, (tried, *cut(tried, _TRIED)))
    most = _BYTES * _TRIED // max(size, 1)
    if most >= rows(batch) or not all(
        _same(one, other)
        for number, (_, alone) in enumerate(apart)
        for one, other in zip(together[number::_TRIED], alone, strict=True)
    ):
        return None
    return max(1, most)


def pieces(batch: Batch, samples: int | None) -> Iterator[Batch]:
    """The batch in parts of so many samples at most, about equally large.

    >>> [part["x"].shape for part in pieces({"x": np.zeros((8, 3))}, 5)]
    [(4, 3), (4, 3)]
    """
    count = 1 if samples is None else math.ceil(rows(batch) / samples)
    return cut(batch, count) if count > 1 else iter((batch,))


class _Beginning(NamedTuple):
    """How many elements of an activation a sample has, and the first of them."""

    size: int
    elements: Array


def _beginnings(array: Array, samples: int) -> list[_Beginning]:
    """That of each sample; of no elements where they do not lie one behind the other along the first axis."""
    if array.ndim == 0 or array.shape[0] % samples:
        return [_Beginning(0, np.zeros(0))] * samples
    return [_Beginning(part.size, part[:_COMPARED].copy()) for part in array.reshape(samples, -1)]


def _same(one: _Beginning, other: _Beginning) -> bool:
    x, y = one.elements, other.elements
    return one.size == other.size > 0 and bool(np.linalg.norm(x - y) <= _TOLERANCE * np.linalg.norm(x))
