"""Which operators must keep float32 in a graph that otherwise computes in float16 or bfloat16.

* What is computed from integers and constants alone: positions, rotary angles, masks, sizes. It is cheap, and 2049 is
  no float16.
* Operators whose sums, squares, powers or quotients leave the range of float16 or need its missing digits: above all
  norms that are written out. LayerNormalization and Softmax are none: they sum in float32 whatever they read.
* Operators with a constant that would become 0 or infinity, such as the epsilon of a division.
* Operators for which ONNX does not allow the type, those of other domains, If, Loop and Scan; biases stored as int32,
  whose scales are products of two and too small for float16.

Source of the types: the constraints in the ONNX specification of each operator.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qonnx.graph import constant, is_initializer, subgraphs

QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})

_SENSITIVE = frozenset({
    *("ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd", "ReduceLogSum"),
    *("ReduceLogSumExp", "CumSum", "CumProd", "LpNormalization", "MeanVarianceNormalization", "STFT", "DFT"),
    *("Pow", "Exp", "Log", "Sqrt", "Reciprocal", "Sin", "Cos", "Tan"),
})  # fmt: skip

# What a sensitive chain goes through on its way to the division that ends it.
_ON_THE_WAY = frozenset({"Add", "Clip", "Max", "Expand", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Identity"})

# Where a number beyond the range of float16 stands for infinity, not for itself.
_MASKING = frozenset({"Add", "Sub", "Where", "Pad", "Expand", "Clip", "Min", "Max"})

# A constant with more elements is a weight: small ones in it may become 0.
_SMALL = 16

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN"})


class Keep(enum.Enum):
    """Why an operator keeps float32."""

    INTEGRAL = "computed from integers"
    OTHER = "accuracy, or not allowed"


class Limits(NamedTuple):
    """The largest number of a float type, and the smallest above 0."""

    largest: np.float32
    smallest: np.float32

    @staticmethod
    def of(dtype: ir.DataType) -> Limits:
        """Of FLOAT16 or BFLOAT16.

        >>> Limits.of(ir.DataType.FLOAT16).largest
        np.float32(65504.0)
        """
        info: Any = ml_dtypes.finfo(dtype.numpy())  # type: ignore[no-untyped-call]
        return Limits(np.float32(info.max), np.float32(info.smallest_subnormal))


def kept(graph: ir.Graph, version: int, dtype: ir.DataType) -> dict[ir.Node, Keep]:
    """The operators of a graph that keep float32, in its order; see the module docstring.

    Args:
        graph: with the types of all values.
        version: of the operator set.
        dtype: FLOAT16 or BFLOAT16.
    """
    limits, reasons = Limits.of(dtype), dict[ir.Node, Keep]()
    integral: set[ir.Value] = set()
    delicate: set[ir.Value] = set()
    for node in graph:
        if _is_integral(node, integral):
            integral.update(node.outputs)
            reasons[node] = Keep.INTEGRAL
        elif node.op_type in QDQ:
            if _is_bias(node):
                reasons[node] = Keep.OTHER
        elif _is_delicate(node, delicate) or any(_is_lost(value, limits) for value in node.inputs):
            delicate.update(node.outputs)
            reasons[node] = Keep.OTHER
        elif not _is_allowed(node, version, dtype):
            reasons[node] = Keep.OTHER
    return reasons


def float_constant(value: ir.Value | None) -> npt.NDArray[np.float32] | None:
    """The array of a float32 initializer; None for anything else."""
    if value is None or value.dtype != ir.DataType.FLOAT or not is_initializer(value):
        return None
    return constant(value)


def fixed_inputs(node: ir.Node, version: int) -> set[int]:
    """The inputs that are float32 by definition, such as the scales of a Resize."""
    schema = _schema(node, version)
    return {index for index, (_, kind) in enumerate(_formal(node.inputs, schema.inputs)) if kind == "tensor(float)"}


def varying_outputs(node: ir.Node, version: int, dtype: ir.DataType) -> list[ir.Value]:
    """The float32 outputs whose type is that of an input that was float32 or is of the short type already."""
    schema = _schema(node, version)
    floats = (ir.DataType.FLOAT, dtype)
    formal = _formal(node.inputs, schema.inputs)
    read = {kind for value, kind in formal if value is not None and value.dtype in floats}
    formal = _formal(node.outputs, schema.outputs)
    return [value for value, kind in formal if value is not None and _is_float(value) and kind in read]


def _is_integral(node: ir.Node, integral: set[ir.Value]) -> bool:
    if node.op_type in QDQ or not any(_is_float(value) for value in node.outputs) or any(True for _ in subgraphs(node)):
        return False
    if node.op_type.startswith("Gather"):
        return node.inputs[0] in integral  # rows of a table are no integers, whatever picks them
    if node.op_type in _PRODUCTS and any(_is_matrix(value) for value in node.inputs):
        return False
    computed = [value for value in node.inputs if value is not None and not is_initializer(value)]
    known = all(value in integral or (value.dtype is not None and value.dtype.is_integer()) for value in computed)
    return known or all(value in integral or value.dtype == ir.DataType.BOOL for value in computed)


def _is_matrix(value: ir.Value | None) -> bool:
    """Whether a constant extends along two axes or more: a weight, and not the frequencies of rotary angles."""
    if value is None or not is_initializer(value) or value.const_value is None:
        return False
    return sum(size > 1 for size in value.const_value.shape.numpy()) > 1


def _is_bias(node: ir.Node) -> bool:
    return (
        node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.INT32
    )


def _is_delicate(node: ir.Node, delicate: set[ir.Value]) -> bool:
    if node.op_type in _SENSITIVE:
        return any(_is_float(value) for value in node.inputs)
    if node.op_type == "Mul":
        return node.inputs[0] is node.inputs[1]  # a square
    if node.op_type == "Div":
        return node.inputs[1] in delicate
    computed = [value for value in node.inputs if value is not None and not is_initializer(value)]
    floats = [value for value in computed if _is_float(value)]
    return node.op_type in _ON_THE_WAY and bool(floats) and all(value in delicate for value in floats)


def _is_lost(value: ir.Value | None, limits: Limits) -> bool:
    """Whether a constant would become 0 or infinity."""
    array = float_constant(value)
    if array is None or value is None:
        return False
    magnitude = np.abs(array[np.isfinite(array) & (array != 0)])
    if (magnitude > limits.largest).any():
        return any(usage.node.op_type not in _MASKING for usage in value.uses())
    return array.size <= _SMALL and bool((magnitude < limits.smallest).any())


def _is_allowed(node: ir.Node, version: int, dtype: ir.DataType) -> bool:
    floats = [value for value in (*node.inputs, *node.outputs) if _is_float(value)]
    if not floats:
        return True
    if node.domain not in ("", "ai.onnx") or any(True for _ in subgraphs(node)):
        return False
    schema = _schema(node, version)
    types = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    wanted = f"tensor({dtype.name.lower()})"
    pairs = (*_formal(node.inputs, schema.inputs), *_formal(node.outputs, schema.outputs))
    return all(kind == "tensor(float)" or wanted in types.get(kind, ()) for value, kind in pairs if _is_float(value))


def _schema(node: ir.Node, version: int) -> Any:
    return onnx.defs.get_schema(node.op_type, version, "")


def _formal(values: Any, formal: Any) -> Iterator[tuple[ir.Value | None, str]]:
    """Each value with the type, or the name of the type, that the specification gives it; the last may repeat."""
    for index, value in enumerate(values):
        yield value, str(formal[min(index, len(formal) - 1)].type_str)


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT
