"""Turns the layers of a QuantPlan whose activations are measured at run time into integer operators."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import onnx_ir as ir

from qonnx.errors import RecipeError, TargetError
from qonnx.graph import Names
from qonnx.passes.allow_types import AllowTypes, need_onnxruntime
from qonnx.passes.gather_codes import GatherCodes
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.passes.integer_products import Integers, NoIntegerFormError, integers_of, product
from qonnx.passes.writer import Writer, take_over
from qonnx.placement import Edge
from qonnx.plan import QuantPlan, TensorPlan

Measure = Callable[[Writer, ir.Value, TensorPlan], Integers]


def insert_on_integers(model: ir.Model, plan: QuantPlan, origin: str, measure: Measure, opset: int) -> bool:
    """Writes the plan: static tensors as Q/DQ pairs, layers with dynamic ones as integer operators.

    Args:
        model: is changed.
        plan: activations without a scale are the dynamic ones.
        origin: the name of the pass.
        measure: writes the nodes that quantize one tensor, in float32, at run time.
        opset: what those nodes need.

    Returns:
        Whether anything was written.

    Raises:
        RecipeError: the plan names a node, value or edge that the graph does not have.
        TargetError: a layer has no integer form, or the target no integer operators.
    """
    dynamic = tuple(tensor for tensor in plan.activations if not tensor.scale and tensor.edges)
    static = tuple(tensor for tensor in plan.activations if tensor.scale)
    need_onnxruntime(plan, "MatMulInteger and ConvInteger")
    rest = msgspec.structs.replace(plan, activations=static)
    AllowTypes(rest, opset if dynamic else 1)(model)
    modified = InsertQDQ(rest)(model).modified
    GatherCodes()(model)
    names = Names(model)
    nodes = {node.name: node for node in model.graph if node.name}
    measured: dict[Edge, Integers] = {}
    for tensor in dynamic:
        value, first = _value(nodes, tensor)
        write = Writer(names, first, origin, stem=tensor.value)
        if value.dtype not in (None, ir.DataType.FLOAT):
            value = write.add("Cast", [value], ir.DataType.FLOAT, value.shape, {"to": ir.DataType.FLOAT})
        integers = measure(write, value, tensor)
        measured.update(dict.fromkeys(tensor.edges, integers))
    for name, node in nodes.items():
        edges = [Edge(name, index) for index in (0, 1)]
        if not measured.keys().isdisjoint(edges):
            _convert(Writer(names, node, origin), [measured.get(edge) for edge in edges])
    return modified or bool(dynamic)


def _value(nodes: dict[str, ir.Node], tensor: TensorPlan) -> tuple[ir.Value, ir.Node]:
    """The value that is quantized, and the first node in graph order that reads it so."""
    for edge in tensor.edges:
        node = nodes.get(edge.node)
        read = node.inputs[edge.input] if node is not None and edge.input < len(node.inputs) else None
        if read is None or read.name != tensor.value:
            raise RecipeError(
                f"plan: input {edge.input} of node {edge.node!r} is not {tensor.value!r}; make the plan again"
            )
    readers = {edge.node: edge.input for edge in tensor.edges}
    first = next(node for node in nodes.values() if node.name in readers)
    value = first.inputs[readers[first.name or ""]]
    assert value is not None
    return value, first


def _convert(write: Writer, operands: list[Integers | None]) -> None:
    node = write.node
    found = [operand or integers_of(value) for operand, value in zip(operands, node.inputs, strict=False)]
    try:
        if len(found) < 2 or found[0] is None or found[1] is None:
            raise NoIntegerFormError("its other operand is not on integers of 8 bits or fewer, one scale a channel")
        result = product(write, found[0], found[1])
    except NoIntegerFormError as error:
        raise TargetError(
            f"node {node.name!r} ({node.op_type}) cannot run on integers: {error}; leave it in float, or use format qdq"
        ) from error
    take_over(node.outputs[0], result)
