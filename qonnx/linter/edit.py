"""How repairs change a graph: new initializers under fresh names, and nothing left behind that nobody reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import onnx_ir as ir

from qonnx.graph import Names
from qonnx.linter.view import Array, Quantizer


class Outcome(NamedTuple):
    """What a repair did.

    Attributes:
        description: for people.
        exact: whether the graph computes the same as before, within float rounding.
    """

    description: str
    exact: bool


class Editor:
    """A model that is being repaired."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.names = Names(model)

    def initializer(self, stem: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A new constant of the main graph, which subgraphs see too."""
        name = self.names.fresh(stem)
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def array(self, stem: str, array: Array) -> ir.Value:
        """A new constant from an array."""
        return self.initializer(stem, ir.tensor(array))

    def lazy(self, stem: str, shape: ir.Shape, dtype: ir.DataType, make: Callable[[], Array]) -> ir.Value:
        """A new constant that is computed when the model is saved or run."""
        tensor = ir.LazyTensor(lambda: ir.Tensor(make(), dtype=dtype), dtype=dtype, shape=shape, name=stem)
        return self.initializer(stem, tensor)

    def set_input(self, node: ir.Node, index: int, value: ir.Value) -> None:
        """Makes a node read another value."""
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        before = node.inputs[index]
        node.replace_input_with(index, value)
        self.drop(before)

    def replace(self, value: ir.Value, by: ir.Value) -> None:
        """Makes all readers of a value read another one; the caller has checked that it is no graph output."""
        value.replace_all_uses_with(by)
        self.drop(value)

    def drop(self, value: ir.Value | None) -> None:
        """Removes what computes a value, and what only that needed, if nobody reads the value."""
        if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
            return
        producer = value.producer()
        if producer is None:
            if value.is_initializer() and value.name and value.graph is not None:
                del value.graph.initializers[value.name]
        elif producer.graph is not None and not any(out.uses() or out.is_graph_output() for out in producer.outputs):
            inputs = tuple(producer.inputs)
            producer.graph.remove(producer, safe=True)
            for source in inputs:
                self.drop(source)


Repairer: TypeAlias = Callable[[Editor, ir.Node], Outcome | None]


def stem_of(quantizer: Quantizer) -> str:
    """What the names of new values begin with."""
    return quantizer.codes.name or "codes"


def stored(value: ir.Value) -> ir.TensorProtocol:
    """The tensor behind a constant; the caller has checked that it is one."""
    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None
    return tensor
