"""What a graph holds: operators, parameters, sizes, and for every layer the types that it stores and multiplies."""

from __future__ import annotations

import contextlib
import os
from collections import Counter

import msgspec
import onnx_ir as ir

from qonnx.errors import ModelError
from qonnx.graph import all_graphs, dtype_name, is_initializer, load, module_path, parameters
from qonnx.inspector.read_back import read_back
from qonnx.linter.view import dequantizer_of, is_mover, sizes_of
from qonnx.numerics import Blocked, Granularity, PerAxis, PerTensor
from qonnx.passes.infer_shapes import InferShapes
from qonnx.passes.name_nodes import NameNodes

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "FusedMatMul", "Einsum", "Attention"})
_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})

# Operators on integers: which inputs are the two operands, and what they are called.
_INTEGER_PRODUCTS = {
    "ConvInteger": (0, 1),
    "DynamicQuantizeLSTM": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "MatMulNBits": (0, 1),
    "QAttention": (0, 1),
    "QGemm": (0, 3),
    "QLinearConv": (0, 3),
    "QLinearMatMul": (0, 3),
}

# Of these, those that round what they read themselves.
_DYNAMIC = frozenset({"DynamicQuantizeLSTM", "DynamicQuantizeMatMul"})

# Types that are no quantization of anything.
_FLOATS = frozenset({"float", "float16", "bfloat16", "double", "unknown"})


class Port(msgspec.Struct, frozen=True):
    """An input or output of the graph; sizes that are not known are None."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


class LayerView(msgspec.Struct, frozen=True):
    """A matrix product, convolution, recurrent layer, or a table that is looked up in.

    Attributes:
        node: its name.
        op: its operator.
        path: the module that made it, or "".
        weight: shape of the constant operand; () where there is none.
        weights: how that is stored, such as `int8 per axis 0`, or `float`.
        activations: what the others are when they are multiplied, such as `int8 per tensor`.
        quantized: whether any operand is.
        reason: why not, as far as this tool would know; "" for a quantized layer.
    """

    node: str
    op: str
    path: str
    weight: tuple[int, ...]
    weights: str
    activations: str
    quantized: bool
    reason: str = ""


class Inspection(msgspec.Struct, frozen=True):
    """What `inspect` finds.

    Attributes:
        producer: the tool that wrote the file.
        ir_version: of the file format.
        opsets: version by domain; the standard domain is `ai.onnx`.
        inputs: of the graph.
        outputs: of the graph.
        operators: how often each occurs, bodies of control flow included.
        parameters: the number of elements of all weights.
        bytes: their size.
        bytes_by_type: the same by element type.
        layers: in the order of the graph.
        metadata: what the file says about itself.
        recipe: the name of the recipe that the file says it was made with.
        notes: what could not be read.
    """

    producer: str
    ir_version: int
    opsets: dict[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: dict[str, int]
    parameters: int
    bytes: int
    bytes_by_type: dict[str, int]
    layers: tuple[LayerView, ...]
    metadata: dict[str, str]
    recipe: str
    notes: tuple[str, ...]

    @property
    def quantized(self) -> bool:
        """Whether any layer is."""
        return any(layer.quantized for layer in self.layers)


def inspect(model: str | os.PathLike[str] | ir.Model, *, target: str = "a800") -> Inspection:
    """Looks at a float or quantized graph of any tool; large weights are not read.

    Args:
        model: a file, or the model itself, which is not changed.
        target: whose rules say why a layer is not quantized.

    Raises:
        ModelError: the file is missing, or is no model.
        TargetError: the target is unknown.
    """
    copy = model.clone() if isinstance(model, ir.Model) else load(model)
    NameNodes()(copy)
    with contextlib.suppress(ModelError):  # only types are missing then
        InferShapes()(copy)
    back = read_back(copy, target=target)
    reasons = {layer.node: layer.reason for layer in back.plan.float_layers}
    count, size = parameters(copy)
    by_type: Counter[str] = Counter()
    for value in copy.graph.initializers.values():
        if value.const_value is not None:
            by_type[value.const_value.dtype.name.lower()] += int(value.const_value.nbytes)
    return Inspection(
        producer=" ".join(filter(None, (copy.producer_name, copy.producer_version))),
        ir_version=copy.ir_version,
        opsets={domain or "ai.onnx": version for domain, version in copy.opset_imports.items()},
        inputs=tuple(_port(value) for value in copy.graph.inputs if not value.is_initializer()),
        outputs=tuple(_port(value) for value in copy.graph.outputs),
        operators=dict(Counter(node.op_type for graph in all_graphs(copy) for node in graph).most_common()),
        parameters=count,
        bytes=size,
        bytes_by_type=dict(by_type.most_common()),
        layers=tuple(view for node in copy.graph if (view := _layer(node, reasons)) is not None),
        metadata=dict(copy.metadata_props),
        recipe=back.plan.recipe,
        notes=back.notes,
    )


def _port(value: ir.Value) -> Port:
    shape = None
    if value.shape is not None:
        shape = tuple(size if isinstance(size, int) else size.value for size in value.shape)
    return Port(value.name or "", dtype_name(value), shape)


def _layer(node: ir.Node, reasons: dict[str, str]) -> LayerView | None:
    operands = _operands(node)
    if operands is None:
        return None
    weights = [value for value in operands if _is_constant(value)]
    others = [value for value in operands if not _is_constant(value)]
    stored = " and ".join(dict.fromkeys(_described(value) for value in weights))
    if node.op_type == "MatMulNBits":
        bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 0)
        stored = f"int{bits} in blocks of {block}"
    multiplied = " and ".join(dict.fromkeys(_described(value) for value in others))
    if node.op_type in _DYNAMIC:
        multiplied = "uint8 per tensor, scale found at run time"
    if node.op_type == "Gather":
        multiplied = ""
    quantized = any(kind and kind.split()[0] not in _FLOATS for kind in (stored, multiplied))
    if node.op_type == "Gather" and not quantized:
        return None  # a lookup like any other
    shapes = [sizes_of(_source(value)) for value in weights]
    shape = tuple(size or 0 for size in shapes[0]) if shapes and shapes[0] is not None else ()
    reason = "" if quantized else reasons.get(node.name or "", "")
    return LayerView(node.name or "", node.op_type, module_path(node), shape, stored, multiplied, quantized, reason)


def _operands(node: ir.Node) -> tuple[ir.Value, ...] | None:
    """What a layer multiplies; None for other operators."""
    if node.op_type in _INTEGER_PRODUCTS:
        indices: tuple[int, ...] = _INTEGER_PRODUCTS[node.op_type]
    elif node.op_type in _RECURRENT or (node.op_type == "Attention" and node.domain == ""):
        indices = (0, 1, 2)
    elif node.op_type in _PRODUCTS:
        indices = (0, 1)
    elif node.op_type == "Gather" and _is_constant(node.inputs[0]):
        indices = (0,)
    else:
        return None
    values = [node.inputs[index] for index in indices if index < len(node.inputs)]
    return tuple(value for value in values if value is not None)


def _source(value: ir.Value | None) -> ir.Value | None:
    """What a value is made of, seen through Q/DQ nodes and operators that move elements."""
    while value is not None:
        producer = value.producer()
        if producer is None or not (_moves(producer) or dequantizer_of(value) is not None or _quantizes(producer)):
            return value
        value = producer.inputs[0]
    return None


def _moves(node: ir.Node) -> bool:
    """Whether the elements are all those of the first input; a lookup takes some of them at run time."""
    return is_mover(node) and (node.op_type != "Gather" or all(is_initializer(value) for value in node.inputs))


def _quantizes(node: ir.Node) -> bool:
    return node.op_type == "QuantizeLinear"


def _is_constant(value: ir.Value | None) -> bool:
    source = _source(value)
    producer = source.producer() if source is not None else None
    return is_initializer(source) or (producer is not None and producer.op_type == "Constant")


def _described(value: ir.Value) -> str:
    """The type that a value has where it is multiplied, and which elements share a scale."""
    seen: ir.Value | None = value
    while seen is not None:
        dequantizer = dequantizer_of(seen)
        if dequantizer is not None:
            when = ", scale found at run time" if dequantizer.scales is None and dequantizer.weight is None else ""
            kind = "?" if dequantizer.dtype is None else dequantizer.dtype.name.lower()
            return f"{kind} {_granularity(dequantizer.granularity)}{when}"
        producer = seen.producer()
        if producer is None or not _moves(producer):
            return dtype_name(seen)
        seen = producer.inputs[0]
    return ""


def _granularity(granularity: Granularity) -> str:
    match granularity:
        case PerTensor():
            return "per tensor"
        case PerAxis(axis=axis):
            return f"per axis {axis}"
        case Blocked(axis=axis, block_size=block_size):
            return f"in blocks of {block_size} on axis {axis}"
