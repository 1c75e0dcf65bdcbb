"""Which edges of a graph are quantized, and why every other operator stays in float.

This file decides from the graph alone; `qonnx.plan` adds the numbers. To quantize one more operator, add it here:

* an operator that multiplies (so that integer arithmetic pays) goes into `_layers`;
* an operator that only moves or compares integers (pooling, concatenation) goes into `_extend`;
* what stays in float says why in `_OPERATORS_BY_REASON`.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import onnx_ir as ir

from qonnx.graph import dtype_name, is_float, module_path, rank
from qonnx.linear import Linear, linear_of
from qonnx.recipe import Recipe
from qonnx.targets import Target


class Edge(msgspec.Struct, frozen=True, order=True):
    """One input of one node."""

    node: str
    input: int


@dataclass(frozen=True)
class Operand:
    """One input of a layer that must be on integers for the layer to run on integers.

    Attributes:
        edge: where the value is read; for a weight, where the stored initializer is read.
        value: the name of the value.
        channel_axis: of a weight as stored, the axis of output channels; None for an activation.
    """

    edge: Edge
    value: str
    channel_axis: int | None = None


@dataclass(frozen=True)
class Layer:
    """A matrix product or convolution.

    Attributes:
        node: its node name.
        op: its operator.
        path: the path of the module that made it, or "".
        operands: what must be quantized for it to run on integers; empty when that is impossible.
        output: the name of its result, bias included.
        reason: why it stays in float, or "" when it is quantized.
    """

    node: str
    op: str
    path: str
    operands: tuple[Operand, ...]
    output: str
    reason: str


@dataclass(frozen=True)
class Placement:
    """The edges to quantize.

    Attributes:
        layers: every matrix product and convolution, quantized or not, in graph order.
        activations: value name -> the edges of that value to quantize.
        weights: (initializer name, channel axis) -> the edges of that initializer to quantize.
        ties: value name -> the name that stands for all values that must share one scale with it.
        probabilities: values that are outputs of a Softmax: their range is known to be 0 to 1.
        float_operators: operator -> (how many stay in float, why).
    """

    layers: tuple[Layer, ...]
    activations: Mapping[str, tuple[Edge, ...]]
    weights: Mapping[tuple[str, int], tuple[Edge, ...]]
    ties: Mapping[str, str]
    probabilities: frozenset[str]
    float_operators: Mapping[str, tuple[int, str]]


_OPERATORS_BY_REASON: Mapping[str, str] = {
    "moves or describes data: nothing to compute": """
        Cast CastLike Concat Constant ConstantOfShape DepthToSpace Dropout Expand Flatten Gather GatherElements GatherND
        Identity NonZero Pad Range Reshape ScatterElements ScatterND Shape Size Slice SpaceToDepth Split Squeeze Tile
        Transpose Unsqueeze""",
    "element by element: bound by memory, and rounding its inputs only loses accuracy": """
        Abs Add And Ceil Clip Div Equal Floor Greater GreaterOrEqual IsNaN LeakyRelu Less LessOrEqual Max Min Mod Mul
        Neg Not Or PRelu Pow Reciprocal Relu Round Sign Sqrt Sub Sum Where Xor""",
    "normalisation statistics need float": """
        BatchNormalization GroupNormalization InstanceNormalization LRN LayerNormalization LpNormalization
        MeanVarianceNormalization RMSNormalization ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
        ReduceSumSquare SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization""",
    "not linear: integers would need a table, and its input is usually widely spread": """
        Cos Elu Erf Exp Gelu HardSigmoid HardSwish Log LogSoftmax Mish Selu Sigmoid Sin Softmax Softplus Swish Tanh""",
    "recurrent: errors add up over the steps": "GRU LSTM RNN",
    "control flow: its body is left in float": "If Loop Scan SequenceMap",
    "averages need more bits than their inputs have": "AveragePool GlobalAveragePool GlobalMaxPool LpPool",
    "its output feeds no quantized operator": "MaxPool",
    "interpolation weights are not integers": "GridSample Resize RoiAlign Upsample",
    "post-processing": "ArgMax ArgMin CumSum NonMaxSuppression TopK Unique",
    "its two products are inside one operator: export at opset 22 or lower to quantize them": "Attention",
}
_FLOAT_REASONS = {op: reason for reason, ops in _OPERATORS_BY_REASON.items() for op in ops.split()}
_OTHER = "not an operator that this target runs on integers"

# Through these a value keeps its elements, so that what is known of its range stays true.
_KEEPS_VALUES = frozenset({"Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Dropout", "Cast"})
_SCORES_TO_SOFTMAX = _KEEPS_VALUES | {"Mul", "Div", "Add", "Sub", "Where", "Softmax", "Expand", "Clip", "Max", "Min"}
_ACTIVATION_FUNCTIONS = frozenset({"Relu", "Clip", "LeakyRelu"})

# Smaller products gain nothing on integer tensor cores, whose tiles are 16 wide.
_MINIMUM_WIDTH = 16


def place(model: ir.Model, recipe: Recipe, target: Target, leave: Mapping[str, str] | None = None) -> Placement:
    """Decides which edges to quantize; `leave` maps node names to reasons for leaving them in float.

    The model must be in the form that `qonnx.passes.prepare` makes: unique node names, shapes inferred where possible.
    """
    reasons = {**_ruled_out(model.graph, recipe), **(leave or {})}
    layers = _whole_attention(model.graph, tuple(_layers(model.graph, recipe, reasons)))
    activations: dict[str, set[Edge]] = {}
    weights: dict[tuple[str, int], set[Edge]] = {}
    for layer in layers:
        for operand in layer.operands if not layer.reason else ():
            if operand.channel_axis is None:
                activations.setdefault(operand.value, set()).add(operand.edge)
            else:
                weights.setdefault((operand.value, operand.channel_axis), set()).add(operand.edge)
    ties = _Ties()
    quantized = {layer.node for layer in layers if not layer.reason}
    moved = _extend(model.graph, quantized, activations, ties, target)
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
            if value.name in activations and _comes_from_softmax(value)
        ),
        float_operators={
            op: (count, _FLOAT_REASONS.get(op, _OTHER)) for op, count in sorted(counts.items()) if count > 0
        },
    )


def candidates(placement: Placement) -> tuple[str, ...]:
    """Every activation that any recipe could want to quantize: what calibration observes."""
    names = dict.fromkeys(placement.activations)
    for layer in placement.layers:
        names.update(dict.fromkeys(operand.value for operand in layer.operands if operand.channel_axis is None))
    return tuple(names)


def _ruled_out(graph: ir.Graph, recipe: Recipe) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for node in graph:
        for number, rule in enumerate(recipe.rules, start=1):
            match, name = rule.match, node.name or ""
            if (
                fnmatch.fnmatchcase(node.op_type, match.op)
                and fnmatch.fnmatchcase(module_path(node), match.path)
                and fnmatch.fnmatchcase(name, match.name)
            ):
                reasons[name] = f"rule {number} of the recipe" if rule.skip else ""
    return {name: reason for name, reason in reasons.items() if reason}


def _layers(graph: ir.Graph, recipe: Recipe, reasons: Mapping[str, str]) -> Iterator[Layer]:
    for node in graph:
        if node.domain not in ("", "ai.onnx"):
            continue
        linear = linear_of(node)
        if linear is not None:
            operands = _linear_operands(linear)
            reason = reasons.get(node.name or "") or _too_small(linear) or _not_float(linear.data)
            yield _layer(node, operands, linear.output, reason)
        elif node.op_type == "MatMul":
            yield _product(node, recipe, reasons)
        elif node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            yield _layer(node, (), node.outputs[0], "its weight is not a constant")


def _product(node: ir.Node, recipe: Recipe, reasons: Mapping[str, str]) -> Layer:
    """A MatMul of two activations."""
    reason = reasons.get(node.name or "", "")
    if not reason and not (_comes_from_softmax(node.inputs[0]) or _goes_to_softmax(node.outputs[0])):
        reason = "product of two activations outside attention"
    if not reason and not recipe.attention:
        reason = "the recipe leaves attention products in float"
    if not reason:
        reason = _not_float(node.inputs[0]) or _not_float(node.inputs[1]) or _narrow_product(node)
    operands = tuple(
        Operand(Edge(node.name or "", index), value.name or "")
        for index, value in enumerate(node.inputs)
        if value is not None and not value.is_initializer()
    )
    if len(operands) < 2:
        return _layer(node, (), node.outputs[0], reason or "its weight is not readable as one constant matrix")
    return _layer(node, operands, node.outputs[0], reason)


def _whole_attention(graph: ir.Graph, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Quantizes both products of an attention or neither.

    The compiler makes one kernel of queries by keys, Softmax and probabilities by values. With one product on integers
    it falls apart into several, which are slower than the float kernel.
    """
    products = {layer.node: layer for layer in layers if len(layer.operands) == 2 and layer.op == "MatMul"}
    nodes = {node.name: node for node in graph if node.name in products}
    reasons: dict[str, str] = {}
    for name, node in nodes.items():
        for partner in _softmax_readers(node):
            if partner in products:
                for one, other in ((name, partner), (partner, name)):
                    if products[one].reason and not products[other].reason:
                        reasons[other] = f"the other product of its attention, {one}, stays in float"
    return tuple(replace(layer, reason=reasons.get(layer.node, layer.reason)) for layer in layers)


def _softmax_readers(node: ir.Node) -> set[str]:
    """The MatMuls that read the Softmax of a MatMul's result."""
    found: set[str] = set()
    pending = [(node.outputs[0], False)]
    seen: set[ir.Value] = set()
    while pending:
        value, is_probability = pending.pop()
        for usage in value.uses():
            reader = usage.node
            if not reader.outputs or reader.outputs[0] in seen:
                continue
            if is_probability and reader.op_type == "MatMul" and reader.name:
                found.add(reader.name)
            elif reader.op_type in (_KEEPS_VALUES if is_probability else _SCORES_TO_SOFTMAX):
                seen.add(reader.outputs[0])
                pending.append((reader.outputs[0], is_probability or reader.op_type == "Softmax"))
    return found


def _layer(node: ir.Node, operands: tuple[Operand, ...], output: ir.Value, reason: str) -> Layer:
    return Layer(node.name or "", node.op_type, module_path(node), operands, output.name or "", reason)


def _linear_operands(linear: Linear) -> tuple[Operand, ...]:
    reader, index = linear.weight_reader
    return (
        Operand(Edge(linear.node.name or "", linear.data_index), linear.data.name or ""),
        Operand(Edge(reader.name or "", index), linear.weight.name or "", linear.output_axis),
    )


def _not_float(value: ir.Value | None) -> str:
    return "" if value is None or value.dtype is None or is_float(value) else f"computes in {dtype_name(value)}"


def _narrow_product(node: ir.Node) -> str:
    left, right = node.inputs[0], node.inputs[1]
    width = _static(left, -1) or _static(right, -2)
    if width is not None and width < _MINIMUM_WIDTH:
        return f"sums over {width} elements only: nothing gained below {_MINIMUM_WIDTH}"
    return ""


def _too_small(linear: Linear) -> str:
    """Products too thin for integer tensor cores, where integers lose accuracy and gain no time."""
    inputs, outputs = linear.input_channels, linear.output_channels
    if linear.node.op_type in ("Gemm", "MatMul"):
        thin = min(inputs, outputs)
        return f"{inputs} x {outputs} weight: nothing gained below {_MINIMUM_WIDTH}" if thin < _MINIMUM_WIDTH else ""
    if _is_one_pixel(linear.data):
        return "reads one pixel per channel: nothing gained from integers"
    if linear.groups > 1:
        if outputs % 8:
            return f"grouped with {outputs} outputs: not a multiple of 8"
        return ""
    from_input = linear.data.is_graph_input()
    if min(inputs, outputs) < _MINIMUM_WIDTH:
        wide = from_input or max(inputs, outputs) >= _MINIMUM_WIDTH
        if not wide or (inputs % 8 and outputs % 8):
            return f"{inputs} to {outputs} channels: nothing gained below {_MINIMUM_WIDTH}"
    return ""


def _is_one_pixel(value: ir.Value) -> bool:
    if value.shape is not None and len(value.shape) >= 3:
        sizes = list(value.shape)[2:]
        if all(isinstance(size, int) for size in sizes):
            return all(size == 1 for size in sizes)
    producer = value.producer()
    while producer is not None and producer.op_type in _ACTIVATION_FUNCTIONS | {"Conv", "Sigmoid", "HardSigmoid"}:
        if producer.op_type == "Conv" and any(size > 1 for size in producer.attributes.get_ints("kernel_shape", [2])):
            return False
        source = producer.inputs[0]
        producer = source.producer() if source is not None else None
    return producer is not None and producer.op_type in ("GlobalAveragePool", "GlobalMaxPool")


def _static(value: ir.Value | None, axis: int) -> int | None:
    if value is None or value.shape is None or len(value.shape) < -axis:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def _comes_from_softmax(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in _KEEPS_VALUES:
        source = producer.inputs[0]
        producer = source.producer() if source is not None else None
    return producer is not None and producer.op_type == "Softmax"


def _goes_to_softmax(value: ir.Value, depth: int = 6) -> bool:
    for usage in value.uses():
        if usage.node.op_type == "Softmax":
            return True
        if depth and usage.node.op_type in _SCORES_TO_SOFTMAX and _goes_to_softmax(usage.node.outputs[0], depth - 1):
            return True
    return False


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
        if node.op_type == "MaxPool" and output.name in activations:
            _tie_inputs(node, node.inputs[:1], activations, ties)
            added.add(node.name or "")
        elif node.op_type == "Concat" and output.name in activations and _is_feature_map(output):
            _tie_inputs(node, node.inputs, activations, ties)
            added.add(node.name or "")
        elif node.op_type == "Add":
            skip = _skip_input(node, quantized)
            if skip is not None:
                value = node.inputs[skip]
                activations.setdefault((value.name if value else None) or "", set()).add(Edge(node.name or "", skip))
    return added


def _quantize_outputs(graph: ir.Graph, quantized: set[str], activations: dict[str, set[Edge]]) -> None:
    """Quantizes what each quantized convolution writes, after its activation function, for all of its readers."""
    for node in graph:
        if node.name not in quantized or node.op_type not in ("Conv", "ConvTranspose"):
            continue
        output = node.outputs[0]
        uses = list(output.uses())
        if len(uses) == 1 and uses[0].node.op_type in _ACTIVATION_FUNCTIONS:
            output = uses[0].node.outputs[0]
        if output.is_graph_output() or any(usage.node.graph is not graph for usage in output.uses()):
            continue
        edges = {Edge(usage.node.name or "", usage.idx) for usage in output.uses()}
        if edges and output.name:
            activations.setdefault(output.name, set()).update(edges)


def _tie_inputs(
    node: ir.Node, inputs: Sequence[ir.Value | None], activations: dict[str, set[Edge]], ties: _Ties
) -> None:
    """Gives every input of a node that only moves integers the scale of its output."""
    output = node.outputs[0].name or ""
    for index, value in enumerate(inputs):
        if value is not None and value.name and not value.is_initializer():
            activations.setdefault(value.name, set()).add(Edge(node.name or "", index))
            ties.tie(output, value.name)


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
        and producer.op_type in ("Conv", "ConvTranspose")
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
