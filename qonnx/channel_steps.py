"""How every operator passes channels on: the way from what makes them to the linear layers that read them.

To let a factor or an offset pass through one more operator, add it to `_STEPS`. What is not there stops them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from qonnx.channels import FOREIGN, Blocked, Channels, Size, Step, arranged, regrouped, sizes
from qonnx.graph import FLOAT_TYPES, constant, rank

_FLOATS = FLOAT_TYPES | {ir.DataType.DOUBLE}

# Which input of the Attention operator holds the values.
_VALUES = 2


def follow(node: ir.Node, read: Mapping[int, Channels]) -> Step:
    """Follows channels through one node.

    Args:
        node: any node.
        read: by input, the channels of one producer in it; every input that they can be followed to.

    Raises:
        Blocked: they end here.
    """
    if node.domain not in ("", "ai.onnx"):
        raise Blocked(f"is an operator of {node.domain}")
    if node.op_type == "Concat":
        return _concat(node, read)
    if len(read) > 1:
        raise Blocked("combines it with itself")
    ((position, channels),) = read.items()
    step = _STEPS.get(node.op_type)
    if step is None or (position != 0 and node.op_type not in _ANY_INPUT):
        raise Blocked(_REASONS.get(node.op_type, "is not linear in every channel"))
    return step(node, position, channels)


def ends(node: ir.Node, read: Mapping[int, Channels]) -> dict[int, str]:
    """The inputs of a node in which channels end while those in others may go on, each with the reason.

    Queries, keys and values of an Attention operator often come out of one product: only the values go on.
    """
    if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
        return {}
    why = "sums over its channels against an activation", "is not linear in every channel"
    return {index: why[index > _VALUES] for index in read if index != _VALUES}


def _same(node: ir.Node, channels: Channels, no_shift: str = "") -> Step:
    return Step(((node.outputs[0], channels),), no_shift=no_shift)


def _keep(node: ir.Node, position: int, channels: Channels) -> Step:
    return _same(node, channels)


def _cast(node: ir.Node, position: int, channels: Channels) -> Step:
    if node.outputs[0].dtype not in _FLOATS:
        raise Blocked("makes integers of it")
    return _same(node, channels)


def _homogeneous(node: ir.Node, position: int, channels: Channels) -> Step:
    return _same(node, channels, no_shift="has its kink at zero")


def _relu(node: ir.Node, position: int, channels: Channels) -> Step:
    return Step(((node.outputs[0], channels),), clips=True)


def _clip(node: ir.Node, position: int, channels: Channels) -> Step:
    given = [value for value in node.inputs[1:] if value is not None]
    bounds = [constant(value) for value in given]
    if any(bound is None for bound in bounds):
        note = "has bounds that are not constant"
        return Step(((node.outputs[0], channels),), note, note)
    no_scale = "has one bound for all channels" if any(np.any(bound != 0) for bound in bounds) else ""
    return Step(((node.outputs[0], channels),), no_scale, clips=True)


def _product(node: ir.Node, position: int, channels: Channels) -> Step:
    """Elementwise times (or divided by) something else."""
    other, output = node.inputs[1 - position], node.outputs[0]
    own, wide = rank(node.inputs[position]), rank(output)
    if other is None or own is None or wide is None:
        raise Blocked("has inputs or outputs of unknown shape")
    if position == 1 and node.op_type == "Div":
        raise Blocked("divides by it")
    moved = Channels(tuple(axis + wide - own for axis in channels.axes), channels.index)
    return _same(node, moved, no_shift="multiplies it by something else")


def _transpose(node: ir.Node, position: int, channels: Channels) -> Step:
    count = len(sizes(node.inputs[0]))
    order = list(node.attributes.get_ints("perm", list(reversed(range(count)))))
    return _same(node, arranged([order.index(axis) for axis in channels.axes], channels.index))


def _reshape(node: ir.Node, position: int, channels: Channels) -> Step:
    before, after = list(sizes(node.inputs[0])), list(sizes(node.outputs[0]))
    target = constant(node.inputs[1]) if node.op_type == "Reshape" and len(node.inputs) > 1 else None
    if target is not None and not node.attributes.get_int("allowzero", 0):
        for axis in np.flatnonzero(target.reshape(-1)[: len(before)] == 0):  # 0 copies a size that is not known here
            before[axis] = after[axis] = before[axis] or f"axis {axis}"
    return _same(node, regrouped(before, after, channels))


def _expand(node: ir.Node, position: int, channels: Channels) -> Step:
    before, after = sizes(node.inputs[0]), sizes(node.outputs[0])
    added = len(after) - len(before)
    for axis, size in zip(channels.axes, channels.index.shape, strict=True):
        if after[axis + added] != size:
            raise Blocked("changes the number of channels")
    return _same(node, Channels(tuple(axis + added for axis in channels.axes), channels.index))


def _split(node: ir.Node, position: int, channels: Channels) -> Step:
    axis = node.attributes.get_int("axis", 0) % len(sizes(node.inputs[0]))
    if axis not in channels.axes:
        return Step(tuple((output, channels) for output in node.outputs))
    dimension = channels.axes.index(axis)
    size = channels.index.shape[dimension]
    lengths = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if lengths is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        raise Blocked("has parts of unknown size")
    if lengths is None:
        part = -(-size // len(node.outputs))
        ends = np.minimum(part * np.arange(1, len(node.outputs)), size)
    else:
        ends = np.cumsum(lengths.reshape(-1))[:-1]
    parts = np.split(channels.index, ends, axis=dimension)
    return Step(tuple((o, arranged(channels.axes, part)) for o, part in zip(node.outputs, parts, strict=True)))


def _slice(node: ir.Node, position: int, channels: Channels) -> Step:
    count = len(sizes(node.inputs[0]))
    given = [constant(value) if value is not None else None for value in (*node.inputs[1:], None, None)][:4]
    starts, ends, axes, steps = (None if array is None else array.reshape(-1).tolist() for array in given)
    if axes is None and len(node.inputs) > 3 and node.inputs[3] is not None:
        raise Blocked("cuts along an axis that is not constant")
    if axes is None:
        axes = list(range(len(starts) if starts is not None else count))
    index = channels.index
    for number, axis in enumerate(axes):
        if axis % count not in channels.axes:
            continue
        known_steps = len(node.inputs) < 5 or node.inputs[4] is None or steps is not None
        step = steps[number] if steps is not None else 1
        if starts is None or ends is None or not known_steps or step < 1:
            raise Blocked("cuts out channels that are not constant")
        where = [slice(None)] * index.ndim
        where[channels.axes.index(axis % count)] = slice(starts[number], ends[number], step)
        index = index[tuple(where)]
    if not index.size:
        raise Blocked("keeps no channel")
    return _same(node, arranged(channels.axes, index))


def _gather(node: ir.Node, position: int, channels: Channels) -> Step:
    axis = node.attributes.get_int("axis", 0) % len(sizes(node.inputs[0]))
    added = len(sizes(node.inputs[1])) - 1
    moved = [other + added if other > axis else other for other in channels.axes]
    if axis not in channels.axes:
        return _same(node, Channels(tuple(moved), channels.index))
    picked = constant(node.inputs[1])
    if picked is None or added > 0:
        raise Blocked("picks channels that are not constant")
    dimension = channels.axes.index(axis)
    index = channels.index.take(picked.reshape(-1), axis=dimension)
    if added == 0:
        return _same(node, arranged(moved, index))
    rest = [new for old, new in zip(channels.axes, moved, strict=True) if old != axis]
    return _same(node, arranged(rest, index.squeeze(dimension)))


def _concat(node: ir.Node, read: Mapping[int, Channels]) -> Step:
    axis = node.attributes.get_int("axis", 0) % len(sizes(node.outputs[0]))
    axes = sorted({axis, *(other for channels in read.values() for other in channels.axes)})
    widths = [sizes(value)[axis] for value in node.inputs]
    shapes = [dict(zip(c.axes, c.index.shape, strict=True)) for c in read.values()]
    common = {other: size for shape in shapes for other, size in shape.items() if other != axis}
    parts = []
    for position, width in enumerate(widths):
        if not isinstance(width, int):
            raise Blocked("puts together parts of unknown size")
        wanted = [width if other == axis else common[other] for other in axes]
        channels = read.get(position)
        if channels is None:
            parts.append(np.full(wanted, FOREIGN, np.intp))
            continue
        own = dict(zip(channels.axes, channels.index.shape, strict=True))
        parts.append(np.broadcast_to(channels.index.reshape([own.get(other, 1) for other in axes]), wanted))
    return _same(node, arranged(axes, np.concatenate(parts, axis=axes.index(axis))))


def _pool(node: ir.Node, position: int, channels: Channels) -> Step:
    if any(axis > 1 for axis in channels.axes):
        raise Blocked("pools over channels")
    include, rounded_up = (node.attributes.get_int(name, 0) for name in ("count_include_pad", "ceil_mode"))
    automatic = node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    if include and (rounded_up or automatic or any(node.attributes.get_ints("pads", []))):
        return _same(node, channels, no_shift="averages zeros of the padding too")
    return _same(node, channels)


def _resize(node: ir.Node, position: int, channels: Channels) -> Step:
    before, after = sizes(node.inputs[0]), sizes(node.outputs[0])
    if any(before[axis] != after[axis] or before[axis] is None for axis in channels.axes):
        raise Blocked("resizes the channels")
    outside = node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize"
    return _same(node, channels, no_shift="fills in a constant outside of the image" if outside else "")


def _pad(node: ir.Node, position: int, channels: Channels) -> Step:
    count = len(sizes(node.inputs[0]))
    pads = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    given = node.inputs[3] if len(node.inputs) > 3 else None
    axes = list(range(count)) if given is None else constant(given)
    if pads is None or axes is None:
        raise Blocked("pads by sizes that are not constant")
    widths = pads.reshape(2, -1)
    if any(widths[:, k].any() for k, axis in enumerate(axes) if int(axis) % count in channels.axes):
        raise Blocked("pads the channels")
    if node.attributes.get_string("mode", "constant") != "constant":
        return _same(node, channels)
    filler = node.inputs[2] if len(node.inputs) > 2 else None
    fill = constant(filler) if filler is not None else np.zeros(1)
    if fill is None:
        raise Blocked("pads with a number that is not constant")
    no_scale = "pads with one number for all channels" if np.any(np.asarray(fill, np.float64) != 0) else ""
    return Step(((node.outputs[0], channels),), no_scale, clips=True)


def _reduce(node: ir.Node, position: int, channels: Channels) -> Step:
    count = len(sizes(node.inputs[0]))
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = np.array(node.attributes.get_ints("axes", []), np.int64) if given is None else constant(given)
    if axes is None or not axes.size:
        raise Blocked("reduces over axes that are not given")
    reduced = {int(axis) % count for axis in axes.reshape(-1)}
    if reduced.intersection(channels.axes):
        raise Blocked("reduces over channels")
    moved = channels.axes
    if node.attributes.get_int("keepdims", 1) == 0:
        moved = tuple(axis - sum(other < axis for other in reduced) for axis in channels.axes)
    note = "sums up offsets" if node.op_type == "ReduceSum" else ""
    return _same(node, Channels(moved, channels.index), no_shift=note)


def _matmul(node: ir.Node, position: int, channels: Channels) -> Step:
    """The product of two activations: probabilities times values mixes tokens, not channels."""
    own, wide = rank(node.inputs[position]), rank(node.outputs[0])
    other = rank(node.inputs[1 - position])
    if own is None or wide is None or other is None or own < 2 or other < 2:
        raise Blocked("has inputs or outputs of unknown shape")
    if own - 1 - position in channels.axes:
        raise Blocked("sums over its channels against an activation")
    moved = Channels(tuple(axis + wide - own for axis in channels.axes), channels.index)
    rows_sum_to_one = position == 1 and _is_softmax(node.inputs[0])
    return _same(node, moved, no_shift="" if rows_sum_to_one else "sums up offsets")


def _is_softmax(value: ir.Value | None) -> bool:
    """Whether the last axis of a value sums to one."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Identity", "Cast", "Dropout"):
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    if node is None or node.op_type != "Softmax":
        return False
    axis, count = node.attributes.get_int("axis", -1), rank(node.inputs[0])
    return axis == -1 or (count is not None and axis == count - 1)


def _attention(node: ir.Node, position: int, channels: Channels) -> Step:
    """Values through the Attention operator; each of their heads serves a run of query heads."""
    cached = any(value is not None for value in node.inputs[5:6])  # past_value
    if cached or any(output.uses() or output.is_graph_output() for output in node.outputs[2:3]):  # present_value
        raise Blocked("keeps it in a cache")
    query, value = sizes(node.inputs[0]), sizes(node.inputs[_VALUES])
    heads: Size
    kept: Size
    if len(value) == 4:
        if 2 in channels.axes:
            raise Blocked("mixes its channels")
        heads, kept = query[1], value[1]
        index = channels.index
        if 1 in channels.axes:
            index = np.repeat(index, _times(heads, kept), axis=channels.axes.index(1))
        return _same(node, arranged(channels.axes, index))
    along = channels.along(2, channels.index.size)
    if len(value) != 3 or along is None or not channels.axes:
        raise Blocked("mixes its channels")
    heads, kept = node.attributes.get_int("q_num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
    index = np.repeat(along.reshape(kept or 1, -1), _times(heads, kept), axis=0)
    return _same(node, arranged((2,), index.reshape(-1)))


def _times(heads: Size, kept: Size) -> int:
    if not isinstance(heads, int) or not isinstance(kept, int) or not kept or heads % kept:
        raise Blocked("has an unknown number of heads")
    return heads // kept


_Step: TypeAlias = Callable[[ir.Node, int, Channels], Step]

_STEPS: dict[str, _Step] = {
    **dict.fromkeys(("Identity", "Dropout", "CastLike"), _keep),
    "Cast": _cast,
    **dict.fromkeys(("LeakyRelu", "PRelu", "Abs", "Neg"), _homogeneous),
    "Relu": _relu,
    "Clip": _clip,
    **dict.fromkeys(("Mul", "Div"), _product),
    "Transpose": _transpose,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Expand": _expand,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"), _pool),
    "Resize": _resize,
    "Pad": _pad,
    **dict.fromkeys(("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum"), _reduce),
    "MatMul": _matmul,
    "Attention": _attention,
}
_ANY_INPUT = frozenset({"Mul", "Div", "MatMul", "Attention"})

_REASONS = {
    **dict.fromkeys(("Add", "Sub", "Sum"), "adds something else to it"),
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), "does not sum over these channels with a constant weight"),
    "LayerNormalization": "normalises it",
    "RMSNormalization": "normalises it",
    "Softmax": "normalises it",
}
