"""New initializers in the place of old ones: a stored tensor is never changed, others may read it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.graph import Names


def store(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Registers a tensor under a name that is new."""
    tensor.name = name
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def replace(node: ir.Node, index: int, tensor: ir.TensorProtocol, names: Names, change: str = "rescaled") -> None:
    """Makes a node read a new initializer, named after the old one; that one goes when nothing else reads it."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    old = node.inputs[index] if index < len(node.inputs) else None
    stem = f"{old.name}_{change}" if old is not None else f"{node.name or node.op_type}_bias"
    value = store(graph, names.fresh(stem), tensor)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
    if old is not None:
        value.metadata_props.update(old.metadata_props)
        if old.is_initializer() and not old.uses() and not old.is_graph_output() and not old.is_graph_input():
            del graph.initializers[old.name or ""]


def as_tensor(array: npt.ArrayLike, dtype: ir.DataType) -> ir.TensorProtocol:
    """An array in a float type."""
    return ir.Tensor(np.asarray(array).astype(dtype.numpy()), dtype=dtype)


def dtype_of(value: ir.Value | None) -> ir.DataType:
    """The type of a value; float32 where nothing says."""
    return ir.DataType.FLOAT if value is None or value.dtype is None else value.dtype
