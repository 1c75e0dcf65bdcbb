"""Casts small integers before they are moved, not after.

    Transpose(uint8) -> Cast  ->  Cast(uint8) -> Transpose

Cameras give uint8 in NHWC order. TensorRT takes an input of uint8 that is cast, and has no other operator that reads
uint8: such a network could be quantized, but no engine could be built of it. On a CPU it costs time, as more bytes are
moved then, or cast that are cut off.

Only when

* the data are uint8, and the operator does nothing but move them;
* everything that reads its result is a Cast to one type that runtimes move as well, and neither is an output of the
  graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qonnx.graph import Names

_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT32, ir.DataType.INT64})
_MOVES = frozenset({"Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class CastFirst(ir.passes.InPlacePass):
    """See the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Moves every such Cast of the main graph as far up as it goes."""
        names, modified = Names(model), False
        for node in reversed(list(model.graph)):  # what is moved past one node may be moved past the one before
            casts = _casts(node)
            if casts:
                _move(node, casts, names)
                modified = True
        return ir.passes.PassResult(model, modified)


def _casts(node: ir.Node) -> list[ir.Node]:
    """All that reads the result of a node, if that can be done before."""
    if node.op_type not in _MOVES or node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
        return []
    result, readers = node.outputs[0], [use.node for use in node.outputs[0].uses()]
    known = ir.DataType.UINT8 in (node.inputs[0].dtype, result.dtype)
    casts = all(reader.op_type == "Cast" and reader.graph is node.graph for reader in readers)
    types = {reader.attributes.get_int("to", 0) for reader in readers}
    if not known or not casts or len(types) != 1 or not types <= _TYPES:
        return []
    outputs = [result, *(reader.outputs[0] for reader in readers)]
    return [] if any(value.is_graph_output() for value in outputs) else readers


def _move(node: ir.Node, casts: list[ir.Node], names: Names) -> None:
    source, graph, result = node.inputs[0], node.graph, node.outputs[0]
    assert source is not None
    assert graph is not None
    first, dtype = casts[0], ir.DataType(casts[0].attributes.get_int("to"))
    early = ir.node(
        "Cast",
        [source],
        attributes=dict(first.attributes),
        name=names.fresh(first.name or "Cast"),
        metadata_props=dict(first.metadata_props),
    )
    early.outputs[0].name = names.fresh(f"{source.name}_cast")
    early.outputs[0].shape = None if source.shape is None else source.shape.copy()
    early.outputs[0].type = ir.TensorType(dtype)
    graph.insert_before(node, early)
    node.replace_input_with(0, early.outputs[0])
    result.type = ir.TensorType(dtype)
    for cast in casts:
        ir.convenience.replace_all_uses_with(cast.outputs[0], result)
        graph.remove(cast, safe=True)
