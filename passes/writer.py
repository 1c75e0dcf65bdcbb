"""Adds nodes in front of a node that they will stand for, and takes away what nobody reads any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from qonnx.graph import Names

MICROSOFT = "com.microsoft"


class Writer:
    """Adds nodes in front of `node`. Their names extend its name; their metadata are its own and the pass's name.

    Attributes:
        node: where to write.
        graph: the graph of that node.
        names: of the whole model.
        origin: the pass that writes, for `metadata_props`.
        stem: what names begin with; the name of the node by default.
    """

    def __init__(self, names: Names, node: ir.Node, origin: str, stem: str = "") -> None:
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        self.node, self.graph, self.names, self.origin = node, graph, names, origin
        self.stem = stem or node.name or node.op_type

    def add(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType | None,
        shape: ir.Shape | None = None,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """One node with one result; inputs that are None are left out."""
        return self.add_many(op, inputs, (dtype,), (shape,), attributes, domain)[0]

    def add_many(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        dtypes: Sequence[ir.DataType | None],
        shapes: Sequence[ir.Shape | None],
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> list[ir.Value]:
        """One node with as many results as there are types."""
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        name = self.names.fresh(f"{self.stem}_{op}")
        outputs = [
            ir.Value(
                name=self.names.fresh(f"{name}_output"),
                type=None if dtype is None else ir.TensorType(dtype),
                shape=None if shape is None else shape.copy(),
            )
            for dtype, shape in zip(dtypes, shapes, strict=True)
        ]
        node = ir.node(
            op,
            given,
            attributes=attributes,
            domain=domain,
            outputs=outputs,
            name=name,
            metadata_props={**self.node.metadata_props, "qonnx.pass": self.origin},
        )
        self.graph.insert_before(self.node, node)
        return outputs

    def constant(self, tensor: npt.NDArray[Any] | ir.TensorProtocol, stem: str) -> ir.Value:
        """A new initializer."""
        if not isinstance(tensor, ir.TensorProtocol):
            tensor = ir.Tensor(tensor)
        value = ir.Value(
            name=self.names.fresh(stem),
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Gives the readers and the name of `old` to `new`, and removes what is left without a reader."""
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if new.shape is None and old.shape is not None:
        new.shape = old.shape.copy()
    old.name, new.name = None, old.name
    discard(old)


def discard(value: ir.Value | None) -> None:
    """Removes a value that nobody reads, the node or initializer behind it, and what only that read."""
    if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    node = value.producer()
    if node is None:
        if value.is_initializer() and value.graph is not None and value.name:
            del value.graph.initializers[value.name]
        return
    if node.graph is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    inputs = list(node.inputs)
    node.graph.remove(node, safe=True)
    for operand in inputs:
        discard(operand)
