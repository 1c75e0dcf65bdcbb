"""Operators that ONNX Runtime does not have, such as the plugins of TensorRT.

What can be computed without them is quantized, measured and compared; they, and all that reads their results, are left
as they are. Outputs are then the values that this rest reads, besides the outputs that do not depend on it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from qonnx.errors import ModelError
from qonnx.graph import Names, subgraphs
from qonnx.linear import linear_of
from qonnx.passes.raise_opset import RaiseOpset, opset
from qonnx.text import count

# What domains of operators that no converter knows end in while a graph is converted.
_ASIDE = ".aside"


def runnable(model: ir.Model) -> ir.Model:
    """The part of a model that ONNX Runtime can compute; the same object where that is all of it.

    Args:
        model: any; it is not changed.

    Raises:
        ModelError: nothing can be computed.
    """
    if not _rest(model):
        return model
    part = _opened(model)
    _lift_constants(part)
    rest = _rest(part)
    made = {value for node in rest for value in node.outputs}
    kept = [value for value in part.graph.outputs if value not in made]
    read = [value for value in _read(rest) if value.producer() is not None and value not in kept]
    if not kept and not read:
        raise ModelError(
            f"{model.graph.name or 'model'}: everything needs the result of {', '.join(_custom(rest))}, which ONNX "
            "Runtime does not have: nothing can be measured"
        )
    part.graph.outputs.clear()
    part.graph.outputs.extend([*kept, *read])
    for node in _all_nodes(rest):
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    part.graph.remove(rest)
    for name, value in list(part.graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del part.graph.initializers[name]
    return part


def attach(part: ir.Model, whole: ir.Model) -> None:
    """Puts what `runnable` cut off behind a graph that computes the same values; its outputs are then the model's.

    Args:
        part: what was made of the runnable part; changed in place.
        whole: the model; it is not changed.

    Raises:
        ModelError: the rest cannot be brought to the opset of the part.
    """
    copy = _opened(whole)
    if any(node.domain == "" and _is_known("", node.op_type) for node in _all_nodes(_rest(copy))):
        _meet(part, copy)
    _lift_constants(copy)
    rest, outputs, names = _rest(copy), list(copy.graph.outputs), Names(part)
    copy.graph.outputs.clear()
    ours = {value.name: value for value in (*part.graph.inputs, *part.graph.outputs)}
    for value in _read(rest):
        twin = ours.get(value.name)
        if twin is None:  # a weight: that of the part may have been changed, or quantized
            twin = ir.Value(name=names.fresh(value.name or "weight"), type=value.type, shape=value.shape)
            twin.const_value = value.const_value
            part.graph.register_initializer(twin)
        ir.convenience.replace_all_uses_with(value, twin)
    copy.graph.remove(rest)
    for value in (value for node in _all_nodes(rest) for value in node.outputs):
        if value.name and value not in outputs:
            value.name = names.fresh(value.name)
    part.graph.extend(rest)
    part.graph.outputs.clear()
    part.graph.outputs.extend(ours.get(value.name, value) for value in outputs)
    for domain, version in copy.opset_imports.items():
        part.opset_imports.setdefault(domain, version)


def _opened(model: ir.Model) -> ir.Model:
    """A copy without functions."""
    copy = model.clone()
    if copy.functions:
        InlinePass()(copy)
    return copy


def _meet(part: ir.Model, copy: ir.Model) -> None:
    """Raises the older opset of the two. Converters refuse operators of the default domain that they do not know."""
    for one, other in ((part, copy), (copy, part)):
        for node in _all_nodes(list(one.graph)):
            if not _is_known(node.domain, node.op_type):
                node.domain += _ASIDE
                one.opset_imports[node.domain] = 1
        RaiseOpset(opset(other))(one)
        for node in _all_nodes(list(one.graph)):
            node.domain = node.domain.removesuffix(_ASIDE)
        for domain in [domain for domain in one.opset_imports if domain.endswith(_ASIDE)]:
            del one.opset_imports[domain]


def _lift_constants(model: ir.Model) -> None:
    """Makes initializers of constants: those that only the rest reads belong to it."""
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def left_alone(model: ir.Model) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is to be said of the rest: notes, and warnings. Empty where there is none."""
    rest = _rest(_opened(model))
    if not rest:
        return (), ()
    what = ", ".join(_custom(rest))
    notes = (f"{what}: not in ONNX Runtime, so left as it is, and what it reads is compared in place of its results",)
    layers = sum(linear_of(node) is not None for node in rest)
    if not layers:
        return notes, ()
    behind = f"{count(layers, 'layer')} behind {what}"
    return notes, (f"{behind} cannot be measured, as ONNX Runtime lacks it: left in float",)


def _custom(nodes: list[ir.Node]) -> list[str]:
    """The operators among some nodes and in their bodies that ONNX Runtime does not have."""
    unknown = (node.op_type for node in _all_nodes(nodes) if not _is_known(node.domain, node.op_type))
    return list(dict.fromkeys(unknown))


def _rest(model: ir.Model) -> list[ir.Node]:
    """The nodes of the main graph that ONNX Runtime does not have, and all that depends on these, in order."""
    custom = {node for node in model.graph if _is_custom(node, model)}
    lost = {value for node in custom for value in node.outputs}
    for node in model.graph if custom else ():
        if any(value in lost for value in _all_inputs(node)):
            custom.add(node)
            lost.update(node.outputs)
    return [node for node in model.graph if node in custom]


def _is_custom(node: ir.Node, model: ir.Model) -> bool:
    """Whether a node, or one in a body or a function of it, is of an operator that ONNX Runtime does not have."""
    function = model.functions.get(node.op_identifier())
    inner = [*(function or ()), *(inner for body in subgraphs(node) for inner in body)]
    if any(_is_custom(each, model) for each in inner):
        return True
    return function is None and not _is_known(node.domain, node.op_type)


@functools.cache
def _is_known(domain: str, op_type: str) -> bool:
    import onnx.defs

    return onnx.defs.has(op_type, domain) or (domain, op_type) in _runtime_operators()


@functools.cache
def _runtime_operators() -> frozenset[tuple[str, str]]:
    """What ONNX Runtime has beyond ONNX: of the default domain it also knows operators that it cannot compute."""
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as native
    except ImportError:
        return frozenset()
    known = {(schema.domain, schema.name) for schema in native.get_all_operator_schema() if schema.domain}
    return frozenset(known | {(kernel.domain, kernel.op_name) for kernel in native.get_all_opkernel_def()})


def _all_nodes(nodes: list[ir.Node]) -> Iterator[ir.Node]:
    for node in nodes:
        yield node
        for body in subgraphs(node):
            yield from _all_nodes(list(body))


def _all_inputs(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, and what the nodes in its bodies do."""
    for each in _all_nodes([node]):
        yield from (value for value in each.inputs if value is not None)
        for body in subgraphs(each):
            yield from body.outputs


def _read(rest: list[ir.Node]) -> list[ir.Value]:
    """What the rest reads of the main graph and does not make, each once."""
    made = {value for node in _all_nodes(rest) for value in node.outputs}
    inner = {value for node in _all_nodes(rest) for body in subgraphs(node) for value in _stored(body)}
    read = dict.fromkeys(value for node in rest for value in _all_inputs(node))
    return [value for value in read if value not in made and value not in inner]


def _stored(body: ir.Graph) -> list[ir.Value]:
    return [*body.inputs, *body.initializers.values()]
