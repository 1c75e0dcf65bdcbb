"""Which channel of a producer each element of a value belongs to, and how that survives a change of shape.

A factor or an offset per channel can be moved along an edge as long as every element still belongs to one channel:
`Channels` holds that as an index array over the axes it depends on, `Step` is what one node makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Indices: TypeAlias = npt.NDArray[np.intp]
Size: TypeAlias = int | str | None

# Elements of an index array that belong to no channel of the producer.
FOREIGN = -1


class Blocked(Exception):  # noqa: N818 - says why the way ends; never leaves the module that looks for groups
    """The channels cannot be followed through a node. The text continues a sentence that begins with the node."""


@dataclass(frozen=True, eq=False)
class Channels:
    """Which channel of the producer each element of a value belongs to.

    Attributes:
        axes: the axes that the channel depends on, ascending. Two after a split into heads: head and element.
        index: [one size per axis of `axes`] the number of the channel, or `FOREIGN`.
    """

    axes: tuple[int, ...]
    index: Indices

    @property
    def present(self) -> Indices:
        """The numbers of the channels that are found here, ascending."""
        return np.unique(self.index[self.index != FOREIGN])

    def along(self, axis: int, size: int) -> Indices | None:
        """[size] the channel of every index of one axis; None where it depends on other axes, or sizes differ."""
        if any(other != axis for other in self.axes) or (self.axes and self.index.size != size):
            return None
        return np.broadcast_to(self.index, (size,)).copy()

    def spread(self, per_channel: npt.NDArray[np.float64], neutral: float, value_rank: int) -> npt.NDArray[np.float64]:
        """Values per channel in a shape that broadcasts against the value; `neutral` for foreign elements.

        >>> Channels((1,), np.array([1, 0, FOREIGN])).spread(np.array([5.0, 6.0]), 1.0, 3)
        array([[6.],
               [5.],
               [1.]])
        """
        elements = np.where(self.index == FOREIGN, neutral, per_channel[self.index])
        first = min(self.axes, default=value_rank)
        shape = [1] * (value_rank - first)
        for axis, size in zip(self.axes, self.index.shape, strict=True):
            shape[axis - first] = size
        return elements.reshape(shape)


@dataclass(frozen=True, eq=False)
class Step:
    """What a node makes of the channels it reads.

    Attributes:
        outputs: where they are now.
        no_scale: why a factor per channel does not arrive there, or "".
        no_shift: why an offset does not arrive there, or "".
        clips: the node clips, or pads with a constant: an offset arrives once its bounds, or what it pads with, are
            moved too. These are single numbers, the same for all channels.
    """

    outputs: tuple[tuple[ir.Value, Channels], ...]
    no_scale: str = ""
    no_shift: str = ""
    clips: bool = False


def sizes(value: ir.Value | None) -> tuple[Size, ...]:
    """The size of every axis: a number, the name of a dynamic size, or None.

    Raises:
        Blocked: not even the number of axes is known.
    """
    if value is None or value.shape is None:
        raise Blocked("has inputs or outputs of unknown shape")
    return tuple(size if isinstance(size, int) else size.value for size in value.shape)


def arranged(axes: Sequence[int], index: Indices) -> Channels:
    """The index array with its axes in ascending order, without those that it does not depend on."""
    order = sorted(range(len(axes)), key=lambda position: axes[position])
    index = index.transpose(order)
    kept: list[int] = []
    for axis in sorted(axes):
        dimension = len(kept)
        first = index.take([0], axis=dimension)
        if (index == first).all():
            index = first.squeeze(dimension)
        else:
            kept.append(axis)
    return Channels(tuple(kept), np.asarray(index, order="C"))  # ascontiguousarray would give 0 dimensions one


def regrouped(before: Sequence[Size], after: Sequence[Size], channels: Channels) -> Channels:
    """The channels behind a change of shape that keeps the order of the elements."""
    old_axes: list[int] = []
    new_axes: list[int] = []
    for old, new in _segments(before, after):
        if any(axis in channels.axes for axis in old):
            if len(old) != 1 or len(new) != 1:
                involved = [before[axis] for axis in old] + [after[axis] for axis in new]
                if not all(isinstance(size, int) for size in involved):
                    raise Blocked("merges or splits axes of unknown size")
            old_axes += old
            new_axes += new
    shape = dict(zip(channels.axes, channels.index.shape, strict=True))
    full = channels.index.reshape([shape.get(axis, 1) for axis in old_axes])
    full = np.broadcast_to(full, [shape.get(axis) or _known(before[axis]) for axis in old_axes])
    if len(old_axes) == len(new_axes):
        return arranged(new_axes, full.reshape([_known(after[new], full.shape[k]) for k, new in enumerate(new_axes)]))
    return arranged(new_axes, full.reshape([_known(after[axis]) for axis in new_axes]))


def _known(size: Size, default: int | None = None) -> int:
    if isinstance(size, int):
        return size
    if default is None:
        raise Blocked("merges or splits axes of unknown size")
    return default


def _segments(before: Sequence[Size], after: Sequence[Size]) -> list[tuple[range, range]]:
    """Runs of axes that hold the same elements before and after, in order.

    >>> _segments(["batch", "time", 12], ["batch", "time", 3, 4])
    [(range(0, 1), range(0, 1)), (range(1, 2), range(1, 2)), (range(2, 3), range(2, 4))]
    >>> _segments([None, 8, 1, 1], [None, 8])
    [(range(0, 1), range(0, 1)), (range(1, 4), range(1, 2))]
    """
    front: list[tuple[range, range]] = []
    back: list[tuple[range, range]] = []
    i, j, end, stop = 0, 0, len(before), len(after)
    while end > i and stop > j and (run := _equal_products(before[i:end], after[j:stop])) is not None:
        front.append((range(i, i + run[0]), range(j, j + run[1])))
        i, j = i + run[0], j + run[1]
    while end > i and stop > j and (run := _equal_products(before[i:end][::-1], after[j:stop][::-1])) is not None:
        back.append((range(end - run[0], end), range(stop - run[1], stop)))
        end, stop = end - run[0], stop - run[1]
    rest = [(range(i, end), range(j, stop))] if end > i or stop > j else []
    return front + rest + back[::-1]


def _equal_products(one: Sequence[Size], other: Sequence[Size]) -> tuple[int, int] | None:
    """How many leading sizes of each have the same product, the fewest that do; None where that cannot be told."""
    if one[0] is not None and one[0] == other[0]:
        return 1, 1
    counts, products, both = [1, 1], [one[0], other[0]], (one, other)
    while True:
        left, right = products
        if not isinstance(left, int) or not isinstance(right, int):
            return None
        if left == right:
            return counts[0], counts[1]
        shorter = int(left > right)
        if counts[shorter] == len(both[shorter]):
            return None
        size = both[shorter][counts[shorter]]
        counts[shorter] += 1
        products[shorter] = products[shorter] * size if isinstance(size, int) else None  # type: ignore[operator]
