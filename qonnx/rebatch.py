"""Batches of other sizes, for samples that come as one array, or for a model that was exported for one sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qonnx.runtime import InputSpec

Array = npt.NDArray[Any]
Batch = dict[str, Array]

# A single batch becomes so many, and is left alone when it has fewer rows than half of that.
_PARTS = 16


def rows(batch: Mapping[str, Array]) -> int:
    """How many samples a batch holds: the longest first axis of its arrays.

    >>> rows({"ids": np.zeros((8, 128)), "offset": np.array(3)})
    8
    """
    return max((array.shape[0] for array in batch.values() if array.ndim), default=1)


def fitted(batch: Batch, inputs: Sequence[InputSpec]) -> Iterator[Batch]:
    """Cuts a batch for a model whose inputs have a fixed first axis; one that fits, or cannot be made to, is kept.

    >>> one = [InputSpec("x", np.dtype(np.float32), (1, 3))]
    >>> [part["x"].shape for part in fitted({"x": np.zeros((2, 3), np.float32)}, one)]
    [(1, 3), (1, 3)]
    """
    counts = {_multiple(batch[spec.name], spec.shape) for spec in inputs}
    count = counts.pop() if len(counts) == 1 else 1
    yield from cut(batch, count) if count > 1 else [batch]


def _multiple(array: Array, shape: tuple[int | str | None, ...] | None) -> int:
    """How many batches of a fixed size an array holds; 1 where that is not the question."""
    if shape is None or array.ndim != len(shape) or array.ndim < 2:
        return 1
    size, *rest = shape
    fits = all(not isinstance(want, int) or want == have for want, have in zip(rest, array.shape[1:], strict=True))
    if not isinstance(size, int) or size < 1 or array.shape[0] % size or not fits:
        return 1
    return int(array.shape[0]) // size


def spread(stream: Iterable[Batch], inputs: Sequence[InputSpec]) -> Iterator[Batch]:
    """Makes several batches of a single one, so that some can be held back; two and more pass as they are.

    Only where the first axis of all inputs is the same dynamic one, and each has further axes: a vector may be one
    sample.
    """
    iterator = iter(stream)
    first = next(iterator, None)
    if first is None:
        return
    second = next(iterator, None)
    if second is not None:
        yield first
        yield second
        yield from iterator
        return
    count = min(_PARTS, rows(first)) if has_batch_axis(first, inputs) else 1
    yield from cut(first, count) if count >= _PARTS // 2 else [first]


def has_batch_axis(batch: Batch, inputs: Sequence[InputSpec]) -> bool:
    """Whether the first axis of all inputs is the same dynamic one, and each has further axes."""
    axes = {spec.shape[0] if spec.shape and len(spec.shape) > 1 else 0 for spec in inputs}
    sizes = {array.shape[:1] for array in batch.values()}
    return len(axes) == 1 and len(sizes) == 1 and not isinstance(axes.pop(), int)


def cut(batch: Batch, count: int) -> Iterator[Batch]:
    """The batch in so many parts, about equally large."""
    parts = {name: np.array_split(array, count) for name, array in batch.items()}
    for number in range(count):
        yield {name: arrays[number] for name, arrays in parts.items()}


def together(batches: Iterable[Batch], count: int) -> Batch:
    """The first samples of several batches as one batch, as many as can be joined.

    Args:
        batches: at least one.
        count: how many samples to take at most.

    Returns:
        The first batch cut to `count` samples, and further ones behind it while all their other sizes are the same.
    """
    iterator = iter(batches)
    first = next(iterator)
    taken, total = [first], rows(first)
    for batch in iterator:
        alike = all(batch[name].shape[1:] == array.shape[1:] and array.ndim for name, array in first.items())
        if total >= count or not alike:
            break
        taken.append(batch)
        total += rows(batch)
    return {name: np.concatenate([batch[name] for batch in taken])[:count] for name in first}
