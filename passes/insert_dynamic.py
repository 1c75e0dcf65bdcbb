"""Writes a QuantPlan into a graph so that activations are quantized by the range they have at run time.

    activation x  ->  codes, scale, zero_point = DynamicQuantizeLinear(x), once for all the edges that the plan names:
                      uint8, one scale a tensor, affine, from the smallest to the largest element and 0
    weight W      ->  codes of W
    layer         ->  MatMulInteger or ConvInteger, Cast, Mul by both scales, Add of the bias, which stays in float

A dynamic activation is one for which the plan has no scale; those with a scale get a Q/DQ pair, as in InsertQDQ.
Nothing needs to be observed beforehand, at the price of two passes over each activation at run time.

Source: the ONNX specification of DynamicQuantizeLinear, opset 11.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qonnx.errors import TargetError
from qonnx.numerics import Dtype, PerTensor
from qonnx.passes.integer_layers import insert_on_integers
from qonnx.passes.integer_products import Integers
from qonnx.passes.writer import Writer
from qonnx.plan import QuantPlan, TensorPlan

_OPSET = 11


@dataclass(frozen=True)
class InsertDynamic(ir.passes.InPlacePass):
    """See the module docstring."""

    plan: QuantPlan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inserts the nodes.

        Raises:
            RecipeError: the plan does not fit the model, or a layer has no integer form.
            TargetError: an activation is not uint8 with one scale, or a weight has scales that do not factor out.
        """
        for tensor in self.plan.activations:
            if not tensor.scale and (tensor.dtype is not Dtype.UINT8 or tensor.granularity != PerTensor()):
                raise TargetError(
                    f"activation {tensor.value!r}: DynamicQuantizeLinear makes uint8 per tensor, not {tensor.dtype} "
                    f"{tensor.granularity.__struct_config__.tag}; use uint8 per tensor, or format per_token"
                )
        return ir.passes.PassResult(model, insert_on_integers(model, self.plan, "InsertDynamic", _dynamic, _OPSET))


def _dynamic(write: Writer, value: ir.Value, plan: TensorPlan) -> Integers:
    codes, scale, zero_point = write.add_many(
        "DynamicQuantizeLinear",
        [value],
        (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8),
        (value.shape, ir.Shape([]), ir.Shape([])),
    )
    return Integers(codes, scale, zero_point)
