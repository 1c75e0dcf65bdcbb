"""What part a layer plays in a network, so that a recipe can name it without knowing the names in the graph."""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator

import onnx_ir as ir

from qonnx.attention import CUTS, MOVES, value_products, values_index
from qonnx.graph import is_float, is_initializer, rank
from qonnx.linear import Linear, linear_of


class Role(enum.StrEnum):
    """A part that a layer plays; it may play several."""

    FIRST = "first"
    """Has a weight, and no layer with a weight comes before it."""

    LAST = "last"
    """Has a weight, and no layer with a weight comes after it."""

    ATTENTION = "attention"
    """One of the two products of an attention, or a projection in front of or behind them."""

    MLP = "mlp"
    """A product outside attention whose result goes into another one through an activation function, or that other."""

    LM_HEAD = "lm_head"
    """Makes one output for each row of an embedding table: scores of the words of a vocabulary."""

    EMBEDDING = "embedding"
    """Looks rows up in a stored table."""


# Beside those that move elements, these lead from one product of a perceptron to the next.
_ACTIVATIONS = frozenset(
    """
    Cast Clip Div Dropout Elu Erf Gelu HardSigmoid HardSwish Identity LeakyRelu Max Min Mish Mul Neg Pow Relu Selu
    Sigmoid Softplus Sqrt Sub Swish Tanh
    """.split()  # noqa: SIM905
)
_TO_PROJECTION = MOVES | CUTS | {"Cast", "Concat", "Mul"}

# Smaller tables hold positions or kinds of tokens; a classifier may have as many outputs by chance.
_SMALLEST_VOCABULARY = 256


def roles_of(graph: ir.Graph) -> dict[str, frozenset[Role]]:
    """The roles of the nodes that have any, by node name; bodies of subgraphs are not entered.

    Args:
        graph: in the form that `qonnx.passes.prepare` makes: sorted, every node with a name of its own.
    """
    layers = {node: linear for node in graph if (linear := linear_of(node)) is not None}
    tables = [node for node in graph if is_table(node)]
    attention = _attention(graph, layers)
    found = {
        Role.FIRST: _ends(graph, layers),
        Role.LAST: _ends(reversed(list(graph)), layers, backwards=True),
        Role.ATTENTION: attention,
        Role.MLP: _perceptrons(layers, attention),
        Role.LM_HEAD: _heads(layers, tables),
        Role.EMBEDDING: set(tables),
    }
    nodes = set().union(*found.values())
    return {node.name or "": frozenset(role for role in Role if node in found[role]) for node in nodes}


def is_table(node: ir.Node) -> bool:
    """Whether a node looks rows up in a stored float matrix."""
    table = node.inputs[0] if node.op_type == "Gather" and node.domain == "" else None
    first_axis = node.attributes.get_int("axis", 0) == 0
    return is_initializer(table) and is_float(table) and rank(table) == 2 and first_axis


def _ends(nodes: ir.Graph | Iterator[ir.Node], layers: Collection[ir.Node], backwards: bool = False) -> set[ir.Node]:
    """The layers that no other layer comes before, in the given order of nodes."""
    behind: set[ir.Value] = set()
    ends = set()
    for node in nodes:
        read, written = (node.outputs, node.inputs) if backwards else (node.inputs, node.outputs)
        reached = any(value in behind for value in read)
        if node in layers and not reached:
            ends.add(node)
        if node in layers or reached:
            behind.update(value for value in written if value is not None and not value.is_initializer())
    return ends


def _attention(graph: ir.Graph, layers: Collection[ir.Node]) -> set[ir.Node]:
    nodes = {node.name: node for node in graph}
    scores = [node for node in graph if node.op_type == "MatMul" and node not in layers and value_products(node)]
    mixes = {nodes[name] for node in scores for name in value_products(node) if name in nodes}
    mixes |= {node for node in graph if node.op_type == "MatMul" and values_index(node) is not None}
    found = {node for node in graph if node.op_type == "Attention"}
    ends = [value for node in (*scores, *mixes, *found) for value in node.inputs[:3]]
    found |= _leading_to([value for value in ends if value is not None], layers)
    for node in [*mixes, *(node for node in found if node.op_type == "Attention")]:
        found |= set(_read_by(node.outputs[0], layers, _TO_PROJECTION))
    return found | set(scores) | mixes


def _leading_to(values: list[ir.Value], layers: Collection[ir.Node]) -> set[ir.Node]:
    """The nearest layers in front of values."""
    found, seen, pending = set(), set(values), list(values)
    while pending:
        producer = pending.pop().producer()
        if producer is None:
            continue
        if producer in layers:
            found.add(producer)
        elif producer.op_type not in ("MatMul", "Softmax"):
            pending += [value for value in producer.inputs if value is not None and value not in seen]
            seen.update(value for value in producer.inputs if value is not None)
    return found


def _read_by(value: ir.Value, layers: Collection[ir.Node], through: Collection[str]) -> Iterator[ir.Node]:
    """The nearest layers that read a value, behind operators of the given kinds and additions of a constant."""
    pending, seen = [value], {value}
    while pending:
        for usage in pending.pop().uses():
            reader = usage.node
            if reader in layers:
                yield reader
            elif reader.op_type in through or (
                reader.op_type == "Add" and any(is_initializer(summand) for summand in reader.inputs)
            ):
                pending += [output for output in reader.outputs if output not in seen]
                seen.update(reader.outputs)


def _perceptrons(layers: Collection[ir.Node], attention: set[ir.Node]) -> set[ir.Node]:
    products = [node for node in layers if node.op_type in ("Gemm", "MatMul") and node not in attention]
    found = set()
    for node in products:
        second = [reader for reader in _read_by(node.outputs[0], products, _ACTIVATIONS) if reader is not node]
        found.update([node, *second] if second else [])
    return found


def _heads(layers: dict[ir.Node, Linear], tables: list[ir.Node]) -> set[ir.Node]:
    rows = {node.inputs[0].shape[0] for node in tables if node.inputs[0] is not None and node.inputs[0].shape}
    vocabularies = {size for size in rows if isinstance(size, int) and size >= _SMALLEST_VOCABULARY}
    return {
        node
        for node, linear in layers.items()
        if node.op_type in ("Gemm", "MatMul") and linear.output_channels in vocabularies
    }
