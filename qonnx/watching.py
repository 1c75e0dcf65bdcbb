"""A copy of a model that returns what is made of some of its values, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qonnx.graph import Names

Key = TypeVar("Key")
Make = Callable[[ir.Graph, Names, ir.Value], ir.Value]


def watching(model: ir.Model, wanted: Mapping[Key, tuple[str, Make]]) -> tuple[ir.Model, dict[Key, str]]:
    """The copy, and the name of the output that stands for each key. Nodes that lead to no output are not run.

    Args:
        model: it is left as it is.
        wanted: by key, the name of a value of the main graph, and what appends nodes that make the output of it.
    """
    copy = model.clone()
    graph, names = copy.graph, Names(copy)
    values = {value.name: value for value in graph.inputs}
    values.update({value.name: value for node in graph for value in node.outputs})
    graph.outputs.clear()
    outputs = {}
    for key, (name, make) in wanted.items():
        output = make(graph, names, values[name])
        graph.outputs.append(output)
        outputs[key] = output.name or ""
    RemoveUnusedNodesPass()(copy)
    return copy, outputs
