"""What stands behind a layer element by element: an activation in one node, or spelled out in several.

Exporters write SiLU as Mul(y, Sigmoid(y)), HardSwish with HardSigmoid, and GELU with Erf or Tanh and more nodes.
Equalization turns the bound of a Clip into a Min or Max per channel.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import onnx_ir as ir

from qonnx.graph import is_float, is_initializer, rank

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
        nodes: what computes it, in an order in which it can be computed. They read `source`, each other and
            initializers.
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
    constants = [value for value in node.inputs if value is not None and value not in inside]
    return all(is_initializer(value) and (rank(value) or 0) <= (rank(source) or 0) for value in constants)


def _is_seen(value: ir.Value, nodes: Collection[ir.Node]) -> bool:
    """Whether it is read by none, by another node, or an output."""
    readers = [usage.node for usage in value.uses()]
    return value.is_graph_output() or not readers or any(reader not in nodes for reader in readers)
