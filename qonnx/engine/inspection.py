"""What the compiler made of each matrix product and convolution of the ONNX graph, and of what was planned for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import msgspec
import onnx_ir as ir

from qonnx.engine.listing import EngineLayer, int8_nodes
from qonnx.graph import FLOAT_REASON, module_path
from qonnx.linear import LINEAR_OPS
from qonnx.linter.findings import Severity
from qonnx.linter.products import operands_of

# The steps in the name of a generated kernel, `__myl_ReshTranReshMove_myl0_3`, and those that compute nothing.
_GENERATED = re.compile(r"__myl_(?P<steps>(?:[A-Z][a-z]*)+)_")
_MOVES = frozenset({"Move", "Resh", "Tran", "Slic", "Conc", "Repl", "Pad"})

_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})


class NodeInspection(msgspec.Struct, frozen=True):
    """How the engine runs one Conv, ConvTranspose, Gemm or MatMul.

    Attributes:
        node: its name; `node_of_` and the name of its output where it has none.
        op: its operator.
        path: the path of the module that made it, or "".
        planned: whether Q/DQ nodes ask for INT8: both operands come from integers.
        int8: whether it multiplies INT8 by INT8.
        layer: the engine layer that multiplies, or None if none names the node: it was folded away, or never compiled.
        reads: types of what that layer reads and holds.
        writes: types of what it writes.
        fused: the other ONNX nodes in that layer, Q/DQ nodes left out.
        copies: engine layers for this node that only move or reformat data.
        reason: why it is in float: what the plan said, or what is wrong with the graph; "" where neither is known.
    """

    node: str
    op: str
    path: str
    planned: bool
    int8: bool
    layer: str | None
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    reason: str = ""


def inspect(model: ir.Model, layers: Sequence[EngineLayer], target: str) -> tuple[NodeInspection, ...]:
    """One entry for each matrix product and convolution of the main graph, in its order.

    Args:
        model: what was compiled.
        layers: what the compiler made of it.
        target: the device, whose rules say what is wrong with a graph.
    """
    products = {_name(node): node for node in model.graph if node.op_type in LINEAR_OPS and node.domain == ""}
    quantizers = {_name(node) for node in model.graph if node.op_type in _QDQ}
    answers = int8_nodes(layers, products)
    wanted = {name for name, node in products.items() if _is_planned(node)}
    lost = {answer.node for answer in answers if answer.node in wanted and not answer.int8}
    faults = _faults(model, target, lost) if lost else {}
    carriers: dict[str, list[EngineLayer]] = {}
    for layer in layers:
        for name in layer.onnx_layers:
            carriers.setdefault(name, []).append(layer)
    found = []
    for answer in answers:
        node, own = products[answer.node], carriers.get(answer.node, [])
        telling = next((layer for layer in own if layer.name == answer.layer), None)
        others = () if telling is None else telling.onnx_layers
        found.append(
            NodeInspection(
                node=answer.node,
                op=node.op_type,
                path=module_path(node),
                planned=answer.node in wanted,
                int8=answer.int8,
                layer=answer.layer,
                reads=() if telling is None else _distinct(telling.inputs + telling.constants),
                writes=() if telling is None else _distinct(telling.outputs),
                fused=tuple(name for name in others if name != answer.node and name not in quantizers),
                copies=tuple(layer.name for layer in own if is_copy(layer)),
                reason="" if answer.int8 else node.metadata_props.get(FLOAT_REASON, faults.get(answer.node, "")),
            )
        )
    return tuple(found)


def is_copy(layer: EngineLayer) -> bool:
    """Whether the layer only moves elements or changes their layout.

    >>> kernel = EngineLayer("__myl_ReshTranMove_myl0_3", "kgen", (), (), (), ())
    >>> is_copy(kernel), is_copy(msgspec.structs.replace(kernel, name="__myl_MulAddMove_myl0_3"))
    (True, False)
    """
    if layer.type == "reformat":
        return _distinct(layer.inputs) == _distinct(layer.outputs)  # otherwise it quantizes or dequantizes
    generated = _GENERATED.match(layer.name)
    return generated is not None and set(re.findall("[A-Z][a-z]*", generated["steps"])) <= _MOVES


def _is_planned(node: ir.Node) -> bool:
    operands = operands_of(node)
    return operands is not None and all(each is not None and each.dtype == ir.DataType.INT8 for each in operands)


def _faults(model: ir.Model, target: str, nodes: set[str]) -> dict[str, str]:
    """What the rules for TensorRT say of some nodes, the worst first."""
    from qonnx.linter import lint

    found = sorted(lint(model, target=target), key=lambda finding: finding.severity is not Severity.ERROR)
    faults: dict[str, str] = {}
    for finding in found:
        if finding.node in nodes:
            faults.setdefault(finding.node, f"{finding.rule}: {finding.message}; {finding.remedy}")
    return faults


def _distinct(types: Iterable[ir.DataType]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(dtype.name.lower() for dtype in types))


def _name(node: ir.Node) -> str:
    return node.name or f"node_of_{node.outputs[0].name}"
