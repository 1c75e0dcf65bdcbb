"""Whether the samples of a batch do not depend on each other, as far as the graph alone tells.

Operator by operator: what is not known here counts as dependent. `qonnx.pieces` finds out by running samples then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias

import onnx_ir as ir

# The ranks of the values that hold an entry per sample along the first axis. They are counted here, as files declare
# wrong shapes, which ONNX Runtime only warns of.
_Ranks: TypeAlias = Mapping[ir.Value, int]

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

# What is computed along the axes that an attribute names, or in later opsets the second input, and by how many axes the
# rank grows for each of them.
_ALONG_AXES: Mapping[str, int] = {
    "ReduceL1": -1, "ReduceL2": -1, "ReduceLogSum": -1, "ReduceLogSumExp": -1, "ReduceMax": -1, "ReduceMean": -1,
    "ReduceMin": -1, "ReduceProd": -1, "ReduceSum": -1, "ReduceSumSquare": -1, "Squeeze": -1, "Unsqueeze": 1,
}
# fmt: on

# What is computed along one axis or from there on, and which that is where the node does not say. Before opset 13 that
# of the softmaxes is 1, which is not the first axis either.
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
        model: the first axis of all its inputs is that of samples; initializers that double as inputs are constants.
        values: names of values of the main graph. One that depends on constants only is not of the kind.

    Returns:
        False also where that is not known.

    Example:
        >>> text = "g (float[n, 2] x) => (float[n, 2] y, float[n, 2] z) { y = Relu(x) z = Softmax <axis = 0> (x) }"
        >>> model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
        >>> independent(model, ["x", "y"]), independent(model, ["y", "z"])
        (True, False)
    """
    fed = [value for value in model.graph.inputs if not value.is_initializer()]
    ranks = {value: value.shape.rank() for value in fed if value.shape is not None}
    for node in model.graph:
        if node.domain in ("", "ai.onnx") and (rank := _by_sample(node, ranks)):
            ranks.update(dict.fromkeys(node.outputs, rank))
    return {value.name for value in ranks}.issuperset(values)


def _by_sample(node: ir.Node, ranks: _Ranks) -> int:
    """The rank of what a node computes of each sample, from values of the kind and constants; 0 if it does not."""
    given = [value for value in node.inputs if value is not None]
    if not all(value in ranks or value.const_value is not None for value in given):
        return 0
    found = [ranks[value] for value in given if value in ranks]
    if not found:
        return 0
    if node.op_type in _ELEMENTWISE:
        alike = all(ranks[v] == max(found) if v in ranks else _same_for_all(v, max(found)) for v in given)
        return max(found) if alike else 0
    if node.op_type == "Concat":
        return found[0] if len(found) == len(given) and _behind_first(_axis(node, 0), found[0]) else 0
    if node.op_type == "MatMul" and len(found) == 2:
        return found[0] if found[0] == found[1] > 2 else 0
    # Of all others it is the first input, and nothing else.
    return _changes_rank(node, found[0]) if given[0] in ranks and len(found) == 1 else 0


def _changes_rank(node: ir.Node, rank: int) -> int:
    """The rank of what a node makes of its first input; 0 if it does not do so by sample."""
    if node.op_type in _BATCHED:  # the places of maxima are counted through all samples
        return rank if len(node.outputs) == 1 and not node.attributes.get_int("training_mode", 0) else 0
    if node.op_type in _ALONG_AXIS:
        return rank if _behind_first(_axis(node, _ALONG_AXIS[node.op_type]), rank) else 0
    if node.op_type in _ALONG_AXES:
        axes = _constants(node, "axes", 1) or []
        after = rank + _ALONG_AXES[node.op_type] * len(axes)
        kept = node.op_type.startswith("Reduce") and node.attributes.get_int("keepdims", 1) != 0
        return (rank if kept else after) if _behind_first(axes, max(rank, after)) else 0
    match node.op_type:
        case "Flatten":
            return 2 if node.attributes.get_int("axis", 1) == 1 else 0
        case "Gemm":
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            plain = not node.attributes.get_int("transA", 0) and (bias is None or _same_for_all(bias, 2))
            return 2 if plain else 0
        case "MatMul":
            right = node.inputs[1]
            return rank if rank > 1 and right is not None and _constant_rank(right) == 2 else 0
        case "Pad":
            pads = _constants(node, "pads", 1) or []
            return rank if len(node.inputs) < 4 and len(pads) == 2 * rank and pads[0] == pads[rank] == 0 else 0
        case "Reshape":
            shape = _constants(node, "shape", 1) or [-1]
            return len(shape) if shape[0] == 0 and not node.attributes.get_int("allowzero", 0) else 0
        case "Resize":
            return rank if _resizes_behind(node) else 0
        case "Transpose":
            return rank if (node.attributes.get_ints("perm", None) or (-1,))[0] == 0 else 0
    return 0


def _same_for_all(constant: ir.Value, rank: int) -> bool:
    """Whether a constant meets every sample of a value of some rank with the same elements."""
    stored = constant.const_value
    own = _constant_rank(constant)
    return stored is not None and (own < rank or (own == rank and stored.shape[0] == 1))


def _constant_rank(value: ir.Value) -> int:
    return -1 if value.const_value is None else len(value.const_value.shape)


def _axis(node: ir.Node, default: int) -> list[int]:
    return [node.attributes.get_int("axis", default)]


def _behind_first(axes: Collection[int], rank: int) -> bool:
    """Whether axes leave out the first. None stand for all."""
    return bool(axes) and rank > 0 and all(axis % rank > 0 for axis in axes)


def _resizes_behind(node: ir.Node) -> bool:
    scales = node.inputs[2].const_value if len(node.inputs) > 2 and node.inputs[2] is not None else None
    # The region of interest may be one of samples, too.
    cropped = node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize"
    return not cropped and "axes" not in node.attributes and scales is not None and [*scales.numpy()[:1]] == [1]


def _constants(node: ir.Node, name: str, index: int) -> list[int] | None:
    """Integers that an attribute, or else an input, gives; None where it is not given, or not stored."""
    attribute = node.attributes.get_ints(name, None)
    if attribute is not None:
        return list(attribute)
    value = node.inputs[index] if len(node.inputs) > index else None
    stored = None if value is None else value.const_value
    return None if stored is None else [int(size) for size in stored.numpy().reshape(-1)]
