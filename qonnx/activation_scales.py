"""Activations with a scale for each channel, or for each block of channels, along the axis that a layer sums over.

No integer kernel multiplies them: a scale that changes along the summed axis cannot be taken out of the sum. They tell
what such a format would cost in accuracy, computed in float.

A block is written as equal scales of neighbouring channels (QuantizeLinear with `axis`). QuantizeLinear with
`block_size` wants scales for every index of all other axes too, which a tensor of dynamic sizes does not have.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.errors import DataError
from qonnx.graph import is_initializer, rank
from qonnx.linear import CONVOLUTIONS
from qonnx.statistics import TensorStatistics

# On the way from or to a convolution, which leave its channels where they are.
_BESIDE_CONVOLUTIONS = frozenset({"Add", "Clip", "LeakyRelu", "MaxPool", "Relu"})

Floats = npt.NDArray[np.float32]


def channel_axes(graph: ir.Graph, values: Iterable[str]) -> dict[str, int]:
    """The axis of the channels of each value: 1 beside a convolution, else the last, counted from the front.

    Values of unknown rank, and those whose number of channels is not known, are left out: they get one scale.
    """
    known = {value.name: value for value in graph.inputs}
    known.update({value.name: value for node in graph for value in node.outputs})
    axes = {}
    for name in values:
        value = known.get(name)
        dimensions = rank(value)
        if value is None or not dimensions or value.shape is None:
            continue
        axis = 1 if dimensions >= 3 and _beside_convolution(value) else dimensions - 1
        if isinstance(value.shape[axis], int):
            axes[name] = axis
    return axes


def _beside_convolution(value: ir.Value, reach: int = 2) -> bool:
    around = [usage.node for usage in value.uses()]
    producer = value.producer()
    around += [] if producer is None else [producer]
    if any(node.op_type in CONVOLUTIONS for node in around):
        return True
    further = [node.inputs[0] for node in around if node is producer and node.op_type in _BESIDE_CONVOLUTIONS]
    return reach > 0 and any(
        read is not None and not is_initializer(read) and _beside_convolution(read, reach - 1) for read in further
    )


def channel_ends(value: str, observed: TensorStatistics, block_size: int = 1) -> tuple[Floats, Floats]:
    """The lower and upper end of each channel, those of its whole block.

    Raises:
        DataError: the extremes of channels were not measured.

    Example:
        >>> from qonnx.statistics import from_batch
        >>> low, high = np.array([-1, -2, 0], np.float32), np.array([3, 1, 5], np.float32)
        >>> channel_ends("x", from_batch(9, -2, 5, 1.0, 1, low, high), block_size=2)
        (array([-2., -2.,  0.], dtype=float32), array([3., 3., 5.], dtype=float32))
    """
    if observed.channel_minimum is None or observed.channel_maximum is None:
        raise DataError(
            f"the extremes of the channels of {value!r} were not measured: leave out statistics, so that they are"
        )
    channels = observed.channel_minimum.size
    starts = np.arange(0, channels, block_size)
    sizes = np.diff(starts, append=channels)
    low = np.repeat(np.minimum.reduceat(observed.channel_minimum, starts), sizes)
    high = np.repeat(np.maximum.reduceat(observed.channel_maximum, starts), sizes)
    return np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
