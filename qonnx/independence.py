"""Whether the samples of a batch do not depend on each other, as far as the graph alone tells.

Operator by operator: what is not known here counts as dependent. `qonnx.pieces` finds out by running samples then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeAlias

import onnx_ir as ir

_Values: TypeAlias = set[ir.Value]

# fmt: off
_ELEMENTWISE = frozenset({
    "Abs", "Add", "And", "Cast", "Ceil", "Celu", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu",
    "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Less", "LessOrEqual", "Log",
    "Max", "Mean", "Min", "Mish", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu",
    "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu", "Where",
    "Xor",
})

# The first axis of the first input is that of samples, by definition.
_BATCHED = frozenset({
    "AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "DepthToSpace", "GlobalAveragePool", "GlobalMaxPool",
    "GroupNormalization", "InstanceNormalization", "LRN", "LpPool", "MaxPool", "SpaceToDepth",
})

# What is computed along the axes that an attribute names, or in later opsets the second input.
_ALONG_AXES = frozenset({
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare", "Squeeze", "Unsqueeze",
})
# fmt: on

# What is computed along one axis, and which that is where the node does not say. In old opsets it is 1 and not the
# last one of the softmaxes: not the first either.
_ALONG_AXIS: Mapping[str, int] = {
    "LayerNormalization": -1,
    "LogSoftmax": -1,
    "RMSNormalization": -1,
    "Softmax": -1,
    "Split": 0,
}


def independent(model: ir.Model, values: Iterable[str]) -> bool:
    """Whether each of some values holds one entry per sample along its first axis, computed from that sample alone.

    Args:
        model: with inferred shapes; the first axis of all its inputs is that of samples.
        values: names of values of the main graph. One that depends on constants only is not of the kind.

    Returns:
        False also where that is not known.

    Example:
        >>> text = 'g (float[n, 2] x) => (float[n, 2] y, float[n, 2] z) { y = Relu(x) z = CumSum(x, a) }'
        >>> text = text.replace("{", "<int64 a = {0}> {", 1)
        >>> model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
        >>> independent(model, ["x", "y"]), independent(model, ["y", "z"])
        (True, False)
    """
    found = {value for value in model.graph.inputs if not value.is_initializer()}
    for node in model.graph:
        if node.domain in ("", "ai.onnx") and _by_sample(node, found):
            found.update(node.outputs)
    return {value.name for value in found}.issuperset(values)


def _by_sample(node: ir.Node, found: _Values) -> bool:
    """Whether a node computes every sample by itself, from values of the kind and constants."""
    given = [value for value in node.inputs if value is not None]
    if not given or not all(value in found or value.const_value is not None for value in given):
        return False
    if node.op_type in _ELEMENTWISE:
        return _broadcasts(node, given, found)
    if node.op_type == "Concat":
        return found.issuperset(given) and _behind_first(node, [node.attributes.get_int("axis", 0)])
    if node.op_type == "MatMul":
        return given[0] in found and _multiplies_samples(node, found)
    if given[0] not in found or not found.isdisjoint(given[1:]):
        return False
    if node.op_type in _BATCHED:  # the places of maxima are counted through all samples
        return len(node.outputs) == 1 and not node.attributes.get_int("training_mode", 0)
    if node.op_type in _ALONG_AXIS:
        return _behind_first(node, [node.attributes.get_int("axis", _ALONG_AXIS[node.op_type])])
    if node.op_type in _ALONG_AXES:
        return _behind_first(node, _constants(node, "axes", 1))
    rule = _RULES.get(node.op_type)
    return rule is not None and rule(node)


def _broadcasts(node: ir.Node, given: Collection[ir.Value], found: _Values) -> bool:
    """Whether samples meet the same samples, and constants are the same for all of them."""
    rank = _rank(node.outputs[0])
    alike = all(_rank(value) == rank if value in found else _same_for_all(value, rank) for value in given)
    return alike and rank > 0 and not found.isdisjoint(given)


def _same_for_all(constant: ir.Value, rank: int) -> bool:
    shape = constant.shape
    return shape is not None and (shape.rank() < rank or (shape.rank() == rank and rank > 0 and shape[0] == 1))


def _behind_first(node: ir.Node, axes: Collection[int] | None) -> bool:
    """Whether axes, which a node counts where it has more of them, leave out the first. Without any, it means all."""
    ranks = _rank(node.inputs[0]), _rank(node.outputs[0])
    return bool(axes) and min(ranks) > 0 and all(axis % max(ranks) > 0 for axis in axes or ())


def _reshapes_samples(node: ir.Node) -> bool:
    shape, before = _constants(node, "shape", 1), node.inputs[0]
    if not shape or before is None or node.attributes.get_int("allowzero", 0) != 0:
        return False
    behind = [size if isinstance(size, int) else 0 for size in before.shape or (0, 0)][1:]
    return shape[0] == 0 or (shape[0] == -1 and 0 < math.prod(behind) == math.prod(shape[1:]))


def _multiplies_samples(node: ir.Node, found: _Values) -> bool:
    left, right = node.inputs[:2]
    rank = _rank(left)
    return _rank(right) == (rank if right in found else 2) and rank > (2 if right in found else 1)


def _multiplies_rows(node: ir.Node) -> bool:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return not node.attributes.get_int("transA", 0) and (bias is None or _same_for_all(bias, 2))


def _pads_behind(node: ir.Node) -> bool:
    pads, rank = _constants(node, "pads", 1), _rank(node.inputs[0])
    return len(node.inputs) < 4 and pads is not None and len(pads) == 2 * rank > 0 and pads[0] == pads[rank] == 0


def _resizes_behind(node: ir.Node) -> bool:
    scales = node.inputs[2].const_value if len(node.inputs) > 2 and node.inputs[2] is not None else None
    return scales is not None and "axes" not in node.attributes and scales.size > 1 and scales.numpy()[0] == 1


_RULES: Mapping[str, Callable[[ir.Node], bool]] = {
    "Flatten": lambda node: node.attributes.get_int("axis", 1) == 1,
    "Gemm": _multiplies_rows,
    "Pad": _pads_behind,
    "Reshape": _reshapes_samples,
    "Resize": _resizes_behind,
    "Transpose": lambda node: (node.attributes.get_ints("perm", None) or (-1,))[0] == 0,
}


def _constants(node: ir.Node, name: str, index: int) -> list[int] | None:
    """Integers that an attribute, or else an input, gives; None where it is not given, or not stored."""
    attribute = node.attributes.get_ints(name, None)
    if attribute is not None:
        return list(attribute)
    value = node.inputs[index] if len(node.inputs) > index else None
    stored = None if value is None else value.const_value
    return None if stored is None else [int(size) for size in stored.numpy().reshape(-1)]


def _rank(value: ir.Value | None) -> int:
    """-1 where it is not known."""
    return -1 if value is None or value.shape is None else value.shape.rank()
