"""Which edges of a graph are quantized, and why every other operator stays in float.

This file decides from the graph alone; `qonnx.plan` adds the numbers. To quantize one more operator, add it here:

* an operator that multiplies (so that integer arithmetic pays) goes into `qonnx.layers`;
* an operator that only moves or compares integers (pooling, concatenation) goes into `_extend`;
* what stays in float says why in `_OPERATORS_BY_REASON`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir

from qonnx.attention import cut_edge, is_probability, projection, values_index
from qonnx.graph import is_float, rank
from qonnx.layers import ACTIVATION_FUNCTIONS, Layer, find_layers, is_gpu, operands_of
from qonnx.layers import Edge as Edge
from qonnx.linear import CONVOLUTIONS
from qonnx.recipe import Format, Recipe, Weights
from qonnx.rules import settings_of
from qonnx.targets import Target
from qonnx.weight_layers import find_weights
from qonnx.whole_encoder import add_product_outputs, add_residuals


class StoredWeight(NamedTuple):
    """An initializer, and how some of the nodes that read it want it quantized.

    Attributes:
        value: the name of the initializer.
        channel_axis: the axis of output channels.
        block_axis: the axis along which neighbours may share a scale.
        how: what the recipe says.
    """

    value: str
    channel_axis: int
    block_axis: int | None
    how: Weights


@dataclass(frozen=True)
class Placement:
    """The edges to quantize.

    Attributes:
        layers: every matrix product and convolution, quantized or not, in graph order.
        activations: value name -> the edges of that value to quantize.
        weights: initializer and how to quantize it -> the edges of that initializer that read it so.
        ties: value name -> the name that stands for all values that must share one scale with it.
        probabilities: values that are outputs of a Softmax: their range is known to be 0 to 1.
        float_operators: operator -> (how many stay in float, why).
    """

    layers: tuple[Layer, ...]
    activations: Mapping[str, tuple[Edge, ...]]
    weights: Mapping[StoredWeight, tuple[Edge, ...]]
    ties: Mapping[str, str]
    probabilities: frozenset[str]
    float_operators: Mapping[str, tuple[int, str]]


_OPERATORS_BY_REASON: Mapping[str, str] = {
    "moves or describes data: nothing to compute": """
        Cast CastLike Concat Constant ConstantOfShape DepthToSpace Dropout Expand Flatten Gather GatherElements GatherND
        Identity NonZero Pad Range Reshape ScatterElements ScatterND Shape Size Slice SpaceToDepth Split Squeeze Tile
        Transpose Unsqueeze""",
    "element by element: bound by memory, and rounding its inputs only loses accuracy": """
        Abs Add And BatchNormalization Ceil Clip Div Equal Floor Greater GreaterOrEqual IsNaN LeakyRelu Less
        LessOrEqual Max Min Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Sign Sqrt Sub Sum Where Xor""",
    "normalisation statistics need float": """
        GroupNormalization InstanceNormalization LRN LayerNormalization LpNormalization MeanVarianceNormalization
        RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization""",
    "not linear: integers would need a table, and its input is usually widely spread": """
        Cos Elu Erf Exp Gelu HardSigmoid HardSwish Log LogSoftmax Mish Selu Sigmoid Sin Softmax Softplus Swish Tanh""",
    "recurrent: errors add up over the steps": "GRU LSTM RNN",
    "control flow: its body is left in float": "If Loop Scan SequenceMap",
    "sums and averages need more bits than their inputs have": """
        AveragePool CumSum GlobalAveragePool LpPool ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean ReduceProd
        ReduceSum ReduceSumSquare""",
    "not only quantized operators read its output": "GlobalMaxPool MaxPool ReduceMax ReduceMin",
    "interpolation weights are not integers": "GridSample Resize RoiAlign Upsample",
    "a product that this tool does not read: written as MatMul, it could be quantized": "Einsum",
    "post-processing": "ArgMax ArgMin NonMaxSuppression TopK Unique",
    "its two products are inside one operator: export at opset 22 or lower to quantize them": "Attention",
}
_FLOAT_REASONS = {op: reason for reason, ops in _OPERATORS_BY_REASON.items() for op in ops.split()}
_OTHER = "not an operator that this target runs on integers"


def place(model: ir.Model, recipe: Recipe, target: Target, leave: Mapping[str, str] | None = None) -> Placement:
    """Decides which edges to quantize; `leave` maps node names to reasons for leaving them in float.

    The model must be in the form that `qonnx.passes.prepare` makes: unique node names, shapes inferred where possible.
    """
    settings = settings_of(model.graph, recipe, leave)
    if recipe.format is Format.WEIGHT_ONLY:
        layers = find_weights(model.graph, settings, target)
    else:
        layers = find_layers(model.graph, recipe, target, settings)
    activations: dict[str, set[Edge]] = {}
    weights: dict[StoredWeight, set[Edge]] = {}
    for layer in layers:
        for operand in layer.operands if not layer.reason else ():
            if operand.channel_axis is None:
                activations.setdefault(operand.value, set()).add(operand.edge)
            else:
                stored = StoredWeight(operand.value, operand.channel_axis, operand.block_axis, layer.settings.weights)
                weights.setdefault(stored, set()).add(operand.edge)
    ties = _Ties()
    quantized = {layer.node for layer in layers if not layer.reason}
    moved: set[str] = set()
    if recipe.format.calibrated:
        moved = _surround(model.graph, quantized, activations, ties, recipe, target)
    counts = Counter(node.op_type for node in model.graph if node.name not in quantized | moved)
    for layer in layers:
        if layer.reason:
            counts[layer.op] -= 1
    return Placement(
        layers=layers,
        activations={value: tuple(sorted(edges)) for value, edges in activations.items()},
        weights={key: tuple(sorted(edges)) for key, edges in weights.items()},
        ties={value: ties.find(value) for value in activations},
        probabilities=frozenset(
            value.name
            for node in model.graph
            for value in node.outputs
            if value.name in activations and is_probability(value)
        ),
        float_operators={
            op: (count, _FLOAT_REASONS.get(op, _OTHER)) for op, count in sorted(counts.items()) if count > 0
        },
    )


def edges_of(graph: ir.Graph, layers: Collection[str], recipe: Recipe, target: Target) -> set[Edge]:
    """The edges to quantize where these layers are, and no others.

    Args:
        graph: the main graph.
        layers: their node names; tables are none.
        recipe: its format, and what it says of results and residuals; its rules do not count.
        target: the consumer of the quantized graph.
    """
    activations: dict[str, set[Edge]] = {}
    weights: set[Edge] = set()
    for node in graph:
        for operand in operands_of(node, target) if node.name in layers else ():
            edges = weights if operand.channel_axis is not None else activations.setdefault(operand.value, set())
            edges.add(operand.edge)
    if recipe.format.calibrated:
        _surround(graph, set(layers), activations, _Ties(), recipe, target)
    return weights.union(*activations.values())


def candidates(placement: Placement) -> tuple[str, ...]:
    """Every activation that any recipe could want to quantize: what calibration observes."""
    names = dict.fromkeys(placement.activations)
    for layer in placement.layers:
        names.update(dict.fromkeys(operand.value for operand in layer.operands if operand.channel_axis is None))
    return tuple(names)


def _keep_projections_whole(graph: ir.Graph, quantized: set[str], activations: dict[str, set[Edge]]) -> None:
    """Rounds the values of each attention in float that are one part of what a quantized projection makes.

    The compiler would cut the weight of such a projection into queries, keys and values, and multiply by each part in
    float. Where one of the parts is rounded first, it does not. An error in the values is averaged by the
    probabilities, so they bear it best.
    """
    for node in graph:
        index = values_index(node) if node.op_type == "MatMul" and node.name not in quantized else None
        if index is None:
            continue
        reader, position = cut_edge(node, index)
        value = reader.inputs[position]
        made_by = projection(value)
        if (
            (reader, position) != (node, index)
            and value is not None
            and made_by is not None
            and made_by.name in quantized
        ):
            activations.setdefault((value.name if value else None) or "", set()).add(Edge(reader.name or "", position))


class _Ties:
    """Values that must share one scale (union-find)."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, value: str) -> str:
        while (parent := self._parent.get(value, value)) != value:
            value = parent
        return value

    def tie(self, first: str, second: str) -> None:
        self._parent[self.find(second)] = self.find(first)


def _surround(
    graph: ir.Graph,
    quantized: set[str],
    activations: dict[str, set[Edge]],
    ties: _Ties,
    recipe: Recipe,
    target: Target,
) -> set[str]:
    """Adds every edge that is no operand of a quantized layer; returns the nodes that are put on integers by that."""
    if is_gpu(target):
        _keep_projections_whole(graph, quantized, activations)
    if recipe.product_outputs:
        add_product_outputs(graph, quantized, activations, ties.tie)
    if recipe.residuals:
        add_residuals(graph, quantized, activations)
    return _extend(graph, quantized, activations, ties, target)


def _extend(
    graph: ir.Graph, quantized: set[str], activations: dict[str, set[Edge]], ties: _Ties, target: Target
) -> set[str]:
    """Adds edges around quantized layers, so that what lies between them stays on integers; returns the nodes added."""
    added: set[str] = set()
    if target.quantize_outputs:
        _quantize_outputs(graph, quantized, activations)
    for node in reversed(list(graph)):
        if not node.outputs or node.domain not in ("", "ai.onnx"):
            continue
        output = node.outputs[0]
        if node.op_type == "MaxPool" and _is_only_read_quantized(output, activations) and not _has_indices(node):
            _tie_inputs(node, node.inputs[:1], activations, ties)
            added.add(node.name or "")
        elif node.op_type == "Concat" and _is_only_read_quantized(output, activations) and _is_feature_map(output):
            _tie_inputs(node, node.inputs, activations, ties)
            added.add(node.name or "")
        elif node.op_type == "Add":
            skip = _skip_input(node, quantized)
            if skip is not None:
                value = node.inputs[skip]
                activations.setdefault((value.name if value else None) or "", set()).add(Edge(node.name or "", skip))
    return added


def written_edges(node: ir.Node) -> tuple[str, tuple[Edge, ...]]:
    """What a convolution on integers writes, after its activation function, and all edges that read that.

    For a target with `quantize_outputs` these are quantized together with the convolution; none where others read it,
    too: the caller, or a graph inside a node.
    """
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) == 1 and uses[0].node.op_type in ACTIVATION_FUNCTIONS:
        output = uses[0].node.outputs[0]
    if output.is_graph_output() or any(usage.node.graph is not node.graph for usage in output.uses()):
        return "", ()
    return output.name or "", tuple(Edge(usage.node.name or "", usage.idx) for usage in output.uses())


def _quantize_outputs(graph: ir.Graph, quantized: set[str], activations: dict[str, set[Edge]]) -> None:
    """Quantizes what each quantized convolution writes, for all of its readers."""
    for node in graph:
        if node.name in quantized and node.op_type in CONVOLUTIONS:
            value, edges = written_edges(node)
            if edges and value:
                activations.setdefault(value, set()).update(edges)


def _tie_inputs(
    node: ir.Node, inputs: Sequence[ir.Value | None], activations: dict[str, set[Edge]], ties: _Ties
) -> None:
    """Gives every input of a node that only moves integers the scale of its output."""
    output = node.outputs[0].name or ""
    for index, value in enumerate(inputs):
        if value is not None and value.name and not value.is_initializer():
            activations.setdefault(value.name, set()).add(Edge(node.name or "", index))
            ties.tie(output, value.name)


def _is_only_read_quantized(value: ir.Value, activations: Mapping[str, set[Edge]]) -> bool:
    """Whether nobody would notice that the value was made of rounded ones: whoever reads it reads it rounded."""
    edges = activations.get(value.name or "", set())
    return (
        bool(edges)
        and not value.is_graph_output()
        and all(Edge(usage.node.name or "", usage.idx) in edges for usage in value.uses())
    )


def _has_indices(pool: ir.Node) -> bool:
    """Whether the pool says where it found the largest elements: rounded, several are the largest."""
    return any(output.uses() or output.is_graph_output() for output in pool.outputs[1:])


def _is_feature_map(value: ir.Value) -> bool:
    return (rank(value) or 0) >= 3 and is_float(value)


def _skip_input(node: ir.Node, quantized: set[str]) -> int | None:
    """Which input of an Add is the skip connection of a quantized convolution, or None.

    The convolution, its Add and the quantization behind it become one kernel only when the other summand is on
    integers too. The convolution's own output is left alone: it is added before it is ever rounded.
    """
    if len(node.inputs) != 2 or rank(node.outputs[0]) not in (None, 4, 5):
        return None
    fused = [
        index
        for index, value in enumerate(node.inputs)
        if value is not None
        and (producer := value.producer()) is not None
        and producer.name in quantized
        and producer.op_type in CONVOLUTIONS
        and len(value.uses()) == 1
        and not value.is_graph_output()
    ]
    if not fused:
        return None
    skip = 1 - fused[-1]
    value = node.inputs[skip]
    if value is None or value.is_initializer() or not is_float(value) or (rank(value) or 0) < 4:
        return None
    return skip
