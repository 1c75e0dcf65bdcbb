"""Writes a QuantPlan into a graph as operators on integers: what InsertQDQ writes, with every group it can replace.

    DQ, DQ -> Conv -> [Relu, Clip] -> Q      QLinearConv [-> Clip on codes]; the bias as int32 in steps of sx sw
    DQ, DQ -> MatMul -> [Relu, Clip] -> Q    QLinearMatMul [-> Clip on codes]
    DQ, DQ -> Conv, MatMul, Gemm             ConvInteger or MatMulInteger -> Cast -> Mul -> Add of the float bias
    DQ -> MaxPool, Reshape ... -> Q          the operator alone, on codes, where both sides share one scale

Q and DQ stand for QuantizeLinear and DequantizeLinear; the first two rows need that nothing else reads the result.
With `Operators.MICROSOFT` also QGemm, MatMulIntegerToFloat, QLinearAdd and the like: see
`qonnx.passes.microsoft_operators`.

int8 activations are written as uint8: codes and zero points move by 128 and no value changes. ONNX Runtime multiplies
uint8 by int8 several times faster than int8 by int8, and some of its operators lack the latter.

An operator without an integer form stays in float between its Q/DQ pairs, as ConvTranspose does, and computes the same.
Rounding differs from that of the Q/DQ graph by the last bits of the float products, so that each code is the same or
the next.

Source: the ONNX specifications of QLinearConv (10), QLinearMatMul (21), ConvInteger (10), MatMulInteger (10).
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import onnx_ir as ir

from qonnx.errors import TargetError
from qonnx.graph import Names, rank
from qonnx.numerics import Dtype, PerTensor
from qonnx.passes.allow_types import AllowTypes, need_onnxruntime
from qonnx.passes.gather_codes import GatherCodes
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.passes.integer_products import (
    Integers,
    NoIntegerFormError,
    check_conv,
    check_matmul,
    conv_attributes,
    dequantize_behind,
    integers_of,
    product,
)
from qonnx.passes.microsoft_operators import write_float_product, write_gemm, write_simple
from qonnx.passes.requantize import Ending, bias_codes, dequantized, ending_of, finish, same_grid, single, triples
from qonnx.passes.writer import MICROSOFT, Writer, take_over
from qonnx.plan import QuantPlan, unsigned
from qonnx.recipe import Operators

# Clip on uint8 needs 12, scales along an axis 13.
_OPSET = 13

# These only move or compare elements; ONNX Runtime runs them on uint8.
_MOVES = frozenset({"Concat", "Flatten", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})

_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})


@dataclass(frozen=True)
class InsertQOperator(ir.passes.InPlacePass):
    """See the module docstring.

    Attributes:
        plan: what is quantized and how.
        operators: whether those of ONNX Runtime may be used besides the standard ones.
    """

    plan: QuantPlan
    operators: Operators = Operators.ONNX

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inserts the nodes.

        Raises:
            RecipeError: the plan names a node, value or edge that the graph does not have.
            TargetError: integer operators do not take a type or granularity of the plan, or the target has none.
        """
        _check(self.plan)
        plan = msgspec.structs.replace(self.plan, activations=tuple(map(unsigned, self.plan.activations)))
        AllowTypes(plan, _OPSET)(model)
        modified = InsertQDQ(plan)(model).modified
        GatherCodes()(model)
        names = Names(model)
        for node in list(model.graph):
            if node.graph is not None and node.domain == "":
                _convert(Writer(names, node, "InsertQOperator"), self.operators)
        if any(node.domain == MICROSOFT for node in model.graph):
            model.opset_imports.setdefault(MICROSOFT, 1)
        return ir.passes.PassResult(model, modified)


def _check(plan: QuantPlan) -> None:
    need_onnxruntime(plan, "QLinearConv and MatMulInteger")
    for tensor in plan.activations:
        if tensor.dtype not in (Dtype.INT8, Dtype.UINT8) or not isinstance(tensor.granularity, PerTensor):
            raise TargetError(
                f"activation {tensor.value!r}: integer operators take int8 or uint8 with one scale, not {tensor.dtype} "
                f"{tensor.granularity.__struct_config__.tag}; use that, or format qdq"
            )
        if not tensor.scale:
            raise TargetError(f"activation {tensor.value!r} has no scale: calibrate it, or use format dynamic")


def _convert(write: Writer, operators: Operators) -> None:
    node = write.node
    if node.op_type in _LAYERS and all(map(dequantize_behind, node.inputs[:2])):
        try:
            _write_layer(write, integers_of(node.inputs[0]), integers_of(node.inputs[1]), operators)
        except NoIntegerFormError as error:
            raise TargetError(
                f"node {node.name!r} ({node.op_type}) cannot run on integers: {error}; leave it in float, or use "
                "format qdq"
            ) from error
    elif not _move(write) and operators is Operators.MICROSOFT:
        write_simple(write)


def _write_layer(write: Writer, left: Integers | None, right: Integers | None, operators: Operators) -> None:
    if left is None or right is None:
        raise NoIntegerFormError("an operand has more than 8 bits, or is not an integer")
    output = write.node.outputs[0]
    ending = ending_of(output)
    if ending is not None and (codes := _quantized(write, left, right, ending, operators)) is not None:
        finish(write, codes, ending)
        return
    fused = write_float_product(write, left, right) if operators is Operators.MICROSOFT else None
    take_over(output, fused or product(write, left, right))


def _quantized(write: Writer, left: Integers, right: Integers, ending: Ending, operators: Operators) -> ir.Value | None:
    """The codes of the layer's result, or None where no operator makes them in one step."""
    match write.node.op_type:
        case "Conv":
            return _qlinear_conv(write, left, right, ending)
        case "MatMul":
            return _qlinear_matmul(write, left, right, ending)
    return write_gemm(write, left, right, ending) if operators is Operators.MICROSOFT else None


def _qlinear_conv(write: Writer, left: Integers, right: Integers, ending: Ending) -> ir.Value | None:
    node = write.node
    check_conv(left, right)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    steps = bias_codes(bias, left, right, ending.scale)
    if left.codes.dtype != ending.dtype or (bias is not None and steps is None):
        return None
    operands = [*triples(write, left, right), single(write, ending.scale), ending.zero_point]
    if steps is not None:
        operands.append(write.constant(steps, f"{node.name}_bias_quantized"))
    return write.add("QLinearConv", operands, ending.dtype, node.outputs[0].shape, conv_attributes(node))


def _qlinear_matmul(write: Writer, left: Integers, right: Integers, ending: Ending) -> ir.Value | None:
    check_matmul(left, right)
    # ONNX Runtime takes scales per column for a second operand with two axes, and one scale for all others.
    single_scales = left.axis is None and (right.axis is None or rank(right.codes) == 2)
    if left.codes.dtype != ending.dtype or not single_scales:
        return None
    operands = [*triples(write, left, right), single(write, ending.scale), ending.zero_point]
    return write.add("QLinearMatMul", operands, ending.dtype, write.node.outputs[0].shape)


def _move(write: Writer) -> bool:
    """Runs an operator on the codes that it is given, where its result is quantized in the same way."""
    node = write.node
    if node.op_type not in _MOVES or len(node.outputs) > 1 or (ending := ending_of(node.outputs[0])) is None:
        return False
    operands = dequantized(node.inputs if node.op_type == "Concat" else node.inputs[:1], ending.dtype)
    if operands is None or not all(same_grid(operand, ending) for operand in operands):
        return False
    inputs = [*(operand.codes for operand in operands), *node.inputs[len(operands) :]]
    codes = write.add(node.op_type, inputs, ending.dtype, node.outputs[0].shape, node.attributes)
    finish(write, codes, ending)
    return True
