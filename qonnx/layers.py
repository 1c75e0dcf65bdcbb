"""The matrix products and convolutions of a graph, what each needs on integers, and why some stay in float."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import msgspec
import onnx_ir as ir

from qonnx.attention import MOVES, cut_edge, result, value_products, values_index
from qonnx.graph import dtype_name, is_float, is_initializer, module_path, rank
from qonnx.linear import CONVOLUTIONS, LINEAR_OPS, Linear, linear_of
from qonnx.numerics import PerTensor
from qonnx.recipe import Format, PerChannel, Recipe
from qonnx.roles import is_table
from qonnx.rules import Settings
from qonnx.targets import Target

# They are applied where the convolution before them writes its result: its range is the one behind them.
ACTIVATION_FUNCTIONS = frozenset({"Relu", "Clip", "LeakyRelu"})

# Smaller products gain nothing on integer tensor cores, whose tiles are 16 wide.
_MINIMUM_WIDTH = 16

_ON_THE_WAY_TO_LOG = MOVES | {"Add", "Cast", "Clip", "Max", "Mul"}

# Convolutions to fewer channels make the last maps of a network, or decode them (boxes from distributions): they are
# sensitive and small.
_MINIMUM_OUTPUTS = 8

# The head sizes for which TensorRT has one kernel for a whole attention on INT8; on half precision, for any from 16 on.
_FUSED_HEAD_SIZES = frozenset({16, 32, 64})


class Edge(msgspec.Struct, frozen=True, order=True):
    """One input of one node."""

    node: str
    input: int


@dataclass(frozen=True)
class Operand:
    """A value that must be on integers for a layer to run on them: an input, or the result of an attention.

    Attributes:
        edge: where the value is read; for a weight, where the stored initializer is read.
        value: the name of the value.
        channel_axis: of a weight as stored, the axis of output channels; None for an activation.
        block_axis: of a weight as stored, the axis along which neighbours may share a scale: that which is summed over.
    """

    edge: Edge
    value: str
    channel_axis: int | None = None
    block_axis: int | None = None


@dataclass(frozen=True)
class Layer:
    """A matrix product or convolution, or a table that is quantized like their weights.

    Attributes:
        node: its node name.
        op: its operator.
        path: the path of the module that made it, or "".
        operands: what must be quantized for it to run on integers; empty when that is impossible.
        output: the name of its result, bias included.
        reason: why it stays in float, or "" when it is quantized.
        settings: how it is to be quantized.
    """

    node: str
    op: str
    path: str
    operands: tuple[Operand, ...]
    output: str
    reason: str
    settings: Settings


def find_layers(graph: ir.Graph, recipe: Recipe, target: Target, settings: Mapping[str, Settings]) -> tuple[Layer, ...]:
    """Every matrix product and convolution, in graph order; bodies of subgraphs are not entered.

    Args:
        graph: in the form that `qonnx.passes.prepare` makes.
        recipe: whether attention is wanted, and in which format.
        target: the consumer of the quantized graph.
        settings: of each node, by name.
    """
    return _whole_attention(graph, tuple(_layers(graph, recipe, target, settings)))


def operands_of(node: ir.Node, target: Target) -> tuple[Operand, ...]:
    """What must be quantized for a layer to run on integers, whether that pays or not; none where it is impossible."""
    linear = linear_of(node)
    if linear is not None:
        return _linear_operands(linear)
    return _product_operands(node, target) if node.op_type == "MatMul" else ()


def is_rounded(node: ir.Node, edges: Collection[Edge]) -> bool:
    """Whether a layer multiplies by a weight that is quantized, or two activations that both are.

    Args:
        node: the layer.
        edges: all that are quantized. What was cut from a larger tensor counts where it is cut and where it is
            multiplied: tools differ.
    """
    linear = linear_of(node)
    if linear is not None:
        reader, index = linear.weight_reader
        return Edge(reader.name or "", index) in edges
    if node.op_type not in LINEAR_OPS:
        return Edge(node.name or "", 0) in edges  # a table
    read = [{(node, index), cut_edge(node, index)} for index in (0, 1)]
    return all(any(Edge(reader.name or "", index) in edges for reader, index in each) for each in read)


def is_gpu(target: Target) -> bool:
    """Whether TensorRT will compile the graph."""
    return target.compute_capability is not None


def _layers(graph: ir.Graph, recipe: Recipe, target: Target, settings: Mapping[str, Settings]) -> Iterator[Layer]:
    for node in graph:
        chosen = settings[node.name or ""]
        if chosen.table and recipe.format is Format.QDQ and is_table(node):
            yield _layer(node, (table_operand(node),), node.outputs[0], chosen, chosen.reason)
        if node.domain not in ("", "ai.onnx") or node.op_type not in LINEAR_OPS:
            continue
        left = chosen.reason or _no_rows(node, recipe)
        linear = linear_of(node)
        unfit = _not_float(node.inputs[0]) or _not_float(node.inputs[1])
        constants = [value for value in node.inputs[:2] if _is_constant(value)]
        if unfit:
            yield _layer(node, (), node.outputs[0], chosen, left or unfit)
        elif linear is not None:
            chosen = _with_possible_scales(linear, chosen)
            yield _layer(node, _linear_operands(linear), linear.output, chosen, left or _no_gain(linear))
        elif node.op_type != "MatMul" or constants:
            weight = constants[-1] if constants else node.inputs[1]
            yield _layer(node, (), node.outputs[0], chosen, left or why_no_weight(weight))
        else:
            reason = left or _no_attention(node, recipe) or _no_gain_in_attention(node, target)
            yield _layer(node, _product_operands(node, target), node.outputs[0], chosen, reason)


def _no_attention(node: ir.Node, recipe: Recipe) -> str:
    """Why a product of two activations is none of the two products of an attention that the recipe wants quantized."""
    if values_index(node) is None and not value_products(node):
        return why_no_weight_among(node) or "product of two activations outside attention"
    return "" if recipe.attention else "the recipe leaves attention products in float"


def _no_gain_in_attention(node: ir.Node, target: Target) -> str:
    width = _static(node.inputs[0], -1) or _static(node.inputs[1], -2)
    if width is not None and width < _MINIMUM_WIDTH:
        return f"sums over {width} elements only: nothing gained below {_MINIMUM_WIDTH}"
    size, half = _head_size(node), node.outputs[0].dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    if is_gpu(target) and half and not _is_fused(node) and size is not None and size >= _MINIMUM_WIDTH:
        return f"with head size {size}, attention is one kernel in half precision and several on INT8"
    return ""


def _product_operands(node: ir.Node, target: Target) -> tuple[Operand, ...]:
    """The inputs of a product in attention, and of the second one in a fused kernel the result."""
    edges = [(node, 0), (node, 1)]
    if is_gpu(target):
        # Were the parts of one projection only rounded behind their Transpose, the compiler would make one product in
        # float out of each part.
        edges = [cut_edge(node, index) for index in (0, 1)]
        value = result(node)
        if values_index(node) is not None and _is_fused(node) and value is not None:
            edges += [(usage.node, usage.idx) for usage in value.uses() if usage.node.graph is node.graph]
    return tuple(
        Operand(Edge(reader.name or "", index), value.name or "")
        for reader, index in edges
        if (value := reader.inputs[index]) is not None
    )


def _whole_attention(graph: ir.Graph, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Quantizes both products of an attention or neither.

    The compiler makes one kernel of queries by keys, Softmax and probabilities by values. With one product on integers
    it falls apart into several, which are slower than the float kernel.
    """
    reasons = {
        layer.node: layer.reason
        for layer in layers
        if layer.op == "MatMul" and layer.operands and all(operand.channel_axis is None for operand in layer.operands)
    }
    nodes = {node.name or "": node for node in graph if node.name in reasons}
    partners: dict[str, set[str]] = {name: set() for name in nodes}
    for name, node in nodes.items():
        for other in value_products(node) & nodes.keys():
            partners[name].add(other)
            partners[other].add(name)
    pending = [name for name in nodes if reasons[name]]
    for name, node in nodes.items():
        if not reasons[name] and values_index(node) is not None and not partners[name]:
            reasons[name] = "its probabilities are no product of queries and keys: there is no attention to fuse"
    while pending:
        name = pending.pop()
        for other in sorted(partners[name]):
            if not reasons[other]:
                reasons[other] = "the other product of its attention stays in float"
                pending.append(other)
    return tuple(replace(layer, reason=reasons.get(layer.node, layer.reason)) for layer in layers)


def _head_size(node: ir.Node) -> int | None:
    """How many elements a query, key or value has in one head."""
    index = values_index(node)
    if index is None:
        return _static(node.inputs[0], -1) or _static(node.inputs[1], -2)
    return _static(node.inputs[index], -1 if index == 1 else -2)


def _is_fused(node: ir.Node) -> bool:
    size = _head_size(node)
    return size is None or size in _FUSED_HEAD_SIZES


def _layer(node: ir.Node, operands: tuple[Operand, ...], output: ir.Value, chosen: Settings, reason: str) -> Layer:
    return Layer(node.name or "", node.op_type, module_path(node), operands, output.name or "", reason, chosen)


def table_operand(node: ir.Node) -> Operand:
    """The table that a Gather looks rows up in: a row has one scale."""
    table = node.inputs[0]
    return Operand(Edge(node.name or "", 0), (table.name if table is not None else None) or "", 0, 1)


def _linear_operands(linear: Linear) -> tuple[Operand, ...]:
    reader, index = linear.weight_reader
    return (
        Operand(Edge(linear.node.name or "", linear.data_index), linear.data.name or ""),
        Operand(Edge(reader.name or "", index), linear.weight.name or "", linear.output_axis, linear.input_axis),
    )


def _not_float(value: ir.Value | None) -> str:
    return "" if value is None or value.dtype is None or is_float(value) else f"computes in {dtype_name(value)}"


def _is_constant(value: ir.Value | None, depth: int = 8) -> bool:
    """Whether the value is an initializer, or computed from nothing else."""
    producer = None if value is None else value.producer()
    if producer is None or not depth:
        return is_initializer(value)
    return all(read is None or _is_constant(read, depth - 1) for read in producer.inputs)


def why_no_weight(value: ir.Value | None) -> str:
    """Why the second operand of a product is no weight that could be stored in fewer bits."""
    if value is None or not _is_constant(value):
        return "its weight is not a constant"
    if not is_initializer(value):
        return "its weight is computed in the graph: store the result as an initializer to quantize it"
    return "its weight is a vector" if rank(value) == 1 else "its weight is not one matrix"


def why_no_weight_among(node: ir.Node) -> str:
    """Why neither operand of a product is a weight, where it only seems to multiply two activations; else ""."""
    if not any(_is_picked(value) for value in node.inputs[:2]):
        return ""
    return "its weight is looked up at run time in a stack, as those of experts: only single matrices are quantized"


def _is_picked(value: ir.Value | None) -> bool:
    """Whether matrices were looked up in a stored stack of them, and moved at most."""
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type in MOVES | {"Cast"}:
        source = producer.inputs[0]
        producer = None if source is None else source.producer()
    if producer is None or producer.op_type not in ("Gather", "GatherND"):
        return False
    stack = rank(producer.inputs[0]) or 0
    rows = producer.op_type == "Gather" and producer.attributes.get_int("axis", 0) % max(stack, 1) >= stack - 2
    return is_initializer(producer.inputs[0]) and stack > 2 and not rows


def _no_rows(node: ir.Node, recipe: Recipe) -> str:
    """Why no scales that differ from row to row can be found for what a node reads."""
    if recipe.format is not Format.PER_TOKEN:
        return ""
    if node.op_type in CONVOLUTIONS:
        return "a convolution sums over several positions: scales per token do not factor out (format dynamic has one)"
    ranks = [rank(value) for value in node.inputs[:2]]
    if None in ranks or ranks[1] == 1:
        return "the rank of what it reads is not known" if None in ranks else "multiplies by a vector"
    return ""


def _with_possible_scales(linear: Linear, chosen: Settings) -> Settings:
    """One scale a tensor where ONNX Runtime's integer kernels have none per channel: it loads these and fails to run.

    That is so for weights that come first, and for stacks of matrices.
    """
    stacked = (rank(linear.node.inputs[1]) or 0) > 2
    per_channel = isinstance(chosen.weights.granularity, PerChannel)
    if linear.node.op_type != "MatMul" or not per_channel or not (stacked or linear.weight_index == 0):
        return chosen
    return replace(chosen, weights=msgspec.structs.replace(chosen.weights, granularity=PerTensor()))


def _no_gain(linear: Linear) -> str:
    """Products that integer arithmetic makes less accurate and no faster."""
    inputs, outputs = linear.input_channels, linear.output_channels
    if linear.weight.shape is not None and 0 in linear.weight.shape:
        return "its weight is empty"
    if linear.node.op_type == "ConvTranspose":
        return "transposed convolutions run in float, or no faster on integers"
    if _feeds_log(linear.output):
        return "its result goes into a logarithm: there small values count as much as large ones"
    if linear.node.op_type in ("Gemm", "MatMul"):
        thin = min(inputs, outputs)
        return f"{inputs} x {outputs} weight: nothing gained below {_MINIMUM_WIDTH}" if thin < _MINIMUM_WIDTH else ""
    if _is_one_pixel(linear.data):
        return "reads one pixel per channel: nothing gained from integers"
    if linear.groups > 1:
        if outputs % 8:
            return f"grouped with {outputs} outputs: not a multiple of 8"
        return ""
    if outputs < _MINIMUM_OUTPUTS:
        return f"{inputs} to {outputs} channels: nothing gained below {_MINIMUM_OUTPUTS} outputs"
    from_input = linear.data.is_graph_input()
    if min(inputs, outputs) < _MINIMUM_WIDTH:
        wide = from_input or max(inputs, outputs) >= _MINIMUM_WIDTH
        if not wide or (inputs % 8 and outputs % 8):
            return f"{inputs} to {outputs} channels: nothing gained below {_MINIMUM_WIDTH}"
    return ""


def _feeds_log(value: ir.Value, reach: int = 4) -> bool:
    """Whether a Log reads the value, scaled, bounded or moved: as behind the filter bank of a spectrogram."""
    readers = [usage.node for usage in value.uses()]
    if any(reader.op_type == "Log" for reader in readers):
        return True
    readers = [reader for reader in readers if reader.op_type in _ON_THE_WAY_TO_LOG]
    return reach > 0 and any(_feeds_log(reader.outputs[0], reach - 1) for reader in readers)


def _is_one_pixel(value: ir.Value) -> bool:
    if value.shape is not None and len(value.shape) >= 3:
        sizes = list(value.shape)[2:]
        if all(isinstance(size, int) for size in sizes):
            return all(size == 1 for size in sizes)
    producer = value.producer()
    while producer is not None and producer.op_type in ACTIVATION_FUNCTIONS | {"Conv", "Sigmoid", "HardSigmoid"}:
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
