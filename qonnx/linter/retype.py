"""Scales get the float type that the graph computes in: the repair for E10."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qonnx.graph import FLOAT_TYPES
from qonnx.linter.edit import Editor, Outcome
from qonnx.linter.findings import Repair
from qonnx.linter.view import Quantizer, dequantizer_of, quantizer_of


def retype_repair(node: ir.Node) -> Repair:
    """Whether `retype` can give all float inputs of this node one type."""
    found = _wrong(node)
    if found is None:
        return Repair.NONE
    wanted, wrong = found
    exact = all(_is_exact(quantizer, wanted) for quantizer in wrong)
    return Repair.EXACT if exact else Repair.APPROXIMATE


def retype(editor: Editor, node: ir.Node) -> Outcome | None:
    """Casts the scales of the DequantizeLinear nodes before a node, and of the QuantizeLinear nodes before those."""
    found = _wrong(node)
    if found is None:
        return None
    wanted, wrong = found
    exact = all(_is_exact(quantizer, wanted) for quantizer in wrong)
    for quantizer in wrong:
        before = quantizer.scale.dtype
        scale = editor.array(f"{quantizer.scale.name}_cast", np.asarray(quantizer.scales).astype(wanted.numpy()))
        first = quantizer_of(quantizer.data.producer())
        if first is not None and first.scale.dtype == before and first.data.dtype == wanted:
            editor.set_input(first.node, 1, scale)
        editor.set_input(quantizer.node, 1, scale)
        quantizer.output.type = ir.TensorType(wanted)  # a clone shares the type object with its original
    return Outcome(f"scales cast to {wanted.name.lower()}", exact)


def _wrong(node: ir.Node) -> tuple[ir.DataType, list[Quantizer]] | None:
    """The type that a node computes in, and the DequantizeLinear nodes before it that write another one.

    An activation tells the type by what it was before it was quantized; a dequantized weight tells nothing.
    """
    types: set[ir.DataType] = set()
    quantizers: list[Quantizer] = []
    for value in node.inputs:
        if value is None or value.dtype not in FLOAT_TYPES:
            continue
        dequantizer = dequantizer_of(value)
        if dequantizer is None:
            types.add(value.dtype)
            continue
        quantizers.append(dequantizer)
        first = quantizer_of(dequantizer.data.producer())
        if dequantizer.weight is None and first is not None and first.data.dtype in FLOAT_TYPES:
            types.add(first.data.dtype)
    if len(types) != 1:
        return None
    (wanted,) = types
    wrong = [quantizer for quantizer in quantizers if quantizer.output.dtype != wanted]
    return (wanted, wrong) if wrong and all(_can_cast(quantizer, wanted) for quantizer in wrong) else None


def _can_cast(quantizer: Quantizer, wanted: ir.DataType) -> bool:
    if quantizer.scales is None or len(quantizer.output.uses()) != 1 or quantizer.output.is_graph_output():
        return False
    with np.errstate(over="ignore"):
        cast = quantizer.scales.astype(wanted.numpy())
    usable = bool(((cast > 0) & np.isfinite(cast)).all())
    return usable and "output_dtype" not in quantizer.node.attributes


def _is_exact(quantizer: Quantizer, wanted: ir.DataType) -> bool:
    scales = np.asarray(quantizer.scales)
    return np.array_equal(scales.astype(wanted.numpy()).astype(np.float64), scales.astype(np.float64))
