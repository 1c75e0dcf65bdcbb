"""Writes a QuantPlan that quantizes weights alone: less to store and to read, with the arithmetic still in float.

    W                      ->  DequantizeLinear(codes of W): per tensor, axis or block
    Gather(W, ids)         ->  rows of codes and of scales are looked up first, then dequantized: see `GatherCodes`
    MatMul(X, W), Gemm     ->  MatMulNBits, on request: see `WriteMatMulNBits`

What targets take differs:

    ort-*                  every type but float4e2m1, for which ONNX Runtime has no kernel (see InsertCodebook); a last
                           block may be short
    others (TensorRT)      int4 and int8 with all zero points 0; whole blocks only, since the importer derives the block
                           size from the number of scales; float8 and float4 from sm_89 on. Tables are dequantized
                           before they are looked up: nothing but DequantizeLinear may read quantized weights there

Source: the ONNX specification of DequantizeLinear, opset 21 (blocks, 4 bits) and 25 (2 bits).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qonnx.errors import RecipeError, TargetError
from qonnx.numerics import Blocked, Dtype
from qonnx.passes.allow_types import AllowTypes, need_onnxruntime
from qonnx.passes.gather_codes import GatherCodes
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.passes.matmul_nbits import WriteMatMulNBits
from qonnx.plan import QuantPlan, TensorPlan
from qonnx.recipe import Operators
from qonnx.targets import target

_TENSORRT = (Dtype.INT4, Dtype.INT8, Dtype.FLOAT8E4M3FN, Dtype.FLOAT4E2M1)
_NEEDS_CAPABILITY = {Dtype.FLOAT8E4M3FN: (8, 9), Dtype.FLOAT4E2M1: (10, 0)}


@dataclass(frozen=True)
class InsertWeightOnly(ir.passes.InPlacePass):
    """See the module docstring.

    Attributes:
        plan: with weights alone.
        operators: `Operators.MICROSOFT` writes MatMulNBits.
        accuracy_level: of MatMulNBits: 1 computes in float32, 4 quantizes activations to int8 in blocks.
    """

    plan: QuantPlan
    operators: Operators = Operators.ONNX
    accuracy_level: int = 1

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inserts the nodes.

        Raises:
            RecipeError: the plan quantizes activations, or names a node, value or edge that the graph does not have.
            TargetError: the target does not take a type or granularity of the plan, or has no MatMulNBits.
        """
        on_onnxruntime = self.plan.target.startswith("ort-")
        if self.operators is Operators.MICROSOFT:
            need_onnxruntime(self.plan, "MatMulNBits")
        if self.plan.activations:
            value = self.plan.activations[0].value
            raise RecipeError(f"the plan quantizes activation {value!r}; use format qdq, or a plan with weights alone")
        for tensor in self.plan.weights:
            if on_onnxruntime:
                _check_onnxruntime(tensor)
            else:
                _check_tensorrt(tensor, model, self.plan.target)
        AllowTypes(self.plan)(model)
        modified = InsertQDQ(self.plan)(model).modified
        if on_onnxruntime:
            GatherCodes()(model)
        if self.operators is Operators.MICROSOFT:
            WriteMatMulNBits(self.accuracy_level)(model)
        return ir.passes.PassResult(model, modified)


def _check_onnxruntime(tensor: TensorPlan) -> None:
    if tensor.dtype is Dtype.FLOAT4E2M1:
        raise TargetError(
            f"weight {tensor.value!r}: ONNX Runtime has no kernel for {tensor.dtype}; use format codebook, or int4"
        )


def _check_tensorrt(tensor: TensorPlan, model: ir.Model, name: str) -> None:
    where = f"weight {tensor.value!r}"
    if tensor.dtype not in _TENSORRT:
        raise TargetError(f"{where}: {name} does not take {tensor.dtype} weights; use int4 or int8")
    capability = target(name).compute_capability or (0, 0)
    if capability < _NEEDS_CAPABILITY.get(tensor.dtype, (0, 0)):
        raise TargetError(f"{where}: {tensor.dtype} needs a newer device than {name}; use int4 or int8")
    if any(tensor.zero_point):
        raise TargetError(f"{where}: {name} takes zero point 0 only; quantize it symmetrically")
    weight = model.graph.initializers.get(tensor.value)
    if weight is None or weight.shape is None or not isinstance(tensor.granularity, Blocked):
        return
    axis, size = tensor.granularity.axis, tensor.granularity.block_size
    length = weight.shape.numpy()[axis]
    if length % size:
        raise TargetError(
            f"{where}: blocks of {size} leave a short one in an axis of {length}, which {name} does not take; use a "
            "block_size that divides it, or one scale per channel"
        )
