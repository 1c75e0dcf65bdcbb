"""Raises the version of the ONNX operator set that a model declares, and rewrites its nodes accordingly.

Up to opset 18 this is onnx's own converter, which works on serialized models: the graph is replaced by a converted
copy, to which weights and metadata are then attached again. Above 18 it is onnxscript's, which works in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from qonnx.errors import ModelError
from qonnx.graph import all_graphs, first_line
from qonnx.skeleton import restore, skeleton

# The first opset that onnxscript's converter accepts, and the last.
_IN_PLACE_FROM = 18
_NEWEST = 25

# What onnx's converter silently gets wrong when it crosses an opset: Hardmax no longer flattens its input from 13 on,
# Scan has no batch axis from 9 on, and the slopes of PRelu broadcast from the last axis from 7 on.
_WRONG_BELOW = {"Hardmax": 13, "Scan": 9, "PRelu": 7}

# Opset 18 came with version 8 of the file format; a lower number would not fit the nodes.
_IR_VERSION = 8


@dataclass(frozen=True)
class RaiseOpset(ir.passes.InPlacePass):
    """Raises the opset of the default domain to `version`; a model that has it already is left alone.

    Functions must be inlined before, and node names unique.

    Attributes:
        version: the opset to reach, 25 at most.
    """

    version: int

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Converts the model.

        Raises:
            ModelError: the model uses something that cannot be converted. The model is unchanged, unless the opsets
                below and above 18 are both concerned.
        """
        current = opset(model)
        if current >= self.version:
            return ir.passes.PassResult(model, False)
        _check_convertible(model, current, self.version)
        try:
            if current < _IN_PLACE_FROM:
                _convert_copy(model, min(self.version, _IN_PLACE_FROM))
            if self.version > _IN_PLACE_FROM:
                from onnxscript.version_converter import ConvertVersionPass

                ConvertVersionPass(self.version)(model)
        except Exception as error:  # both converters raise several types
            raise ModelError(_complaint(current, self.version, first_line(error))) from error
        model.ir_version = max(model.ir_version, _IR_VERSION)
        return ir.passes.PassResult(model, True)


def opset(model: ir.Model) -> int:
    """The version of the default domain; of a model that uses only other domains, the newest one."""
    imports = model.opset_imports
    return imports.get("", imports.get("ai.onnx", _NEWEST))


def _complaint(current: int, version: int, reason: str) -> str:
    return (
        f"opset {current} cannot be raised to {version}: {reason}; export the model at opset {version} or above instead"
    )


def _check_convertible(model: ir.Model, current: int, version: int) -> None:
    if version > _NEWEST:
        raise ModelError(f"opset {version} is not known: {_NEWEST} is the newest")
    if model.functions:
        raise ModelError(_complaint(current, version, "the model has functions that could not be inlined"))
    for graph in all_graphs(model):
        for node in graph:
            below = _WRONG_BELOW.get(node.op_type, 0) if node.domain == "" else 0
            if current < below <= version:
                raise ModelError(_complaint(current, version, f"node {node.name!r} is a {node.op_type}"))


def _convert_copy(model: ir.Model, version: int) -> None:
    """Replaces the graph by a converted copy with the same weights and metadata."""
    proto, left_out = skeleton(model)
    converted = ir.from_proto(onnx.version_converter.convert_version(proto, version))
    restore(converted, left_out)
    _copy_metadata(model, converted)
    model.graph = converted.graph


def _copy_metadata(source: ir.Model, destination: ir.Model) -> None:
    """Metadata of nodes and values, which onnx's converter drops, by name."""
    nodes = {node.name: node for graph in all_graphs(source) for node in graph}
    values = {value.name: value for graph in all_graphs(source) for node in graph for value in node.outputs}
    weights = {value.name: value for value in _initializers(source)}
    destination.graph.metadata_props.update(source.graph.metadata_props)
    for graph in all_graphs(destination):
        for node in graph:
            if node.name in nodes:
                node.metadata_props.update(nodes[node.name].metadata_props)
            for value in node.outputs:
                if value.name in values:
                    value.metadata_props.update(values[value.name].metadata_props)
    for value in _initializers(destination):
        if value.name in weights:
            value.metadata_props.update(weights[value.name].metadata_props)


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in all_graphs(model):
        if isinstance(graph, ir.Graph):
            yield from graph.initializers.values()
