"""Moves what activation functions and padding compare with, or fill in, along with factors and offsets of a tensor.

    x~ = (x - z) / s per channel, behind

    Relu                          Clip from -z / s;  Max with -z / s per channel
    Clip from a to b              Clip from (a - z) / s to (b - z) / s;  Max and Min with these, per channel
    Pad with c                    Pad with (c - z) / s
    convolution that pads with 0  Pad with -z / s in front of it, and no padding of its own

A Clip and a Pad have one number for all channels. Where channels need different ones, Max and Min take their place (a
compiler makes one kernel of them and of the quantization behind); nothing takes the place of a Pad.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.channels import FOREIGN, Channels
from qonnx.graph import Names, constant, rank
from qonnx.groups import SmoothGroup
from qonnx.passes.initializers import as_tensor, dtype_of, replace, store

Vector = npt.NDArray[np.float64]

# Relative differences that come from rounding alone: factors and offsets of a plan are stored in float32.
_ROUNDING = 1e-6


def needs_one_number(group: SmoothGroup, scale: Vector, shift: Vector) -> ir.Node | None:
    """A node that would have to pad with another number in every channel, or None."""
    if not shift.any():
        return None
    for node, channels, number in _pads(group):
        if _single(_moved(channels, scale, shift, number)) is None:
            return node
    return None


def move_bounds(group: SmoothGroup, scale: Vector, shift: Vector, names: Names) -> None:
    """Rewrites every Relu, Clip and Pad on the way, and the padding of convolutions."""
    for node, channels in group.clips:
        if node.op_type != "Pad":
            _clip(node, channels, scale, shift, names)
    for node, channels, number in _pads(group) if shift.any() else ():
        moved = _single(_moved(channels, scale, shift, number))
        assert moved is not None
        if node.op_type == "Pad" and moved != number:
            replace(node, 2, as_tensor(moved, dtype_of(node.inputs[0])), names)
        elif moved != number:
            _pad_in_front(node, moved, names)


def _pads(group: SmoothGroup) -> list[tuple[ir.Node, Channels, float]]:
    """What pads with a constant, the channels it pads, and the number."""
    convolutions = [(consumer.linear.node, Channels((1,), consumer.index), 0.0) for consumer in group.padded]
    pads = []
    for node, channels in group.clips:
        if node.op_type == "Pad":
            filler = constant(node.inputs[2]) if len(node.inputs) > 2 else None
            pads.append((node, channels, 0.0 if filler is None else float(filler.item())))
    return pads + convolutions


def _moved(channels: Channels, scale: Vector, shift: Vector, number: float) -> Vector:
    """What stands for a number in each element of the changed tensor."""
    own = channels.index[channels.index != FOREIGN]
    moved = (number - shift[own]) / scale[own]
    return np.append(moved, number) if own.size != channels.index.size else moved


def _single(moved: Vector | None) -> np.float64 | None:
    """The one number that all elements are, up to rounding; None where they differ, or are none."""
    if moved is None or np.ptp(moved) > _ROUNDING * np.abs(moved).max():
        return None
    return np.float64(moved[0])


def _clip(node: ir.Node, channels: Channels, scale: Vector, shift: Vector, names: Names) -> None:
    bounds: list[float | None] = [0.0, None]
    if node.op_type == "Clip":
        given = [constant(value) for value in node.inputs[1:3]]
        bounds = [None if bound is None else float(bound) for bound in (*given, None, None)[:2]]
    vectors = [None if bound is None else _moved(channels, scale, shift, bound) for bound in bounds]
    changed = [vector is not None and (vector != bound).any() for vector, bound in zip(vectors, bounds, strict=True)]
    if not any(changed):
        return
    graph, stem = node.graph, f"{node.name or node.op_type}_rescaled"
    source, old = node.inputs[0], node.outputs[0]
    assert isinstance(graph, ir.Graph)
    assert source is not None
    new: list[ir.Node] = []

    def add(op: str, *operands: Vector | np.float64 | None) -> None:
        inputs = [new[-1].outputs[0] if new else source]
        for operand in operands:
            tensor = None if operand is None else as_tensor(operand, dtype_of(source))
            inputs.append(None if tensor is None else store(graph, names.fresh(f"{stem}_bound"), tensor))  # type: ignore[arg-type]
        props = {**node.metadata_props, "qonnx.pass": "RescaleChannels"}
        made = ir.node(op, inputs, name=names.fresh(stem), metadata_props=props)
        value = made.outputs[0]
        value.name, value.type, value.shape = names.fresh(f"{old.name}_{op}"), old.type, old.shape
        new.append(made)

    def spread(bound: float) -> Vector:
        count = rank(old) or 0
        return channels.spread((bound - shift) / scale, bound, count)

    lower, upper = (_single(vector) for vector in vectors)
    if lower is not None and lower == 0 and upper is None:
        add("Relu")
    elif lower is not None or upper is not None:
        add("Clip", lower, *([upper] if upper is not None else []))
    for op, number, one, vector in zip(("Max", "Min"), bounds, (lower, upper), vectors, strict=True):
        if number is not None and vector is not None and one is None:
            add(op, spread(number))
    ir.convenience.replace_nodes_and_values(graph, node, [node], new, [old], [new[-1].outputs[0]])


def _pad_in_front(node: ir.Node, number: np.float64, names: Names) -> None:
    """Puts a Pad in front of a convolution and takes away the padding of its own."""
    data, graph = node.inputs[0], node.graph
    assert isinstance(graph, ir.Graph)
    assert data is not None
    widths = np.array(node.attributes.pop("pads").as_ints(), np.int64).reshape(2, -1)
    pads = np.concatenate([np.zeros((2, 2), np.int64), widths], axis=1).reshape(-1)
    inputs = [
        data,
        store(graph, names.fresh(f"{node.name}_pads"), ir.tensor(pads)),
        store(graph, names.fresh(f"{node.name}_padding"), as_tensor(number, dtype_of(data))),
    ]
    pad = ir.node("Pad", inputs, name=names.fresh(f"{node.name}_Pad"), metadata_props={"qonnx.pass": "RescaleChannels"})
    value = pad.outputs[0]
    value.name, value.type = names.fresh(f"{data.name}_padded"), data.type
    if data.shape is not None:
        wider = zip(list(data.shape)[2:], widths.sum(axis=0).tolist(), strict=True)
        sizes = [size + more if isinstance(size, int) else None for size, more in wider]
        value.shape = ir.Shape([*list(data.shape)[:2], *sizes])
    graph.insert_before(node, [pad])
    node.replace_input_with(0, value)
