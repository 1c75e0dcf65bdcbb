"""Writes a QuantPlan into a graph as QuantizeLinear and DequantizeLinear nodes.

    activation x  ->  DequantizeLinear(QuantizeLinear(x, scale, zero_point), scale, zero_point), one pair a tensor,
                      read by the edges that the plan names; every other reader keeps x
    weight W      ->  DequantizeLinear(codes of W, scale, zero_point); the float weight goes when nobody reads it

    bias b        ->  b + shift, still in float

Codes are computed when the file is written, one weight after the other. Zero points are always written, even when they
are 0: without one QuantizeLinear means uint8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.errors import RecipeError
from qonnx.graph import Names, constant, float32
from qonnx.numerics import Blocked, PerAxis, PerTensor, quantize, scale_shape
from qonnx.placement import Edge
from qonnx.plan import BiasPlan, QuantPlan, TensorPlan


@dataclass(frozen=True)
class InsertQDQ(ir.passes.InPlacePass):
    """See the module docstring. A graph that already holds the plan's nodes no longer has the plan's edges."""

    plan: QuantPlan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inserts the nodes.

        Raises:
            RecipeError: the plan names a node, value or edge that the graph does not have.
        """
        graph, names = model.graph, Names(model)
        nodes = {node.name: node for node in graph if node.name}
        for tensor in (*self.plan.activations, *self.plan.weights):
            check_tensor(nodes, tensor)
        for tensor in self.plan.weights:
            _insert_weight(graph, names, nodes, tensor)
        for tensor in self.plan.activations:
            _insert_activation(graph, names, nodes, tensor)
        for bias in self.plan.biases:
            _shift_bias(graph, names, nodes, bias)
        return ir.passes.PassResult(model, bool(self.plan.activations or self.plan.weights))


def check_tensor(nodes: dict[str, ir.Node], tensor: TensorPlan) -> None:
    """Plans are edited by hand: what does not make sense is refused before anything is written.

    Args:
        nodes: of the model, by name.
        tensor: with scales; one whose range is found at run time has none.

    Raises:
        RecipeError: the tensor names an edge or axis that there is not, or its numbers do not fit.
    """
    where = f"plan: tensor {tensor.value!r}"
    if not tensor.edges:
        raise RecipeError(f"{where} has no edges: name the inputs that read it, or drop it")
    for edge in tensor.edges:
        _check_edge(nodes, edge, tensor.value)
    read = nodes[tensor.edges[0].node].inputs[tensor.edges[0].input]
    count = int(isinstance(tensor.granularity, PerTensor))  # 0 where it is not known
    if not isinstance(tensor.granularity, PerTensor) and read is not None and read.shape is not None:
        sizes, axis = tuple(size if isinstance(size, int) else 0 for size in read.shape), tensor.granularity.axis
        if not -len(sizes) <= axis < len(sizes):
            raise RecipeError(f"{where} has {len(sizes)} axes, so none of number {axis}")
        count = math.prod(scale_shape(sizes, tensor.granularity))
    if not tensor.scale or (count and len(tensor.scale) != count):
        raise RecipeError(f"{where} has {len(tensor.scale)} scales; its granularity needs {count or 'at least one'}")
    if not all(math.isfinite(scale) and scale > 0 for scale in tensor.scale):
        raise RecipeError(f"{where} has a scale that is not positive and finite")
    if tensor.zero_point and len(tensor.zero_point) != len(tensor.scale):
        raise RecipeError(f"{where} has {len(tensor.zero_point)} zero points for {len(tensor.scale)} scales")
    if not all(tensor.dtype.minimum <= zero <= tensor.dtype.maximum for zero in tensor.zero_point):
        raise RecipeError(f"{where} has a zero point that {tensor.dtype} cannot hold")


def _check_edge(nodes: dict[str, ir.Node], edge: Edge, value: str) -> None:
    node = nodes.get(edge.node)
    if node is None:
        raise RecipeError(f"plan: the model has no node {edge.node!r}; make the plan again for this model")
    read = node.inputs[edge.input] if 0 <= edge.input < len(node.inputs) else None
    if read is None or read.name != value:
        found = "nothing" if read is None else repr(read.name)
        raise RecipeError(
            f"plan: input {edge.input} of node {edge.node!r} is {found}, not {value!r}; make the plan again"
        )


def _insert_weight(graph: ir.Graph, names: Names, nodes: dict[str, ir.Node], tensor: TensorPlan) -> None:
    weight = graph.initializers.get(tensor.value)
    if weight is None or weight.const_value is None:
        raise RecipeError(f"plan: weight {tensor.value!r} is not an initializer of the model")
    codes = _initializer(graph, names, f"{tensor.value}_quantized", _codes(weight.const_value, tensor))
    dequantize = _dequantize(graph, names, tensor, codes, weight)
    graph.insert_before(graph[0], [dequantize])
    for edge in tensor.edges:
        nodes[edge.node].replace_input_with(edge.input, dequantize.outputs[0])
    if not weight.uses() and not weight.is_graph_output():
        del graph.initializers[tensor.value]


def _codes(weight: ir.TensorProtocol, tensor: TensorPlan) -> ir.LazyTensor:
    scale, zero_point = parameters(tensor, tuple(weight.shape.numpy()))

    def evaluate() -> ir.TensorProtocol:
        codes = quantize(float32(weight.numpy()), scale, zero_point, tensor.dtype, tensor.granularity)
        return ir.Tensor(codes, dtype=tensor.dtype.onnx)

    return ir.LazyTensor(evaluate, dtype=tensor.dtype.onnx, shape=ir.Shape(weight.shape.numpy()), name=tensor.value)


def _insert_activation(graph: ir.Graph, names: Names, nodes: dict[str, ir.Node], tensor: TensorPlan) -> None:
    first = nodes[tensor.edges[0].node]
    value = first.inputs[tensor.edges[0].input]
    if value is None or value.name is None:
        raise RecipeError(f"plan: node {first.name!r} reads nothing at input {tensor.edges[0].input}")
    stem = value.name
    scale, zero_point = _constants(graph, names, tensor, value)
    quantize_node = ir.node(
        "QuantizeLinear",
        [value, scale, zero_point],
        attributes=_attributes(tensor),
        name=names.fresh(f"{stem}_QuantizeLinear"),
        outputs=[_value(names, f"{stem}_quantized", tensor.dtype.onnx, value.shape)],
        metadata_props=_provenance(tensor),
    )
    dequantize = ir.node(
        "DequantizeLinear",
        [quantize_node.outputs[0], scale, zero_point],
        attributes=_attributes(tensor),
        name=names.fresh(f"{stem}_DequantizeLinear"),
        outputs=[_value(names, f"{stem}_dequantized", value.dtype, value.shape)],
        metadata_props=_provenance(tensor),
    )
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], [quantize_node, dequantize])
    else:
        graph.insert_after(producer, [quantize_node, dequantize])
    for edge in tensor.edges:
        nodes[edge.node].replace_input_with(edge.input, dequantize.outputs[0])


def _shift_bias(graph: ir.Graph, names: Names, nodes: dict[str, ir.Node], plan: BiasPlan) -> None:
    node = nodes.get(plan.edge.node)
    if node is None:
        raise RecipeError(f"plan: the model has no node {plan.edge.node!r}; make the plan again for this model")
    index = plan.edge.input
    bias = node.inputs[index] if index < len(node.inputs) else None
    shift = np.array(plan.shift, np.float32)
    if bias is None:
        dtype, stem = node.outputs[0].dtype or ir.DataType.FLOAT, f"{node.name}_bias"
        corrected = shift
        node.resize_inputs(max(len(node.inputs), index + 1))
    else:
        stored = constant(bias)
        if stored is None or (stored.ndim and stored.shape[-1] not in (1, shift.size)):
            raise RecipeError(f"plan: input {index} of node {node.name!r} is no bias of {shift.size} channels")
        dtype, stem = bias.dtype or ir.DataType.FLOAT, bias.name or f"{node.name}_bias"
        corrected = float32(stored) + shift
    tensor = ir.Tensor(corrected.astype(dtype.numpy()), dtype=dtype)
    node.replace_input_with(index, _initializer(graph, names, f"{stem}_corrected", tensor))
    if bias is not None and bias.is_initializer() and not bias.uses() and not bias.is_graph_output() and bias.name:
        del graph.initializers[bias.name]


def _dequantize(graph: ir.Graph, names: Names, tensor: TensorPlan, codes: ir.Value, like: ir.Value) -> ir.Node:
    scale, zero_point = _constants(graph, names, tensor, like)
    return ir.node(
        "DequantizeLinear",
        [codes, scale, zero_point],
        attributes=_attributes(tensor),
        name=names.fresh(f"{tensor.value}_DequantizeLinear"),
        outputs=[_value(names, f"{tensor.value}_dequantized", like.dtype, like.shape)],
        metadata_props=_provenance(tensor),
    )


def _constants(graph: ir.Graph, names: Names, tensor: TensorPlan, like: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Scale (in the type that the graph computes in) and zero point as initializers."""
    shape = () if like.shape is None or not like.shape.is_static() else tuple(like.shape.numpy())
    scale, zero_point = parameters(tensor, shape)
    dtype = like.dtype or ir.DataType.FLOAT
    return (
        _initializer(graph, names, f"{tensor.value}_scale", ir.Tensor(scale.astype(dtype.numpy()), dtype=dtype)),
        _initializer(graph, names, f"{tensor.value}_zero_point", ir.Tensor(zero_point, dtype=tensor.dtype.onnx)),
    )


def parameters(tensor: TensorPlan, shape: tuple[int, ...]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Scale and zero point in the shape that the operators want for the granularity."""
    match tensor.granularity:
        case PerTensor():
            parameter_shape: tuple[int, ...] = ()
        case PerAxis():
            parameter_shape = (len(tensor.scale),)
        case Blocked(axis=axis, block_size=block_size):
            blocks = list(shape)
            blocks[axis] = -(-shape[axis] // block_size)
            parameter_shape = tuple(blocks)
    scale = np.array(tensor.scale, np.float32).reshape(parameter_shape)
    zero_point = np.array(tensor.zero_point or (0,) * scale.size).astype(tensor.dtype.numpy)
    return scale, zero_point.reshape(parameter_shape)


def _attributes(tensor: TensorPlan) -> dict[str, int]:
    match tensor.granularity:
        case PerTensor():
            return {}
        case PerAxis(axis=axis):
            return {"axis": axis}
        case Blocked(axis=axis, block_size=block_size):
            return {"axis": axis, "block_size": block_size}


def _provenance(tensor: TensorPlan) -> dict[str, str]:
    """What Netron shows about the node."""
    props = {"qonnx.pass": "InsertQDQ", "qonnx.range_from": tensor.source}
    if tensor.sqnr_db is not None:
        props |= {"qonnx.range": f"{tensor.low:.6g} .. {tensor.high:.6g}", "qonnx.sqnr_db": f"{tensor.sqnr_db:.1f}"}
    return props


def _initializer(graph: ir.Graph, names: Names, stem: str, tensor: ir.TensorProtocol) -> ir.Value:
    name = names.fresh(stem)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _value(names: Names, stem: str, dtype: ir.DataType | None, shape: ir.Shape | None) -> ir.Value:
    return ir.Value(name=names.fresh(stem), type=None if dtype is None else ir.TensorType(dtype), shape=shape)
