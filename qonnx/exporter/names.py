"""Simplifies what torch's exporter writes, and gives every weight, node and value a name that tells where it is from.

The simplification is the exporter's own, except that parameters are never merged. `torch.onnx.export(optimize=True)`
merges equal initializers of up to 1,024 elements, so that two LayerNorms with default weights come out sharing one
tensor, under the name of the first.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common

from qonnx.graph import Names, all_graphs, module_path

SCOPES = "pkg.torch.onnx.name_scopes"
CLASSES = "pkg.torch.onnx.class_hierarchy"
RULE = "pkg.onnxscript.rewriter.rule_name"
FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"

# Constants of up to this many elements (axes, shapes, scalars) are kept once.
MERGED_ELEMENTS = 1024


def simplify(model: ir.Model, parameters: frozenset[str]) -> None:
    """Inlines functions, folds constants, applies onnxscript's default rewrites, merges equal nodes and constants.

    Args:
        model: changed in place.
        parameters: the names of initializers that stay apart even where they are equal.
    """
    from onnxscript import optimizer, rewriter

    optimizer.inline(model)
    for _ in range(2):  # a fold can make a rewrite possible, and a rewrite a fold
        optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        rewriter.rewrite(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    _merge_constants(model.graph, parameters)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)


def _merge_constants(graph: ir.Graph, parameters: frozenset[str]) -> None:
    kept: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    for value in tuple(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.size > MERGED_ELEMENTS or tensor.dtype == ir.DataType.STRING:
            continue
        if value.is_graph_output() or _origins(value, parameters):
            continue
        first = kept.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()), value)
        if first is not value:
            value.replace_all_uses_with(first)
            del graph.initializers[str(value.name)]


def name_everything(
    model: ir.Model, parameters: frozenset[str], *, inputs: Sequence[str], outputs: Sequence[str]
) -> None:
    """Names the graph's inputs and outputs as given, and all else after the modules and parameters it comes from.

    Nodes keep their module's path and classes as metadata; stack traces and other remains of the export go.

    Args:
        model: changed in place.
        parameters: the names of the module's parameters and buffers.
        inputs: a name for each graph input.
        outputs: a name for each graph output; `_out` is added to one that is also an input's.
    """
    _name_weights(model, parameters)
    _name_nodes(model, parameters)
    _name_ends(model, inputs, outputs)
    model.graph.metadata_props.clear()
    for graph in all_graphs(model):
        for value in _values(graph):
            folded = value.metadata_props.get(FOLDED_FROM)
            value.metadata_props.clear()
            if folded and _origins_in(folded) & parameters:
                value.metadata_props[FOLDED_FROM] = repr(sorted(_origins_in(folded) & parameters))


def _values(graph: ir.Graph | ir.Function) -> Iterator[ir.Value]:
    yield from graph.inputs
    if isinstance(graph, ir.Graph):
        yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _origins_in(folded: str) -> frozenset[str]:
    return frozenset(str(name) for name in ast.literal_eval(folded))


def _origins(value: ir.Value, parameters: frozenset[str]) -> list[str]:
    """The parameters that an initializer is, or was computed from when constants were folded."""
    if value.name in parameters:
        return [str(value.name)]
    folded = value.metadata_props.get(FOLDED_FROM)
    return sorted(_origins_in(folded) & parameters) if folded else []


def _name_weights(model: ir.Model, parameters: frozenset[str]) -> None:
    names = Names(model)
    for value in tuple(model.graph.initializers.values()):
        # the rewrite that folds a BatchNorm into a Conv without a bias makes one of this name
        weight = str(value.name).removesuffix("_bias")
        if weight != value.name and weight in parameters:
            value.name = names.fresh(f"{weight.rpartition('.')[0]}.bias".lstrip("."))
        origins = _origins(value, parameters)
        if value.name in parameters or not origins:
            continue
        # of several, what they have in common: a weight norm's two parts lie in `...parametrizations.weight`
        paths = [origin.split(".") for origin in origins]
        shared = [part for part, *others in zip(*paths, strict=False) if all(part == other for other in others)]
        if not shared:
            continue
        stem = ".".join(shared)
        name = names.fresh(stem)
        # taken: a tied weight that is also read as it is
        value.name = name if name == stem else names.fresh(f"{stem}_folded")


def _name_nodes(model: ir.Model, parameters: frozenset[str]) -> None:
    names = Names(model)
    for graph in all_graphs(model):
        for node in graph:
            path = _module(node, parameters)
            classes = node.metadata_props.get(CLASSES)
            rule = node.metadata_props.get(RULE)
            node.metadata_props.clear()
            node.metadata_props[SCOPES] = repr(["", path, node.op_type] if path else ["", node.op_type])
            if classes:
                node.metadata_props[CLASSES] = classes
            if rule:
                node.metadata_props[RULE] = rule
            node.name = names.fresh(f"{path}/{node.op_type}" if path else node.op_type)
            for index, value in enumerate(node.outputs):
                if value.name:
                    value.name = names.fresh(f"{node.name}_output_{index}")


def _module(node: ir.Node, parameters: frozenset[str]) -> str:
    """The path of a node's module. A rewritten node carries its last part's: a Conv, that of its BatchNorm."""
    if RULE in node.metadata_props:
        for value in node.inputs:
            if value is not None and value.name in parameters:
                return str(value.name).rpartition(".")[0]
    path = module_path(node)
    return "" if path.startswith("_empty_nn_module_stack") else path


def _name_ends(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    graph = model.graph
    outputs = [f"{name}_out" if name in inputs else name for name in outputs]
    chosen = {**dict(zip(graph.inputs, inputs, strict=True)), **dict(zip(graph.outputs, outputs, strict=True))}
    names = Names(model)
    for part in all_graphs(model):
        for value in tuple(_values(part)):  # a new name moves an initializer to the end
            if value not in chosen and value.name in chosen.values():
                value.name = names.fresh(f"{value.name}_value")
    for value, name in chosen.items():
        value.name = name
