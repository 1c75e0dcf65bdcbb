"""A graph without its weights, for the C++ tools of onnx: they take serialized bytes, of which there can be 2 GB.

Every large tensor, be it an initializer or an attribute and in whichever subgraph, becomes a reference to a file that
does not exist. Those tools carry such references along and never open them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx
import onnx_ir as ir

from qonnx.graph import all_graphs

# Small tensors stay: shapes and axes are what the tools compute with.
KEPT_BYTES = 1024

_NOWHERE = "weights that were left out"


def skeleton(model: ir.Model) -> tuple[onnx.ModelProto, tuple[ir.TensorProtocol, ...]]:
    """Serializes a model without its large weights.

    Args:
        model: is not changed.

    Returns:
        The serialized model, and the tensors that were left out, in the order in which `restore` wants them.
    """
    copy = model.clone()
    left_out: list[ir.TensorProtocol] = []

    def stand_in(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if tensor.dtype == ir.DataType.STRING:
            return tensor
        if tensor.nbytes <= KEPT_BYTES:
            # The folder of an external file is not part of its serialized form.
            external = isinstance(tensor, ir.ExternalTensor)
            return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name) if external else tensor
        left_out.append(tensor)
        shape = ir.Shape(tensor.shape.numpy())
        number = len(left_out) - 1
        return ir.ExternalTensor(_NOWHERE, number, tensor.nbytes, tensor.dtype, shape=shape, name=tensor.name or "")

    for value in _initializers(copy):
        if value.const_value is not None:
            value.const_value = stand_in(value.const_value)
    for node, attribute in _tensor_attributes(copy):
        tensor = stand_in(attribute.as_tensor())
        node.attributes[attribute.name] = ir.Attr(attribute.name, ir.AttributeType.TENSOR, tensor)
    return ir.to_proto(copy), tuple(left_out)


def restore(model: ir.Model, left_out: Sequence[ir.TensorProtocol]) -> None:
    """Puts the tensors that `skeleton` left out back into what a tool made of its result."""
    for value in _initializers(model):
        if (number := _number(value.const_value)) is not None:
            value.const_value = left_out[number]
    for node, attribute in _tensor_attributes(model):
        if (number := _number(attribute.as_tensor())) is not None:
            node.attributes[attribute.name] = ir.Attr(attribute.name, ir.AttributeType.TENSOR, left_out[number])


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in all_graphs(model):
        if isinstance(graph, ir.Graph):
            yield from graph.initializers.values()


def _tensor_attributes(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Attr]]:
    for graph in all_graphs(model):
        for node in graph:
            for attribute in list(node.attributes.values()):
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield node, attribute


def _number(tensor: ir.TensorProtocol | None) -> int | None:
    """Which of the tensors that were left out this one stands for, or None."""
    if isinstance(tensor, ir.ExternalTensor) and tensor.location == _NOWHERE:
        return tensor.offset or 0
    return None
