"""From codes with a zero point to INT8 with zero point 0: the repair for E1, E2 and E3.

Codes that many nodes share are changed together or not at all: the QuantizeLinear nodes that write them, the operators
that move them, the constants among them and the DequantizeLinear nodes that read them.

* Every zero point in the middle of an unsigned grid (uint8 with 128): subtracting it from codes and zero points changes
  no value. Exact.
* A constant that no matrix product or convolution multiplies by (ONNX Runtime quantizes biases of Add so): stored in
  float again. Exact.
* An activation that is quantized for operators that compute in float anyway (most pairs that ONNX Runtime inserts): the
  pair is removed. Approximate, and nearer to the float model than before.
* Everything else: the symmetric grid that covers the same range, scale = max(-low, high) / 127. Approximate: for a
  range on one side of 0 the step doubles. There the old grid also clipped the other side to 0, which tools use to
  leave out a Relu; it is put back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from qonnx.linear import CONVOLUTIONS
from qonnx.linter.edit import Editor, Outcome, stem_of, stored
from qonnx.linter.findings import Repair
from qonnx.linter.view import (
    PRODUCTS,
    Array,
    Quantizer,
    is_constant,
    is_mover,
    is_op,
    quantizer_of,
    readers,
    same_parameters,
    source_of,
)
from qonnx.numerics import Dtype, dequantize, quantize, scale_and_zero_point

_FLOAT_MAX = float(np.finfo(np.float32).max)
_MIDDLE = {ir.DataType.UINT8: 128, ir.DataType.UINT4: 8}
_SIGNED = {ir.DataType.UINT8: ir.DataType.INT8, ir.DataType.UINT4: ir.DataType.INT4}
_INTEGER_OPS = PRODUCTS | {"AveragePool", "Concat", "GlobalAveragePool", "MaxPool", "Resize"}
_NEVER_NEGATIVE = frozenset({"Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt"})


@dataclass(frozen=True, eq=False)
class _Codes:
    """Codes that must have one type.

    Attributes:
        quantizers: the Q/DQ nodes that write and read them.
        values: all values that hold them.
        constants: those of the values that are stored.
    """

    quantizers: tuple[Quantizer, ...]
    values: tuple[ir.Value, ...]
    constants: tuple[ir.Value, ...]


def regrid_repair(quantizer: Quantizer) -> Repair:
    """Whether `regrid` can repair the codes of this node."""
    codes = _codes_of(quantizer)
    if codes is None or _is_symmetric(codes):
        return Repair.NONE
    if _is_centred(codes) or _is_float_constant(codes):
        return Repair.EXACT
    if _is_float_activation(codes):
        return Repair.APPROXIMATE
    return Repair.APPROXIMATE if _is_affine(codes) else Repair.NONE


def regrid(editor: Editor, node: ir.Node) -> Outcome | None:
    """Gives the codes of a Q/DQ node the type int8 and zero point 0."""
    quantizer = quantizer_of(node)
    codes = _codes_of(quantizer) if quantizer is not None else None
    if quantizer is None or codes is None or _is_symmetric(codes):
        return None
    if _is_centred(codes):
        _shift(editor, codes)
        return Outcome("codes and zero point shifted to a signed type with zero point 0", True)
    if _is_float_constant(codes):
        for each in codes.quantizers:
            to_float(editor, each)
        return Outcome("constant stored in float: nothing multiplies by it", True)
    if _is_float_activation(codes):
        for each in codes.quantizers:
            if not each.quantizes:
                editor.replace(each.output, codes.quantizers[0].data)
        return Outcome("pair removed: what reads it computes in float", False)
    if not _is_affine(codes):
        return None
    before = codes.quantizers[0]
    parameters = _symmetric(before)
    if parameters is None:
        return None
    for each in codes.quantizers:
        _clip_to_side(editor, each)
    for value in codes.constants:
        _requantize(editor, value, before, parameters)
    _set_parameters(editor, codes, [parameters] * len(codes.quantizers), ir.DataType.INT8)
    return Outcome("symmetric int8 grid over the same range", False)


def to_float(editor: Editor, quantizer: Quantizer) -> None:
    """Replaces a DequantizeLinear of a constant by the float constant, bit for bit what ONNX Runtime computes."""
    tensor, dtype = stored(quantizer.data), quantizer.scale.dtype
    scale, zero, granularity = quantizer.parameters
    assert dtype is not None  # callers have checked

    def make() -> Array:
        return dequantize(tensor.numpy(), scale, zero, granularity)

    shape = ir.Shape(tensor.shape.numpy())
    editor.replace(quantizer.output, editor.lazy(f"{quantizer.data.name}_float", shape, dtype, make))


def _codes_of(start: Quantizer) -> _Codes | None:
    """Everything that shares codes with a Q/DQ node; None if something else than moving happens to them."""
    quantizers: dict[ir.Node, Quantizer] = {}
    values: dict[ir.Value, None] = {}
    pending = [start.codes]
    while pending:
        value = pending.pop()
        if value in values:
            continue
        values[value] = None
        producer = value.producer()
        writer = quantizer_of(producer)
        if value.is_graph_input() or value.is_graph_output():
            return None  # its type is part of the model's interface
        if writer is not None and writer.quantizes:
            quantizers[writer.node] = writer
        elif not is_constant(value):
            if producer is None or not _moves_codes(producer):
                return None
            pending.extend(_codes_read(producer))
        for usage in value.uses():
            reader = quantizer_of(usage.node)
            if reader is not None and not reader.quantizes and usage.idx == 0:
                quantizers[reader.node] = reader
            elif _moves_codes(usage.node) and value in _codes_read(usage.node):
                pending.extend(usage.node.outputs if usage.node.op_type == "Split" else usage.node.outputs[:1])
            else:
                return None
    if any(_is_unknown(quantizer) for quantizer in quantizers.values()):
        return None
    return _Codes(tuple(quantizers.values()), tuple(values), tuple(value for value in values if is_constant(value)))


def _moves_codes(node: ir.Node) -> bool:
    return is_mover(node) or is_op(node, frozenset({"Concat"}))


def _codes_read(node: ir.Node) -> tuple[ir.Value, ...]:
    inputs = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    return tuple(value for value in inputs if value is not None)


def _is_unknown(quantizer: Quantizer) -> bool:
    scales, zeros = quantizer.scales, quantizer.zero_points
    if scales is None or zeros is None or zeros.size not in (1, scales.size):
        return True
    return not bool(((scales > 0) & np.isfinite(scales)).all())


def _is_symmetric(codes: _Codes) -> bool:
    """Whether nothing is left to do."""
    return all(each.dtype in _SIGNED.values() and not np.any(each.zero_points) for each in codes.quantizers)


def _is_centred(codes: _Codes) -> bool:
    """Whether every zero point is the middle of an unsigned grid."""
    middles = {_MIDDLE.get(each.dtype) if each.dtype is not None else None for each in codes.quantizers}
    zeros = {int(zero) for each in codes.quantizers for zero in np.unique(np.asarray(each.zero_points, np.int32))}
    return None not in middles and len(middles) == 1 and zeros == middles


def _is_float_constant(codes: _Codes) -> bool:
    """Whether the codes are one constant that is dequantized right away, and not to be multiplied by."""
    direct = all(
        not each.quantizes
        and each.data in codes.constants
        and not each.output.is_graph_output()
        and not _is_multiplied(each.output)
        and "output_dtype" not in each.node.attributes
        and _same_size(each)
        for each in codes.quantizers
    )
    return direct and len(codes.values) == 1


def _is_float_activation(codes: _Codes) -> bool:
    """Whether the codes are one activation, quantized and dequantized, that no operator would compute on as integers.

    A grid that ends at 0 may stand for a Relu or Clip, and is left, unless its values cannot be negative anyway.
    """
    first, *others = codes.quantizers
    if not first.quantizes or first.weight is not None or any(each.quantizes for each in others):
        return False
    ends = () if first.dtype is None else (int(first.dtype.min), int(first.dtype.max))
    limited = bool(np.isin(np.asarray(first.zero_points), ends).any())
    return (
        len(codes.values) == 1
        and (not limited or is_op(source_of(first.data), _NEVER_NEGATIVE))
        and all(each.output.dtype == first.data.dtype for each in others)
        and not any(each.output.is_graph_output() or _serves_integers(each.output) for each in others)
    )


def _serves_integers(value: ir.Value) -> bool:
    """Whether what reads a value, be it behind operators that move elements, can compute on integers."""
    return any(
        is_op(reader, _INTEGER_OPS)
        or (is_op(reader, frozenset({"Add"})) and any(_is_convolved(addend) for addend in reader.inputs))
        or (is_mover(reader) and any(_serves_integers(output) for output in reader.outputs))
        for reader in readers(value)
    )


def _is_convolved(value: ir.Value | None) -> bool:
    """Whether a convolution computes the value, be it with a Q/DQ pair behind."""
    while value is not None and (found := quantizer_of(value.producer())) is not None:
        value = found.data
    return value is not None and is_op(value.producer(), CONVOLUTIONS)


def _is_multiplied(value: ir.Value) -> bool:
    """Whether a product reads the value, be it behind operators that move elements."""
    return any(
        is_op(reader, PRODUCTS) or (is_mover(reader) and any(_is_multiplied(output) for output in reader.outputs))
        for reader in readers(value)
    )


def _same_size(quantizer: Quantizer) -> bool:
    return np.asarray(quantizer.scales).size == np.asarray(quantizer.zero_points).size


def _is_affine(codes: _Codes) -> bool:
    """Whether one symmetric int8 grid can stand for the grid that all nodes share."""
    first = codes.quantizers[0]
    return (
        first.dtype in (ir.DataType.UINT8, ir.DataType.INT8)
        and all(same_parameters(first, other) for other in codes.quantizers[1:])
        and not any(quantizer.block_size for quantizer in codes.quantizers)
        and _same_size(first)
        and (first.per_tensor or not _has_moved_constants(codes))
    )


def _has_moved_constants(codes: _Codes) -> bool:
    return bool(codes.constants) and len(codes.values) > len(codes.constants)


def _symmetric(quantizer: Quantizer) -> tuple[Array, Array] | None:
    """Scale and zero point of the symmetric int8 grid that covers what the codes cover."""
    scale, zero, dtype = np.asarray(quantizer.scales), np.asarray(quantizer.zero_points), quantizer.dtype
    assert dtype is not None  # _is_affine makes sure
    steps, zeros = scale.astype(np.float64), zero.astype(np.float64).reshape(scale.shape)
    low = np.clip((float(dtype.min) - zeros) * steps, -_FLOAT_MAX, 0)
    high = np.clip((float(dtype.max) - zeros) * steps, 0, _FLOAT_MAX)
    step, zero_point = scale_and_zero_point(low, high, Dtype.INT8, symmetric=True)
    step = step.astype(scale.dtype)
    return (step, zero_point) if bool(((step > 0) & np.isfinite(step)).all()) else None


def _shift(editor: Editor, codes: _Codes) -> None:
    before = codes.quantizers[0].dtype
    assert before is not None  # _is_centred makes sure
    after, middle = _SIGNED[before], _MIDDLE[before]
    for value in codes.constants:
        tensor = stored(value)
        make = partial(_shifted, tensor, middle, after)
        editor.replace(value, editor.lazy(f"{value.name}_signed", ir.Shape(tensor.shape.numpy()), after, make))
    scales = [np.asarray(each.scales) for each in codes.quantizers]
    _set_parameters(editor, codes, [(scale, np.zeros(scale.shape, after.numpy())) for scale in scales], after)


def _shifted(tensor: ir.TensorProtocol, middle: int, dtype: ir.DataType) -> Array:
    return (tensor.numpy().astype(np.int16) - middle).astype(np.int8).astype(dtype.numpy())


def _requantize(editor: Editor, value: ir.Value, before: Quantizer, after: tuple[Array, Array]) -> None:
    tensor = stored(value)
    scale, zero, granularity = before.parameters
    step, zero_point = (array.reshape(scale.shape) for array in after)

    def make() -> Array:
        real = dequantize(tensor.numpy(), scale.astype(np.float32), zero, granularity)
        return quantize(real, step, zero_point, Dtype.INT8, granularity)

    shape = ir.Shape(tensor.shape.numpy())
    editor.replace(value, editor.lazy(f"{value.name}_symmetric", shape, ir.DataType.INT8, make))


def _set_parameters(editor: Editor, codes: _Codes, parameters: list[tuple[Array, Array]], dtype: ir.DataType) -> None:
    """Writes scale and zero point of every node; equal ones share their initializers."""
    made: dict[bytes, tuple[ir.Value, ir.Value]] = {}
    for quantizer, (scale, zero) in zip(codes.quantizers, parameters, strict=True):
        key = scale.tobytes() + str(scale.shape).encode()
        if key not in made:
            stem = stem_of(codes.quantizers[0])
            made[key] = (editor.array(f"{stem}_scale", scale), editor.array(f"{stem}_zero_point", zero))
        editor.set_input(quantizer.node, 1, made[key][0])
        editor.set_input(quantizer.node, 2, made[key][1])
        quantizer.node.attributes.pop("output_dtype", None)
    for value in codes.values:
        if not is_constant(value):
            value.type = ir.TensorType(dtype)  # a clone shares the type object with its original


def _clip_to_side(editor: Editor, quantizer: Quantizer) -> None:
    """Puts a Relu before a QuantizeLinear whose grid had no negative values, and Min(x, 0) where it had no others."""
    zeros, dtype = quantizer.zero_points, quantizer.dtype
    if not quantizer.quantizes or zeros is None or dtype is None:
        return
    data, stem = quantizer.data, quantizer.data.name or "value"
    if np.all(zeros == dtype.min):
        if is_op(source_of(data), _NEVER_NEGATIVE):
            return
        op, inputs, suffix = "Relu", [data], "positive"
    elif np.all(zeros == dtype.max):
        zero = editor.array(f"{stem}_zero", np.zeros((), (data.dtype or ir.DataType.FLOAT).numpy()))
        op, inputs, suffix = "Min", [data, zero], "negative"
    else:
        return
    output = ir.Value(name=editor.names.fresh(f"{stem}_{suffix}"), type=data.type, shape=data.shape)
    node = ir.node(op, inputs, name=editor.names.fresh(f"{stem}_{op}"), outputs=[output])
    assert quantizer.node.graph is not None
    quantizer.node.graph.insert_before(quantizer.node, [node])
    quantizer.node.replace_input_with(0, output)
