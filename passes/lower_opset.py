"""Declares an older opset for a quantized graph in which nothing needs the newer one.

From opset 21 on QuantizeLinear has an attribute `output_dtype`. ONNX Runtime 1.31 on x86 writes it where it moves Q/DQ
pairs past a Reshape or Transpose, and then turns int8 into uint8 without changing it: a graph with int8 activations
cannot be opened with the default options. At opset 20 the attribute does not exist, and all else is the same.

Only when

* every operator exists there with the same inputs, outputs and attributes, or is a QuantizeLinear, DequantizeLinear or
  Cast that uses none of the newer attributes: what has changed is then which types it takes;
* the graph holds none of these types.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from qonnx.graph import all_graphs
from qonnx.passes.raise_opset import opset

# Their meaning does not change where the newer attributes are left out.
_SAME_WITHOUT_ATTRIBUTES = frozenset({"Cast", "CastLike", "DequantizeLinear", "QuantizeLinear"})

_NEWER_TYPES = frozenset(
    kind
    for kind in ir.DataType
    if kind.name.startswith(("BFLOAT", "FLOAT4", "FLOAT6", "FLOAT8", "INT2", "INT4", "UINT2", "UINT4"))
)
_NOT_QUANTIZED_TO = frozenset({ir.DataType.INT16, ir.DataType.UINT16})


@dataclass(frozen=True)
class LowerOpset(ir.passes.InPlacePass):
    """See the module docstring.

    Attributes:
        version: the opset to declare.
    """

    version: int = 20

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the number, and nothing else."""
        current = opset(model)
        if current <= self.version or "" not in model.opset_imports or model.functions:
            return ir.passes.PassResult(model, False)
        nodes = [node for graph in all_graphs(model) for node in graph]
        if not all(self._is_older(node, current) for node in nodes) or set(_types(model)) & _NEWER_TYPES:
            return ir.passes.PassResult(model, False)
        model.opset_imports[""] = self.version
        for graph in all_graphs(model):
            if isinstance(graph, ir.Graph):
                graph.opset_imports.pop("", None)
                graph.opset_imports[""] = self.version
        for node in nodes:
            if node.domain == "":
                node.version = None
        return ir.passes.PassResult(model, True)

    def _is_older(self, node: ir.Node, current: int) -> bool:
        if node.domain != "":
            return True
        try:
            new = onnx.defs.get_schema(node.op_type, current, "")
            old = onnx.defs.get_schema(node.op_type, self.version, "")
        except onnx.defs.SchemaError:
            return False
        if node.op_type in _SAME_WITHOUT_ATTRIBUTES:
            quantized = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
            pairs = node.op_type in ("DequantizeLinear", "QuantizeLinear")
            return set(node.attributes) <= set(old.attributes) and not (pairs and quantized & _NOT_QUANTIZED_TO)
        return new.since_version == old.since_version or _signature(new) == _signature(old)


def _signature(schema: onnx.defs.OpSchema) -> tuple[object, ...]:
    attributes = {name: str(attribute.default_value) for name, attribute in schema.attributes.items()}
    return attributes, schema.min_input, schema.max_input, schema.min_output, schema.max_output


def _types(model: ir.Model) -> Iterator[ir.DataType]:
    """The element types of everything in the graph."""
    for graph in all_graphs(model):
        stored = graph.initializers.values() if isinstance(graph, ir.Graph) else ()
        values = [value for node in graph for value in node.outputs]
        for value in (*graph.inputs, *stored, *values):
            if value.dtype is not None:
                yield value.dtype
