"""Integer operators of ONNX Runtime's own domain, com.microsoft: written on request, where the standard has none.

    DQ, DQ -> Gemm -> [Relu, Clip] -> Q      QGemm; without the Q, QGemm with a float result
    DQ, DQ -> MatMul                         MatMulIntegerToFloat
    DQ ... -> Add, Mul, Concat, AveragePool, GlobalAveragePool, LeakyRelu, Sigmoid, Softmax -> [Relu, Clip] -> Q
                                             QLinearAdd, QLinearMul ...: float arithmetic inside, one rounding

Source: ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qonnx.graph import rank
from qonnx.passes.integer_products import Integers, check_matmul, gemm_operands
from qonnx.passes.requantize import Ending, bias_codes, dequantized, ending_of, finish, single, triples
from qonnx.passes.writer import MICROSOFT, Writer

_POOLING = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")


def write_simple(write: Writer) -> None:
    """Replaces an element-wise operator, a Concat or a pooling between DequantizeLinear and QuantizeLinear."""
    node, ending = write.node, ending_of(write.node.outputs[0])
    attributes = _attributes(node)
    operands = None if ending is None or attributes is None else dequantized(node.inputs, ending.dtype)
    if ending is None or attributes is None or not operands:
        return
    result = [single(write, ending.scale), ending.zero_point]
    given = triples(write, *operands)
    inputs = [*result, *given] if node.op_type == "Concat" else [*given, *result]
    op, shape = f"QLinear{node.op_type}", node.outputs[0].shape
    finish(write, write.add(op, inputs, ending.dtype, shape, attributes, MICROSOFT), ending)


def _attributes(node: ir.Node) -> dict[str, Any] | None:
    """The attributes of the QLinear operator, or None where there is no such operator."""
    match node.op_type:
        case "Add" | "Mul" | "Sigmoid":
            return {}
        case "Concat" | "LeakyRelu":
            return dict(node.attributes)
        case "GlobalAveragePool":
            return {"channels_last": 0}
        case "AveragePool" if not any(size > 1 for size in node.attributes.get_ints("dilations", [])):
            return {name: node.attributes[name] for name in _POOLING if name in node.attributes} | {"channels_last": 0}
        case "Softmax":
            return {"axis": node.attributes.get_int("axis", -1), "opset": 13}
    return None


def write_gemm(write: Writer, left: Integers, right: Integers, ending: Ending | None) -> ir.Value | None:
    """QGemm with codes as its result, or floats without `ending`; None where it does not take the operands."""
    node = write.node
    check_matmul(*gemm_operands(node, left, right))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    steps = bias_codes(bias, left, right, None if ending is None else ending.scale)
    plain = ending is None or left.codes.dtype == ending.dtype
    plain = plain and left.axis is None and not left.perm
    if not plain or node.attributes.get_float("beta", 1.0) != 1 or node.attributes.get_float("alpha", 1.0) != 1:
        return None
    if bias is not None and (steps is None or rank(bias) != 1):
        return None
    operands: list[ir.Value | None] = [*triples(write, left, right)]
    operands.append(None if steps is None else write.constant(steps, f"{node.name}_bias_quantized"))
    operands += [] if ending is None else [single(write, ending.scale), ending.zero_point]
    transposed = {name: node.attributes.get_int(name, 0) for name in ("transA", "transB")}
    dtype = ir.DataType.FLOAT if ending is None else ending.dtype
    return write.add("QGemm", operands, dtype, node.outputs[0].shape, transposed, MICROSOFT)


def write_float_product(write: Writer, left: Integers, right: Integers) -> ir.Value | None:
    """A product whose result is float32: QGemm or MatMulIntegerToFloat; None where neither takes the operands."""
    node = write.node
    if node.outputs[0].dtype not in (None, ir.DataType.FLOAT):
        return None
    if node.op_type == "Gemm":
        return write_gemm(write, left, right, None)
    if node.op_type != "MatMul" or left.codes.dtype != ir.DataType.UINT8:
        return None
    check_matmul(left, right)
    if left.axis is not None or (right.axis is not None and rank(right.codes) != 2):
        return None
    (a, sa, za), (b, sb, zb) = triples(write, left), triples(write, right)
    inputs = [a, b, sa, sb, za, zb]
    return write.add("MatMulIntegerToFloat", inputs, ir.DataType.FLOAT, node.outputs[0].shape, domain=MICROSOFT)
