"""One pass for each format: what writes a plan into a graph."""

from __future__ import annotations

import msgspec
import onnx_ir as ir

from qonnx.linear import WEIGHT_PATH_OPS
from qonnx.numerics import Dtype
from qonnx.passes.allow_types import AllowTypes
from qonnx.passes.gather_codes import GatherCodes
from qonnx.passes.insert_codebook import InsertCodebook
from qonnx.passes.insert_dynamic import InsertDynamic
from qonnx.passes.insert_per_token import InsertPerToken
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.passes.insert_qoperator import InsertQOperator
from qonnx.passes.insert_weight_only import InsertWeightOnly
from qonnx.passes.lower_opset import LowerOpset
from qonnx.passes.matmul_nbits import WriteMatMulNBits
from qonnx.passes.quantize_biases import QuantizeBiases
from qonnx.plan import QuantPlan, TensorPlan, unsigned
from qonnx.recipe import Format, Operators
from qonnx.targets import target

# What may lie between a weight and the layers that read it.
_BETWEEN = WEIGHT_PATH_OPS | {"Reshape", "Squeeze", "Unsqueeze"}


def insert(model: ir.Model, plan: QuantPlan) -> None:
    """Writes a plan into the prepared model that it was made for, in the plan's format.

    Raises:
        RecipeError: the plan does not fit the model.
        TargetError: the plan's target does not run what the plan asks for.
        ModelError: the graph cannot be converted to the opset that the plan needs.
    """
    if target(plan.target).integer_operators:
        plan = _unsigned_where_shared(model, plan)
    for step in passes(plan):
        step(model)


def passes(plan: QuantPlan) -> tuple[ir.passes.InPlacePass, ...]:
    """The passes that write a plan, in order."""
    match plan.format:
        case Format.QDQ:
            # ONNX Runtime makes an integer convolution only of one with an int32 bias, which TensorRT does not take,
            # and dequantizes all of a table for every batch.
            own = (QuantizeBiases(), GatherCodes()) if target(plan.target).integer_operators else ()
            return (AllowTypes(plan), InsertQDQ(plan), *own, LowerOpset())
        case Format.QOPERATOR:
            return (InsertQOperator(plan, plan.operators),)
        case Format.DYNAMIC:
            return (InsertDynamic(plan),)
        case Format.PER_TOKEN:
            return (InsertPerToken(plan),)
        case Format.WEIGHT_ONLY:
            has_codebook = any(tensor.dtype is Dtype.FLOAT4E2M1 for tensor in plan.weights)
            if has_codebook and target(plan.target).integer_operators:
                packed = (WriteMatMulNBits(),) if plan.operators is Operators.MICROSOFT else ()
                return (InsertCodebook(plan), GatherCodes(), *packed)
            return (InsertWeightOnly(plan, plan.operators),)


def _unsigned_where_shared(model: ir.Model, plan: QuantPlan) -> QuantPlan:
    """The plan with weights in uint8 that several layers read.

    ONNX Runtime 1.31 makes most weights uint8 itself where `session.x64quantprecision` is 1 and the CPU has no VNNI,
    but cannot load a graph then in which an int8 weight has several readers. Others stay: with VNNI, int8 is quicker.
    Tables that are looked up stay, too: behind a row with a zero point of its own it finds no kernel for a product.
    """
    nodes = {node.name: node for node in model.graph}

    def chosen(tensor: TensorPlan) -> TensorPlan:
        readers = [op for edge in tensor.edges if edge.node in nodes for op in _readers(nodes[edge.node])]
        return unsigned(tensor) if len(readers) > 1 and "Gather" not in readers else tensor

    return msgspec.structs.replace(plan, weights=tuple(map(chosen, plan.weights)))


def _readers(node: ir.Node) -> list[str]:
    """The operators that read a weight, behind one that only moves its elements or changes their type."""
    if node.op_type not in _BETWEEN:
        return [node.op_type]
    return [op for usage in node.outputs[0].uses() for op in _readers(usage.node)]
