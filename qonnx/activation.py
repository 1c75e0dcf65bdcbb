"""What stands behind a layer element by element: an activation in one node, or spelled out in several.

Exporters write SiLU as Mul(y, Sigmoid(y)), HardSwish with HardSigmoid, and GELU with Erf or Tanh and more nodes.
Equalization turns the bound of a Clip into a Min or Max per channel.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from qonnx.graph import constant, is_float, rank

# fmt: off
_ELEMENTWISE = frozenset({
    "Abs", "Add", "Cast", "Celu", "Clip", "Div", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign",
    "Sub", "Swish", "Tanh", "ThresholdedRelu",
})
# fmt: on

# More nodes than any activation takes: what is longer is something else.
_LONGEST = 16


class Activation(NamedTuple):
    """A function of one value, element by element.

    Attributes:
        source: the value that it is a function of.
        nodes: what computes it, in an order in which it can be computed. They read `source`, each other and constants:
            one number each, or one per channel.
        result: the only value of these nodes that anything else reads; nothing else reads `source`.
    """

    source: ir.Value
    nodes: tuple[ir.Node, ...]
    result: ir.Value


def activation_of(source: ir.Value) -> Activation | None:
    """The longest activation that is all that reads a value; None where something else reads it too."""
    inside, nodes, found = [source], list[ir.Node](), None
    for value in inside:  # grows on the way
        for node in dict.fromkeys(usage.node for usage in value.uses()):
            if node in nodes or len(nodes) == _LONGEST or not _is_elementwise(node, inside, source):
                continue
            nodes.append(node)
            inside.append(node.outputs[0])
            seen = [each for each in inside if _is_seen(each, nodes)]
            if len(seen) == 1 and seen[0] is not source:
                found = Activation(source, tuple(nodes), seen[0])
    return found


def _is_elementwise(node: ir.Node, inside: Collection[ir.Value], source: ir.Value) -> bool:
    producer = source.producer()
    if node.op_type not in _ELEMENTWISE or node.domain != "" or producer is None or node.graph is not producer.graph:
        return False
    if node.op_type == "Cast" and not is_float(node.outputs[0]):
        return False
    if node.op_type in ("Div", "Pow") and node.inputs[1] in inside:
        return False  # no bound, where what it divides by is near 0
    constants = [value for value in node.inputs if value is not None and value not in inside]
    if node.op_type == "Pow" and not all(_is_whole(value) for value in constants):
        return False  # a root has no value below 0
    return all(_keeps_shape(value, source) for value in constants)


def _keeps_shape(value: ir.Value, source: ir.Value) -> bool:
    """Whether it is one finite number, or one for each channel; the mask of an attention is none of that."""
    stored, dimensions = constant(value), rank(source) or 0
    if stored is None or stored.ndim > dimensions or not np.isfinite(stored).all():
        return False
    wide = [axis - stored.ndim for axis, size in enumerate(stored.shape) if size != 1]
    return not wide or (len(wide) == 1 and source.shape is not None and source.shape[wide[0]] == stored.shape[wide[0]])


def _is_whole(value: ir.Value) -> bool:
    """Whether it is a constant of whole numbers from 0 on."""
    stored = constant(value)
    return stored is not None and bool((stored >= 0).all() and (stored == np.round(stored)).all())


def _is_seen(value: ir.Value, nodes: Collection[ir.Node]) -> bool:
    """Whether it is read by none, by another node, or an output."""
    readers = [usage.node for usage in value.uses()]
    return value.is_graph_output() or not readers or any(reader not in nodes for reader in readers)
