"""Writes a QuantPlan into a graph so that every row of an activation has a scale of its own, found at run time.

    activation x  ->  s = max(max|x| along the axis that is summed over / 127, tiny)
                      codes = QuantizeLinear(x / s, 1, 128): uint8 with zero point 128, which is int8 with 0
    weight W      ->  codes of W
    layer         ->  MatMulInteger, Cast, Mul by s, Mul by the scale of W, Add of the bias, which stays in float

One outlier token then costs no other token its precision. Symmetric, because zero points that differ from row to row
are more than MatMulInteger takes in ONNX Runtime. The codes are shifted to uint8 because ONNX Runtime multiplies uint8
by int8 several times faster than int8 by int8, and the scales are divided out before QuantizeLinear because that takes
one scale per index of one axis only: like this the rank of x does not matter.

An activation to quantize like that is one for which the plan has no scale: int8, blocked along the last axis (the last
but one for the second operand of a MatMul) with the whole axis as one block.

Source: Yao et al., ZeroQuant, 2022 (arXiv 2206.01861), token-wise quantization; Xiao et al., SmoothQuant, 2022
(arXiv 2211.10438), level O1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qonnx.errors import TargetError
from qonnx.graph import rank
from qonnx.numerics import Blocked, Dtype
from qonnx.passes.integer_layers import insert_on_integers
from qonnx.passes.integer_products import Integers
from qonnx.passes.writer import Writer
from qonnx.plan import QuantPlan, TensorPlan

# A row of zeros gets this scale: its codes are 0 whatever it is, but 0 / 0 would be NaN.
_TINY = 2.0**-126

# ReduceMax takes its axes as an input from here on.
_OPSET = 18


@dataclass(frozen=True)
class InsertPerToken(ir.passes.InPlacePass):
    """See the module docstring."""

    plan: QuantPlan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inserts the nodes.

        Raises:
            RecipeError: the plan does not fit the model, or a layer has no integer form.
            TargetError: an activation is not int8 with one scale a row, or a weight has scales that do not factor out.
        """
        for tensor in self.plan.activations:
            if not tensor.scale and (tensor.dtype is not Dtype.INT8 or not isinstance(tensor.granularity, Blocked)):
                raise TargetError(
                    f"activation {tensor.value!r}: per-token scales are for int8 blocked along the axis that is summed "
                    f"over, not {tensor.dtype} {tensor.granularity.__struct_config__.tag}; use that, or format dynamic"
                )
        return ir.passes.PassResult(model, insert_on_integers(model, self.plan, "InsertPerToken", _rows, _OPSET))


def _rows(write: Writer, value: ir.Value, plan: TensorPlan) -> Integers:
    assert isinstance(plan.granularity, Blocked)
    size = rank(value)
    if size is None or value.shape is None:
        raise TargetError(f"activation {plan.value!r}: its rank is not known; infer shapes, or use format dynamic")
    axis = plan.granularity.axis % size
    length = value.shape[axis]
    if isinstance(length, int) and plan.granularity.block_size < length:
        raise TargetError(
            f"activation {plan.value!r}: blocks of {plan.granularity.block_size} along an axis of {length} cannot be "
            f"summed by one MatMulInteger; use block_size {length}"
        )
    scale = _row_scale(write, value, axis)
    one = write.constant(np.array(1, np.float32), f"{value.name}_one")
    middle = write.constant(np.array(128, np.uint8), f"{value.name}_zero_point")
    steps = write.add("Div", [value, scale], ir.DataType.FLOAT, value.shape)
    codes = write.add("QuantizeLinear", [steps, one, middle], ir.DataType.UINT8, value.shape)
    return Integers(codes, scale, middle, axis=axis, per_row=True)


def _row_scale(write: Writer, value: ir.Value, axis: int) -> ir.Value:
    """Largest magnitude / 127, of size 1 along `axis`.

    Not times 1/127: ONNX Runtime would take that Mul for the product of two scales per tensor.
    """
    assert value.shape is not None
    shape = ir.Shape([1 if i == axis else length for i, length in enumerate(value.shape)])
    single = ir.DataType.FLOAT
    axes = write.constant(np.array([axis], np.int64), f"{value.name}_axes")
    largest = write.add(
        "ReduceMax", [write.add("Abs", [value], single, value.shape), axes], single, shape, {"keepdims": 1}
    )
    levels = write.constant(np.array(127, np.float32), f"{value.name}_levels")
    tiny = write.constant(np.array(_TINY, np.float32), f"{value.name}_tiny")
    return write.add("Max", [write.add("Div", [largest, levels], single, shape), tiny], single, shape)
