"""Takes the Q/DQ nodes out of a graph again: the float graph, and the plan that puts the same nodes back.

    x -> QuantizeLinear -> DequantizeLinear -> reader      x -> reader, and the edge goes into the plan
    codes -> DequantizeLinear -> reader                    a float weight of the same values

What a plan cannot say stays in the graph, with a note: parameters that are computed, codes that other operators read or
move, a dequantized graph output.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qonnx.graph import FLOAT_REASON, Names, is_initializer
from qonnx.layers import Edge, Layer, is_rounded
from qonnx.linter.view import Quantizer, quantizer_of, same_parameters
from qonnx.numerics import Dtype, PerTensor, dequantize
from qonnx.passes.name_nodes import NameNodes
from qonnx.placement import place
from qonnx.plan import FloatOperators, LayerPlan, QuantPlan, TensorPlan
from qonnx.recipe import Format, Recipe
from qonnx.targets import target as find_target

# What InsertQDQ and other tools append to the name of a weight for its codes.
_SUFFIXES = ("_quantized", "_QuantizeLinear_Output")


@dataclass(frozen=True)
class ReadBack:
    """A graph without its Q/DQ nodes.

    Attributes:
        model: the float graph. Biases that were stored as int32 are float.
        plan: `qonnx.passes.insert_qdq.InsertQDQ` makes of it the graph that was read.
        notes: what was left in the graph, a line each.
    """

    model: ir.Model
    plan: QuantPlan
    notes: tuple[str, ...]


def read_back(model: ir.Model, *, target: str = "") -> ReadBack:
    """Reads a Q/DQ graph of any tool.

    Args:
        model: the quantized graph; it is not changed. Without Q/DQ nodes, the plan is empty.
        target: what the plan is to be for; as the file says, or else `a800`.

    Raises:
        TargetError: the target is unknown.
    """
    consumer = find_target(target or model.metadata_props.get("qonnx.target", "a800"))
    copy = model.clone()
    NameNodes()(copy)
    reader = _Reader(copy, Names(copy))
    for node in list(copy.graph):
        quantizer = quantizer_of(node)
        if quantizer is not None and not quantizer.quantizes:
            reader.take(quantizer)
    RemoveUnusedNodesPass()(copy)
    draft = place(copy, Recipe(), consumer)
    edges = {edge for tensor in (*reader.activations.values(), *reader.weights.values()) for edge in tensor.edges}
    plan = QuantPlan(
        target=consumer.name,
        recipe=_recipe_name(model),
        activations=tuple(reader.activations.values()),
        weights=tuple(reader.weights.values()),
        layers=tuple(_layer(copy.graph, layer, edges) for layer in draft.layers),
        float_operators=tuple(FloatOperators(op, *entry) for op, entry in draft.float_operators.items()),
        format=Format.QDQ if reader.activations or not reader.weights else Format.WEIGHT_ONLY,
    )
    return ReadBack(copy, plan, tuple(reader.notes))


def _layer(graph: ir.Graph, layer: Layer, edges: set[Edge]) -> LayerPlan:
    node = graph.node(layer.node)
    missing = "not quantized in this file" if edges else "nothing is quantized yet"
    # What the tool wrote down when it left the layer in float, before what its rules would say now.
    reason = node.metadata_props.get(FLOAT_REASON) or layer.reason or missing
    return LayerPlan(layer.node, layer.op, layer.output, layer.path, "" if is_rounded(node, edges) else reason)


def _recipe_name(model: ir.Model) -> str:
    """The recipe that the file says it was made with; some files hold all of it."""
    text = model.metadata_props.get("qonnx.recipe", "read back")
    try:
        return str(msgspec.json.decode(text, type=Recipe).name)
    except msgspec.DecodeError:
        return text


@dataclass(eq=False)
class _Reader:
    """Takes DequantizeLinear nodes out of a graph one after the other, in the order of the graph.

    Attributes:
        model: the graph.
        names: those in use.
        activations: plans by value and parameters.
        weights: the same for constants.
        notes: what stays.
    """

    model: ir.Model
    names: Names
    activations: dict[object, TensorPlan] = field(default_factory=dict)
    weights: dict[object, TensorPlan] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, dequantizer: Quantizer) -> None:
        """Replaces what the node writes by the float value, and adds its readers to the plan."""
        reason = _unreadable(dequantizer)
        if reason:
            self.notes.append(f"{dequantizer.node.name} stays: {reason}")
            return
        edges = tuple(
            sorted(
                Edge(usage.node.name or "", usage.idx)
                for usage in dequantizer.output.uses()
                if quantizer_of(usage.node) is None
            )
        )
        quantizer = quantizer_of(dequantizer.data.producer())
        value = quantizer.data if quantizer is not None else self._stored(dequantizer)
        ir.convenience.replace_all_uses_with(dequantizer.output, value)
        if dequantizer.dtype is ir.DataType.INT32 or not edges:
            return
        plans = self.weights if is_initializer(value) else self.activations
        tensor = _tensor(dequantizer, value, edges)
        key = msgspec.structs.replace(tensor, edges=())
        known = plans.get(key)
        if known is not None:  # some tools write one pair for each reader
            tensor = msgspec.structs.replace(tensor, edges=tuple(sorted({*known.edges, *edges})))
        plans[key] = tensor

    def _stored(self, dequantizer: Quantizer) -> ir.Value:
        """The constant as a float initializer, computed when it is read."""
        codes, dtype = dequantizer.data, dequantizer.output.dtype or dequantizer.scale.dtype or ir.DataType.FLOAT
        tensor = codes.const_value
        assert tensor is not None
        scale, zero_point, granularity = dequantizer.parameters
        stem = next((codes.name[: -len(end)] for end in _SUFFIXES if codes.name and codes.name.endswith(end)), None)
        name = self.names.fresh(stem or f"{codes.name}_float")

        def evaluate() -> ir.TensorProtocol:
            return ir.Tensor(
                np.asarray(dequantize(tensor.numpy(), scale, zero_point, granularity)).astype(dtype.numpy()),
                dtype=dtype,
            )

        lazy = ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=lazy)
        self.model.graph.register_initializer(value)
        return value


def _unreadable(dequantizer: Quantizer) -> str:
    """Why a plan cannot say what the node does, or ""."""
    quantizer = quantizer_of(dequantizer.data.producer())
    if dequantizer.scales is None or dequantizer.zero_points is None:
        return "its scale or zero point is computed"
    if dequantizer.output.is_graph_output():
        return "it writes an output of the graph"
    if quantizer is None:
        if not is_initializer(dequantizer.data):
            return "an operator writes its codes"
        integer32 = dequantizer.dtype is ir.DataType.INT32
        return "" if integer32 or _dtype(dequantizer) is not None else f"{dequantizer.dtype} is no type of a plan"
    if not quantizer.quantizes or not same_parameters(quantizer, dequantizer):
        return "it does not undo the node before it"
    if quantizer.output.is_graph_output() or any(quantizer_of(each.node) is None for each in quantizer.output.uses()):
        return "an operator reads the codes before it"
    return "" if _dtype(dequantizer) is not None else f"{dequantizer.dtype} is no type of a plan"


def _dtype(quantizer: Quantizer) -> Dtype | None:
    name = quantizer.dtype.name if quantizer.dtype is not None else ""
    return Dtype[name] if name in Dtype.__members__ else None


def _tensor(dequantizer: Quantizer, value: ir.Value, edges: tuple[Edge, ...]) -> TensorPlan:
    dtype = _dtype(dequantizer)
    assert dtype is not None  # `_unreadable` made sure
    scale, zero_point, granularity = dequantizer.parameters
    zeros = tuple(zero_point.astype(np.int64).reshape(-1).tolist()) if zero_point.any() else ()
    low = high = 0.0
    if isinstance(granularity, PerTensor) and not is_initializer(value):
        ends = (np.array([dtype.minimum, dtype.maximum]) - float(zero_point)) * float(scale)
        low, high = float(ends[0]), float(ends[1])
    props = dequantizer.node.metadata_props
    sqnr = props.get("qonnx.sqnr_db")
    return TensorPlan(
        value=value.name or "",
        edges=edges,
        dtype=dtype,
        granularity=granularity,
        scale=tuple(scale.astype(np.float32).reshape(-1).tolist()),
        zero_point=zeros,
        low=low,
        high=high,
        sqnr_db=None if sqnr is None else float(sqnr),
        source=props.get("qonnx.range_from", "read back"),
    )
