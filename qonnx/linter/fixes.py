"""The smaller repairs, and which repair goes with which rule."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qonnx.linter.edit import Editor, Outcome, Repairer, stem_of, stored
from qonnx.linter.findings import Repair
from qonnx.linter.grid import regrid, to_float
from qonnx.linter.moves import move_behind
from qonnx.linter.retype import retype
from qonnx.linter.view import (
    Array,
    Quantizer,
    dequantizer_of,
    is_constant,
    is_op,
    parameter,
    quantizer_of,
    readers,
    same_parameters,
)
from qonnx.numerics import Dtype, PerAxis, quantize

_DTYPES = {dtype.onnx: dtype for dtype in Dtype}


def scale_repair(quantizer: Quantizer) -> Repair:
    """Whether bad scales of this node can be repaired."""
    return Repair.APPROXIMATE if _is_boundless(quantizer) else _dead_channels_repair(quantizer)


def _is_boundless(quantizer: Quantizer) -> bool:
    """Whether a scale of this QuantizeLinear is infinite or NaN, as after masks of -inf, and its input can be read."""
    if not quantizer.quantizes or quantizer.scales is None or np.isfinite(quantizer.scales).all():
        return False
    following = [dequantizer_of(usage.node.outputs[0]) for usage in quantizer.output.uses() if usage.idx == 0]
    if not following or len(following) != len(quantizer.output.uses()) or quantizer.output.is_graph_output():
        return False
    return all(
        each is not None and each.output.dtype == quantizer.data.dtype and not each.output.is_graph_output()
        for each in following
    )


def _dead_channels_repair(quantizer: Quantizer) -> Repair:
    """Whether the only bad scales of this DequantizeLinear are zeros, and it reads a constant."""
    scales = np.asarray(quantizer.scales)
    known = not quantizer.quantizes and _is_stored(quantizer) and not quantizer.block_size
    return Repair.EXACT if known and bool(((scales >= 0) & np.isfinite(scales)).all()) else Repair.NONE


def usable_scales(editor: Editor, node: ir.Node) -> Outcome | None:
    """E4: a channel with scale 0 stands for zeros whatever its codes are: so do codes of 0 with scale 1.

    What is not finite fits no scale: it stays in float.
    """
    quantizer = quantizer_of(node)
    if quantizer is not None and _is_boundless(quantizer):
        for usage in list(quantizer.output.uses()):
            editor.replace(usage.node.outputs[0], quantizer.data)
        return Outcome("pair removed: its scale is not finite", False)
    if quantizer is None or quantizer.scales is None or _dead_channels_repair(quantizer) is Repair.NONE:
        return None
    tensor, dead, before = stored(quantizer.data), quantizer.scales == 0, quantizer.scales
    _, zero, granularity = quantizer.parameters

    def make() -> Array:
        codes = tensor.numpy()
        channels = [1] * codes.ndim
        if isinstance(granularity, PerAxis):
            channels[granularity.axis] = -1
        return np.where(dead.reshape(channels), zero.reshape(channels), codes)

    codes = editor.lazy(f"{quantizer.data.name}_dead", ir.Shape(tensor.shape.numpy()), tensor.dtype, make)
    scale = editor.array(f"{stem_of(quantizer)}_scale", np.where(dead, 1, before).astype(before.dtype))
    editor.set_input(node, 0, codes)
    editor.set_input(node, 1, scale)
    return Outcome("scale of all-zero channels set to 1", True)


def broadcast_zero_point(editor: Editor, node: ir.Node) -> Outcome | None:
    """E5: one zero point for many scales is repeated."""
    quantizer = quantizer_of(node)
    if quantizer is None or quantizer.scales is None or quantizer.zero_point is None:
        return None
    zero = quantizer.zero_points
    if zero is None or zero.size != 1 or quantizer.scales.size == 1:
        return None
    repeated = np.broadcast_to(zero.reshape(()), quantizer.scales.shape).copy()
    editor.set_input(node, 2, editor.array(f"{stem_of(quantizer)}_zero_point", repeated))
    return Outcome(f"zero point repeated {quantizer.scales.size} times", True)


def bias_repair(quantizer: Quantizer) -> Repair:
    """Whether the bias that this DequantizeLinear reads can be stored in float."""
    return Repair.EXACT if _is_stored(quantizer) else Repair.NONE


def float_bias(editor: Editor, node: ir.Node) -> Outcome | None:
    """E7: a bias in int32 becomes the float bias that it stands for."""
    quantizer = quantizer_of(node)
    if quantizer is None or bias_repair(quantizer) is Repair.NONE:
        return None
    to_float(editor, quantizer)
    return Outcome("bias stored in float", True)


def float_operands_repair(node: ir.Node) -> Repair:
    """Whether all quantized inputs of this node are constants."""
    found = [dequantizer for value in node.inputs if (dequantizer := dequantizer_of(value)) is not None]
    return Repair.EXACT if found and all(_is_stored(dequantizer) for dequantizer in found) else Repair.NONE


def float_operands(editor: Editor, node: ir.Node) -> Outcome | None:
    """W9: scale and bias of a normalization become the float constants that they stand for."""
    if float_operands_repair(node) is Repair.NONE:
        return None
    for value in tuple(node.inputs):
        dequantizer = dequantizer_of(value)
        if dequantizer is not None:
            to_float(editor, dequantizer)
    return Outcome("constants stored in float", True)


def _is_stored(quantizer: Quantizer) -> bool:
    """Whether the DequantizeLinear reads a constant, with parameters that are known."""
    scales, zeros = quantizer.scales, quantizer.zero_points
    known = is_constant(quantizer.data) and scales is not None and zeros is not None and scales.size == zeros.size
    return known and not quantizer.output.is_graph_output() and "output_dtype" not in quantizer.node.attributes


def repeated_repair(quantizer: Quantizer) -> Repair:
    """Whether this QuantizeLinear only writes codes that exist already."""
    before = dequantizer_of(quantizer.data)
    if before is None or not quantizer.quantizes or not same_parameters(before, quantizer):
        return Repair.NONE
    return Repair.NONE if quantizer.output.is_graph_output() else Repair.EXACT


def drop_repeated(editor: Editor, node: ir.Node) -> Outcome | None:
    """W5: codes that are dequantized and quantized again with the same parameters are read directly."""
    quantizer = quantizer_of(node)
    before = dequantizer_of(quantizer.data) if quantizer is not None else None
    if quantizer is None or before is None or repeated_repair(quantizer) is Repair.NONE:
        return None
    editor.replace(quantizer.output, before.codes)
    return Outcome("read the codes that were there before", True)


def stored_float_repair(quantizer: Quantizer) -> Repair:
    """Whether the codes of a constant that this QuantizeLinear reads can be stored instead."""
    return Repair.NONE if _folded_reader(quantizer) is None else Repair.EXACT


def fold_quantize(editor: Editor, node: ir.Node) -> Outcome | None:
    """W12: stores the codes of a constant instead of its float values, with what a Clip does to them."""
    quantizer = quantizer_of(node)
    found = _folded_reader(quantizer) if quantizer is not None else None
    if quantizer is None or found is None:
        return None
    written, low, high = found
    dtype, tensor = _DTYPES[quantizer.dtype or ir.DataType.INT8], stored(quantizer.data)
    scale, zero, granularity = quantizer.parameters

    def make() -> Array:
        codes = quantize(tensor.numpy(), scale, zero, dtype, granularity)
        return codes if low is None or high is None else np.clip(codes, low, high)

    codes = editor.lazy(f"{quantizer.data.name}_quantized", ir.Shape(tensor.shape.numpy()), dtype.onnx, make)
    editor.replace(written, codes)
    return Outcome(f"stored as {dtype}", True)


def _folded_reader(quantizer: Quantizer) -> tuple[ir.Value, Array | None, Array | None] | None:
    """The value that the stored codes shall replace, and the bounds of the Clip that makes it."""
    known = quantizer.quantizes and is_constant(quantizer.data) and quantizer.dtype in _DTYPES
    if not known or quantizer.scales is None or quantizer.zero_points is None:
        return None
    if quantizer.scales.size != quantizer.zero_points.size or not bool(
        ((quantizer.scales > 0) & np.isfinite(quantizer.scales)).all()
    ):
        return None
    written = quantizer.output
    bounds: tuple[Array, Array] | tuple[None, None] = (None, None)
    following = readers(written)
    if len(following) == 1 and is_op(following[0], frozenset({"Clip"})) and not written.is_graph_output():
        found = clip_bounds(following[0])
        if found is None:
            return None
        written, bounds = following[0].outputs[0], found
    only = all(usage.idx == 0 and dequantizer_of(usage.node.outputs[0]) for usage in written.uses())
    return None if written.is_graph_output() or not only else (written, *bounds)


def clip_bounds(node: ir.Node) -> tuple[Array, Array] | None:
    """The bounds of a Clip that has both as constants."""
    bounds = [parameter(value) if value is not None else None for value in node.inputs[1:3]]
    low, high = (*bounds, None, None)[:2]
    if low is None or high is None or low.size != 1 or high.size != 1:
        return None
    return low, high


REPAIRS: Mapping[str, Repairer] = {
    "E1": regrid,
    "E2": regrid,
    "E3": regrid,
    "E4": usable_scales,
    "E5": broadcast_zero_point,
    "E7": float_bias,
    "E8": move_behind,
    "E10": retype,
    "W5": drop_repeated,
    "W9": float_operands,
    "W12": fold_quantize,
}
