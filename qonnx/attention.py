"""Attention in a graph: softmax(Q K') V, whatever masks, scales and changes of shape stand in between.

The compiler makes one INT8 kernel of it when Q, K, the probabilities, V and the result are all on integers.
"""

from __future__ import annotations

import onnx_ir as ir

from qonnx.graph import constant, is_initializer

# These move elements and change none.
MOVES = frozenset({"Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Expand"})

# These cut a tensor into parts, such as the result of one projection into queries, keys and values.
CUTS = frozenset({"Split", "Slice", "Gather"})

_KEEPS_RANGE = MOVES | {"Dropout", "Cast"}
# With sinks, a column of learned scores stands beside those of the keys, and is cut off behind the Softmax.
_SOFTMAX_TO_VALUES = _KEEPS_RANGE | {"Slice"}
_SCORES_TO_SOFTMAX = _KEEPS_RANGE | {"Concat", "Mul", "Div", "Add", "Sub", "Where", "Clip", "Max", "Min", "Tanh"}


def is_probability(value: ir.Value | None) -> bool:
    """Whether the value is what a Softmax made: it is moved or cut at most, or NaN in it is replaced."""
    producer = None if value is None else value.producer()
    if producer is None or not _is_standard(producer):
        return False
    if producer.op_type in _SOFTMAX_TO_VALUES:
        return is_probability(producer.inputs[0])
    if producer.op_type == "Where":  # rows in which every key is masked are 0 / 0, and exporters write 0 for them
        return any(is_probability(one) and _is_zero(other) for one, other in _branches(producer))
    return producer.op_type == "Softmax"


def value_products(node: ir.Node) -> frozenset[str]:
    """The names of the MatMuls that multiply values by the probabilities that this MatMul makes the scores for."""
    found: set[str] = set()
    pending = [(node.outputs[0], False)]
    seen: set[ir.Value] = set()
    while pending:
        value, probability = pending.pop()
        for usage in value.uses():
            reader = usage.node
            if not reader.outputs or reader.outputs[0] in seen:
                continue
            if probability and values_index(reader) is not None and reader.op_type == "MatMul" and reader.name:
                found.add(reader.name)
            elif reader.op_type == "Softmax" or reader.op_type in (
                _SOFTMAX_TO_VALUES | {"Where"} if probability else _SCORES_TO_SOFTMAX
            ):
                seen.add(reader.outputs[0])
                pending.append((reader.outputs[0], probability or reader.op_type == "Softmax"))
    return frozenset(found)


def cut_edge(node: ir.Node, index: int) -> tuple[ir.Node, int]:
    """Where an operand is read for the first time after it was cut from a larger tensor; else the operand itself.

    Between the two it is only moved, and nothing else reads it: rounding it there or here is the same.
    """
    reader, position = node, index
    while True:
        value = reader.inputs[position]
        producer = None if value is None else value.producer()
        if value is None or producer is None or producer.graph is not node.graph or not _is_standard(producer):
            return node, index
        if producer.op_type in CUTS:
            return reader, position
        if producer.op_type not in MOVES or len(value.uses()) != 1 or value.is_graph_output():
            return node, index
        reader, position = producer, 0


def result(node: ir.Node) -> ir.Value | None:
    """The result of a MatMul after the operators that only move it: what the next operator reads; None if nothing."""
    value, found = node.outputs[0], None
    while not value.is_graph_output() and value.uses():
        found = value
        (first, *others) = value.uses()
        if others or first.idx != 0 or first.node.op_type not in MOVES or first.node.graph is not node.graph:
            break
        value = first.node.outputs[0]
    return found


def values_index(node: ir.Node) -> int | None:
    """Which input of the second product of an attention holds the values; None for every other node.

    A weight is no values: that is a layer, of which each result is a mean of the weight's rows.
    """
    if len(node.inputs) < 2 or any(is_initializer(value) for value in node.inputs):
        return None
    return next((1 - index for index in (0, 1) if is_probability(node.inputs[index])), None)


def projection(value: ir.Value | None) -> ir.Node | None:
    """The MatMul or Gemm that made a value, before it was cut and moved and got its bias; None if none did."""
    producer = None if value is None else value.producer()
    while producer is not None and _is_standard(producer):
        if producer.op_type in ("MatMul", "Gemm"):
            return producer
        if producer.op_type == "Add":
            summands = [summand for summand in producer.inputs if not is_initializer(summand)]
            if len(summands) != 1:
                return None
            value = summands[0]
        elif producer.op_type in MOVES | CUTS:
            value = producer.inputs[0]
        else:
            return None
        producer = None if value is None else value.producer()
    return None


def _branches(where: ir.Node) -> tuple[tuple[ir.Value | None, ir.Value | None], ...]:
    _, yes, no = where.inputs
    return (yes, no), (no, yes)


def _is_zero(value: ir.Value | None) -> bool:
    array = constant(value)
    return array is not None and array.size == 1 and not array.any()


def _is_standard(node: ir.Node) -> bool:
    return node.domain in ("", "ai.onnx")
