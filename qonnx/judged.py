"""What a quantized model is judged by: its float outputs, and floats instead of what is chosen by comparing some.

An ArgMax, a TopK or a threshold turns an error into nothing or into another class, and the boxes that a TopK or a
NonMaxSuppression picks into others, or into the same in another order. By the scores and boxes in front of it one can
tell which layer costs how much; by the classes, and by what was picked, hardly.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from qonnx.attention import CUTS, MOVES
from qonnx.graph import is_float, subgraphs
from qonnx.runtime import with_outputs

# They tell of a value how large it is, not what it holds.
_SIZES = frozenset({"Shape", "Size"})

# Their result jumps where the integers do that they read: other elements, or another class written as a float.
_PICKS = frozenset({"Gather", "GatherElements", "GatherND", "Compress", "Cast"})

# What follows them in the post-processing of detections: every element comes from few of what went in.
_FOLLOWS = (
    MOVES
    | CUTS
    | frozenset({"Cast", "Concat", "Add", "Sub", "Mul", "Div", "Sigmoid", "Exp", "Clip", "Min", "Max", "Where", "Pad"})
)


def picked_outputs(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """The float outputs whose elements are picked by comparing floats, each with the values that it is judged by.

    These are the nearest ones in front of what picks: what it picks from, and what it compares; and what else becomes
    part of the output.
    """
    found = {value.name or "": _in_front(value) for value in model.graph.outputs if is_float(value)}
    return {name: tuple(names) for name, names in found.items() if names}


def judged_model(model: ir.Model) -> ir.Model:
    """The same graph, which returns what it is judged by; itself if these are its outputs.

    The floats that integer outputs are made from come after the outputs. Float outputs that are picked make room for
    what they are picked from. Bodies of If, Loop and Scan are not entered, nor is anything in front of a Shape.
    """
    picked, present = picked_outputs(model), [value.name or "" for value in model.graph.outputs]
    made_from = [
        source.name or "" for value in model.graph.outputs if not is_float(value) for source in _sources(value)
    ]
    names = dict.fromkeys([*made_from, *itertools.chain.from_iterable(picked.values())])
    added = [name for name in names if name not in present or name in picked]
    if not added and not picked:
        return model
    return returning(model, [*(name for name in present if name not in picked), *added])


def returning(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of the graph that returns the named values, and nothing else."""
    copy = with_outputs(model, names)
    values = {value.name: value for value in copy.graph.outputs}
    copy.graph.outputs[:] = [values[name] for name in names]
    return copy


def _in_front(output: ir.Value) -> dict[str, None]:
    """What a picked float is judged by; nothing for one that is not picked."""
    pending, seen, found, picked = [output], {output}, dict[str, None](), False
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None:
            continue
        compared = list(_compared(node))
        if compared:
            picked = True
            for source in [*_computed(node), *compared]:
                found |= _in_front(source) or {source.name or "": None}
        elif node.op_type in _FOLLOWS and _is_standard(node):
            new = [each for each in _computed(node) if each not in seen]
            seen.update(new)
            pending += new
        else:
            found[value.name or ""] = None
    return found if picked else {}


def _compared(node: ir.Node) -> Iterator[ir.Value]:
    """The floats by which a node picks; none for one that does not pick, or by what it is fed."""
    if node.op_type in _PICKS and _is_standard(node):
        for value in node.inputs:
            if value is not None and not is_float(value):
                yield from _sources(value)


def _computed(node: ir.Node) -> list[ir.Value]:
    """The floats that a node reads and the graph computes."""
    return [value for value in node.inputs if value is not None and is_float(value) and value.producer() is not None]


def _is_standard(node: ir.Node) -> bool:
    return node.domain in ("", "ai.onnx")


def _sources(integers: ir.Value) -> Iterator[ir.Value]:
    """The nearest floats that the main graph computes on the way to a value that holds none."""
    pending, seen = [integers], {integers}
    while pending:
        node = pending.pop(0).producer()
        if node is None or (node.op_type in _SIZES and _is_standard(node)) or any(subgraphs(node)):
            continue
        for value in node.inputs:
            if value is None or value in seen or value.producer() is None:
                continue
            seen.add(value)
            if is_float(value):
                yield value
            else:
                pending.append(value)
