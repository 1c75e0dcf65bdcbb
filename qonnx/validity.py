"""Whether a graph can be a model at all: what files are not that were cut, merged or edited.

Everything else relies on it, and would stop somewhere in the middle.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import TopologicalSortPass

from qonnx.errors import ModelError
from qonnx.graph import all_graphs, first_line, subgraphs


def sort(model: ir.Model, origin: str) -> None:
    """Puts the nodes of a model behind what they read, where they are not; in place.

    Args:
        model: any.
        origin: what to call it in errors.

    Raises:
        ModelError: nodes depend on each other in a cycle.
    """
    if _late(model) is None:
        return
    try:
        TopologicalSortPass()(model)
    except ValueError as error:
        raise ModelError(f"{origin}: its nodes depend on each other in a cycle; export it again") from error


def check_graph(model: ir.Model, origin: str) -> None:
    """Refuses what cannot be a model, as after a file was cut, merged or edited: every other part relies on it.

    Args:
        model: any.
        origin: what to call it in errors.

    Raises:
        ModelError: a node reads a value that nothing defines or that is made after it, has fewer inputs than its
            operator needs, or a name is no text; or nothing makes an output.
    """
    late = _late(model)
    if late is not None:
        raise ModelError(f"{origin}: {_called(late)} stands before what it reads: sort the graph")
    made = (*model.graph.inputs, *model.graph.initializers.values())
    lost = next((value for value in model.graph.outputs if value.producer() is None and value not in made), None)
    if lost is not None:
        raise ModelError(f"{origin}: nothing makes the output {lost.name!r}; export it again")
    for graph in all_graphs(model):
        for node in graph:
            values = [value for value in (*node.inputs, *node.outputs) if value is not None]
            where = f"{origin}: {_called(node)}"
            texts = (node.name, node.op_type, node.domain, *(value.name for value in values))
            if not all(isinstance(text or "", str) for text in texts):
                raise ModelError(f"{where}: a name is not text: the file is damaged; export it again")
            undefined = next((value for value in node.inputs if value is not None and not _is_defined(value)), None)
            if undefined is not None:
                raise ModelError(
                    f"{where} reads {undefined.name!r}, which no input, initializer or node defines; export it again"
                )
            least = _least_inputs(node.domain, node.op_type, model.opset_imports.get("", 0))
            if len(node.inputs) < least:
                raise ModelError(f"{where} needs {least} inputs and has {len(node.inputs)}; export it again")


def check_operators(model: ir.Model) -> None:
    """Refuses operators with inputs or attributes that the declared opset does not give them.

    Args:
        model: any. Operators that ONNX does not have are left to the runtimes.

    Raises:
        ModelError: a node is not valid ONNX.
    """
    import onnx.checker

    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = model.ir_version or onnx.IR_VERSION, dict(model.opset_imports)
    nodes = (node for graph in all_graphs(model) if isinstance(graph, ir.Graph) for node in graph)
    for node in nodes:  # not those of functions, which have opsets of their own
        # Bodies are checked by themselves, and tensors would be copied.
        if node.domain or node.op_type == "Constant" or any(True for _ in subgraphs(node)):
            continue
        try:
            onnx.checker.check_node(ir.to_proto(node), context)
        except onnx.checker.ValidationError as error:
            if "No Op registered" not in str(error):
                raise ModelError(
                    f"{_called(node)} is not valid in opset {model.opset_imports.get('', 0)} "
                    f"({first_line(error)}); export the model again"
                ) from error


def _late(model: ir.Model) -> ir.Node | None:
    """A node that stands before one whose result it or a body of it reads."""
    for graph in all_graphs(model):
        order = {node: number for number, node in enumerate(graph)}
        for node in graph:
            for value in _read(node):
                producer = None if value is None else value.producer()
                if producer in order and order[producer] >= order[node]:
                    return node
    return None


def _read(node: ir.Node) -> Iterator[ir.Value | None]:
    """What a node reads, and what the nodes in its bodies do."""
    yield from node.inputs
    for body in subgraphs(node):
        for inner in body:
            yield from _read(inner)


def _called(node: ir.Node) -> str:
    name = node.name or "node_of_" + next((value.name for value in node.outputs if value.name), "nothing")
    return f"node {name} ({node.op_type})"


def _is_defined(value: ir.Value) -> bool:
    return value.producer() is not None or value.graph is not None or value.const_value is not None


@functools.cache
def _least_inputs(domain: str, op_type: str, opset: int) -> int:
    """How many inputs a standard operator needs; 0 for others."""
    import onnx.defs

    if domain not in ("", "ai.onnx") or not opset:
        return 0
    try:
        return int(onnx.defs.get_schema(op_type, opset, "").min_input)
    except onnx.defs.SchemaError:
        return 0
