"""The way from the result of an integer operator to codes again: an activation function and a QuantizeLinear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.graph import constant, rank
from qonnx.matching import scalar
from qonnx.numerics import Dtype, PerTensor, quantize
from qonnx.passes.integer_products import Integers, eight_bits, integers_of, scale_array
from qonnx.passes.writer import Writer, take_over

# Leaves room in int32 for the sums that the bias is added to.
_LARGEST_BIAS = 2**30

# In steps of the result: a bias is then off by an eighth of a step at most on average, by 0.3 in one channel. When no
# channel was allowed more than the first, three of MobileNetV2's convolutions were left out for one channel each, and
# its integer operators took a quarter longer.
_COARSEST_BIAS = 0.6
_COARSEST_ON_AVERAGE = 0.25


@dataclass(frozen=True, eq=False)
class Ending:
    """What alone reads a float value and makes int8 or uint8 codes of it.

    Attributes:
        low: a lower bound of the values that are quantized, from Relu or Clip; -inf without.
        high: an upper bound; inf without.
        node: the QuantizeLinear, with one scale.
    """

    low: float
    high: float
    node: ir.Node

    @property
    def scale(self) -> ir.Value:
        """The scale of the result."""
        scale = self.node.inputs[1]
        assert scale is not None
        return scale

    @property
    def zero_point(self) -> ir.Value:
        """The zero point of the result."""
        zero_point = self.node.inputs[2]
        assert zero_point is not None
        return zero_point

    @property
    def dtype(self) -> ir.DataType:
        """The type of the codes."""
        return self.zero_point.dtype or ir.DataType.UNDEFINED


def ending_of(value: ir.Value) -> Ending | None:
    """The QuantizeLinear behind a value, through Relu and Clip, when each is the only reader."""
    low, high = -math.inf, math.inf
    while True:
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].idx != 0 or value.is_graph_output() or uses[0].node.domain != "":
            return None
        reader = uses[0].node
        if reader.op_type == "QuantizeLinear":
            return Ending(low, high, reader) if _makes_bytes(reader) else None
        bounds = _bounds(reader)
        if bounds is None:
            return None
        low, high = np.clip(bounds, low, high)
        value = reader.outputs[0]


def finish(write: Writer, codes: ir.Value, ending: Ending) -> None:
    """Puts codes that an operator made, before any activation function, in the place of those of `ending`."""
    result = ending.node.outputs[0]
    scale, zero_point = constant(ending.scale), constant(ending.zero_point)
    assert scale is not None
    assert zero_point is not None
    dtype = Dtype(ending.dtype.name.lower())
    bounds = quantize(np.array([ending.low, ending.high]), scale, zero_point, dtype, PerTensor())
    if (bounds != (dtype.minimum, dtype.maximum)).any():
        low, high = (write.constant(np.asarray(bound), f"{result.name}_bound") for bound in bounds)
        codes = write.add("Clip", [codes, low, high], codes.dtype, result.shape)
    take_over(result, codes)


def bias_codes(
    bias: ir.Value | None, left: Integers, right: Integers, result: ir.Value | None = None
) -> npt.NDArray[np.int32] | None:
    """A bias in steps of the product of both scales, or None where it is not constant or does not fit.

    It does not fit where those steps overflow, and where they are so coarse that rounding to them would move the
    result, whose scale is `result`, by more than an eighth of a step on average, or 0.3 in a channel.
    """
    stored, x, w, y = constant(bias), scale_array(left), scale_array(right), constant(result)
    if stored is None or x is None or w is None or x.ndim or w.shape not in ((), (stored.size,)):
        return None
    unit = x.astype(np.float64) * w
    if y is not None and (np.max(unit) > _COARSEST_BIAS * float(y) or np.mean(unit) > _COARSEST_ON_AVERAGE * float(y)):
        return None
    steps = np.rint(stored.astype(np.float64).reshape(-1) / unit)
    return steps.astype(np.int32) if np.abs(steps).max(initial=0) <= _LARGEST_BIAS else None


def triples(write: Writer, *operands: Integers) -> list[ir.Value]:
    """Codes, scale and zero point of each operand, as the QLinear operators take them."""
    values = []
    for operand in operands:
        codes, zero_point = eight_bits(write, operand)
        values += [codes, single(write, operand.scale), zero_point]
    return values


def dequantized(values: Sequence[ir.Value | None], dtype: ir.DataType) -> list[Integers] | None:
    """The codes of type `dtype` behind all of these values, one scale each, or None."""
    found = []
    for value in values:
        producer = None if value is None else value.producer()
        integers = integers_of(value) if producer is not None and producer.op_type == "DequantizeLinear" else None
        if integers is None or integers.axis is not None or integers.codes.dtype != dtype:
            return None
        found.append(integers)
    return found


def same_grid(integers: Integers, ending: Ending) -> bool:
    """Whether codes mean the same before and behind an operator."""
    for one, other in ((integers.scale, ending.scale), (integers.zero_point, ending.zero_point)):
        mine, others = constant(one), constant(other)
        if mine is None or others is None or not np.array_equal(mine, others):
            return False
    return True


def single(write: Writer, scale: ir.Value) -> ir.Value:
    """A scale in float32, which is all that the integer operators take."""
    stored = constant(scale)
    if scale.dtype == ir.DataType.FLOAT or stored is None:
        return scale
    return write.constant(stored.astype(np.float32), f"{scale.name}_float32")


def _makes_bytes(node: ir.Node) -> bool:
    """Whether a QuantizeLinear has one constant scale, and codes of 8 bits."""
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if constant(node.inputs[1]) is None or constant(zero_point) is None or rank(node.inputs[1]) != 0:
        return False
    return zero_point is not None and zero_point.dtype in (ir.DataType.INT8, ir.DataType.UINT8)


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    if node.op_type == "Relu":
        return 0.0, math.inf
    if node.op_type != "Clip":
        return None
    low, high = ([*node.inputs[1:3], None, None])[:2]
    found = (-math.inf if low is None else scalar(low), math.inf if high is None else scalar(high))
    return None if found[0] is None or found[1] is None else (found[0], found[1])
