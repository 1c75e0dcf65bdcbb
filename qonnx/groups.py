"""Smooth groups: what makes a tensor, and every linear layer that reads its channels.

    x_j  ->  (x_j - z_j) / s_j      absorbed by what makes x: gamma / s and (beta - z) / s; W / s and (b - z) / s
    W_j  ->  W_j s_j                in every layer that reads x, and b + W z there

The function of the graph stays, and the tensor in between gets channels that one scale fits. A group is found along
edges: from a producer (`qonnx.producers`) through everything that keeps channels apart (`qonnx.channel_steps`) to all
ends. An end that is no linear layer is a tap: a residual connection, a Gelu, an output of the model. The channels that
it reads stay as they are, unless one Mul (and Add) in front of it is allowed.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.channel_steps import ends, follow
from qonnx.channels import FOREIGN, Blocked, Channels, Indices
from qonnx.graph import constant, is_float, rank
from qonnx.linear import Linear, linears
from qonnx.producers import Kind, Producer, producers

Mask = npt.NDArray[np.bool_]


class Residual(enum.StrEnum):
    """What happens to channels that something else than a linear layer reads too."""

    REFUSE = "refuse"
    MUL = "mul"


@dataclass(frozen=True, eq=False)
class Consumer:
    """A linear layer that reads channels of a group.

    Attributes:
        linear: the layer.
        index: [input channels] the producer's channel that each of them is, or `FOREIGN`.
    """

    linear: Linear
    index: Indices


@dataclass(frozen=True, eq=False)
class Tap:
    """Another reader of channels of a group.

    Attributes:
        value: what it reads.
        channels: of `value`.
        node: the reader; None where `value` is an output of the model.
        input: which of its inputs.
        reason: why factors cannot go further, in the words of a sentence that begins with the reader.
    """

    value: ir.Value
    channels: Channels
    node: ir.Node | None
    input: int
    reason: str

    @property
    def fixable(self) -> bool:
        """Whether a Mul in front of it can give it what it read before."""
        return self.node is not None and self.node.graph is not None and self.node.graph is self.value.graph

    def __str__(self) -> str:
        return f"{self.node.op_type} {self.node.name!r} {self.reason}" if self.node is not None else self.reason


@dataclass(frozen=True, eq=False)
class SmoothGroup:
    """A producer, the tensor it makes, and everything that reads its channels.

    Attributes:
        producer: what makes the channels.
        consumers: the linear layers that read them, in graph order.
        taps: what else reads them.
        free: [channels] whether the channel may be scaled and shifted; all others keep factor 1 and offset 0.
        clips: Relu, Clip and Pad on the way. Behind these a shift needs new bounds: it must be one for all channels.
        no_scale: why no channel can have a factor, or "".
        no_shift: why no channel can have an offset, or "".
    """

    producer: Producer
    consumers: tuple[Consumer, ...]
    taps: tuple[Tap, ...]
    free: Mask
    clips: tuple[tuple[ir.Node, Channels], ...]
    no_scale: str
    no_shift: str

    @property
    def value(self) -> str:
        """The name of the value that the producer makes: it identifies the group."""
        return self.producer.value.name or ""

    @property
    def reason(self) -> str:
        """Why nothing can be done with the group, or ""."""
        if not self.free.any():
            others = f", and {len(self.taps) - 1} more" if len(self.taps) > 1 else ""
            return f"{self.taps[0]}{others}" if self.taps else self.no_scale
        return self.no_scale if self.no_shift else ""

    @property
    def padded(self) -> tuple[Consumer, ...]:
        """The convolutions that pad with zeros. For a shift they need a Pad with what stands for zero then."""
        return tuple(consumer for consumer in self.consumers if _pads(consumer.linear.node))

    @property
    def inputs(self) -> Mapping[str, tuple[int, Indices]]:
        """Value name -> axis and channels of each tensor that consumers read: what is quantized, and observed."""
        return {c.linear.data.name or "": (_input_axis(c.linear) or 0, c.index) for c in self.consumers}


def find_groups(
    model: ir.Model,
    *,
    residual: Residual = Residual.REFUSE,
    explicit: bool = False,
    pad: bool = False,
    bounds: bool = False,
) -> tuple[SmoothGroup, ...]:
    """Finds all groups of the main graph that have a linear layer, in graph order, those that are refused included.

    Every input of a linear layer is in one group at most: of two producers that could scale it, in that of the nearer.

    Args:
        model: in the form that `qonnx.passes.prepare` makes: sorted, named, shapes inferred where possible.
        residual: what to do with channels that something else reads too.
        explicit: whether a tensor that nothing can scale may get a Mul (and Sub) in front of its linear layers.
        pad: whether a convolution that pads with zeros may get a Pad in front of it, so that a shift is possible.
        bounds: whether a Clip may become a Max and a Min with a bound per channel, so that factors are possible.
    """
    graph = model.graph
    layers = {linear.node: linear for linear in linears(graph)}
    order = {node: number for number, node in enumerate(graph)}
    groups: list[SmoothGroup] = []
    taken: dict[ir.Node, Mask] = {}
    for producer in reversed(list(producers(model, layers))):
        group = _reach(graph, producer, layers, order, pad, bounds).group(residual)
        if not group.consumers or any(
            (taken[consumer.linear.node] & _moved(consumer, group)).any()
            for consumer in group.consumers
            if consumer.linear.node in taken
        ):
            continue
        groups.append(group)
        for consumer in group.consumers if not group.reason else ():
            taken[consumer.linear.node] = taken.get(consumer.linear.node, False) | _moved(consumer, group)
    groups += _without_producer(layers, groups, taken, explicit, pad)
    return tuple(sorted(groups, key=lambda group: order.get(group.producer.node, -1) if group.producer.node else -1))


def _moved(consumer: Consumer, group: SmoothGroup) -> Mask:
    """Which inputs of the layer change with the group; where none can, those that could."""
    movable = group.free if group.free.any() else np.ones_like(group.free)
    return np.asarray((consumer.index != FOREIGN) & movable[consumer.index])


def _without_producer(
    layers: Mapping[ir.Node, Linear],
    groups: Sequence[SmoothGroup],
    taken: Collection[ir.Node],
    explicit: bool,
    pad: bool,
) -> Iterator[SmoothGroup]:
    """Groups of the layers that read what no producer can scale, by tensor."""
    values = {group.value for group in groups}
    refused = {consumer.linear.node for group in groups for consumer in group.consumers}
    readers: dict[ir.Value, list[Consumer]] = {}
    for node, linear in layers.items():
        if node in taken or linear.data.name in values or (node in refused and not explicit):
            continue
        if _input_axis(linear) is not None and linear.input_channels and is_float(linear.data):
            consumer = Consumer(linear, np.arange(linear.input_channels, dtype=np.intp))
            readers.setdefault(linear.data, []).append(consumer)
    for value, consumers in readers.items():
        axes = {(_input_axis(c.linear) or 0, c.index.size) for c in consumers}
        if len(axes) > 1:
            continue
        ((axis, size),) = axes
        maker = value.producer()
        made_by = f"is made by {maker.op_type} {maker.name!r}" if maker is not None else "is an input of the model"
        reason = "" if explicit else f"{value.name} {made_by}, which cannot absorb factors"
        producer = Producer(Kind.NONE, maker, value, Channels((axis,), np.arange(size, dtype=np.intp)))
        no_shift = next((note for c in consumers if (note := _consumer_no_shift(c.linear, pad))), "")
        free = np.full(size, explicit)
        yield SmoothGroup(producer, tuple(consumers), (), free, (), reason, reason or no_shift)


class _Reach:
    """Everything that the channels of a producer lead to."""

    def __init__(self, producer: Producer) -> None:
        self.producer = producer
        self.consumers: list[Consumer] = []
        self.taps: list[Tap] = []
        self.clips: list[tuple[ir.Node, Channels]] = []
        self.no_scale: list[tuple[str, Indices]] = []
        self.no_shift: list[tuple[str, Indices]] = []

    def group(self, residual: Residual) -> SmoothGroup:
        """The group, as far as taps leave channels free."""
        free = np.zeros(self.producer.size, bool)
        for consumer in self.consumers:
            free[consumer.index[consumer.index != FOREIGN]] = True
        for tap in self.taps:
            if residual is Residual.REFUSE or not tap.fixable:
                free[tap.channels.present] = False
        return SmoothGroup(
            self.producer,
            tuple(self.consumers),
            tuple(self.taps),
            free,
            tuple((node, channels) for node, channels in self.clips if free[channels.present].any()),
            _first(self.no_scale, free),
            self.producer.no_shift or _first(self.no_shift, free),
        )


def _first(notes: list[tuple[str, Indices]], free: Mask) -> str:
    return next((note for note, present in notes if note and free[present].any()), "")


def _reach(
    graph: ir.Graph,
    producer: Producer,
    layers: Mapping[ir.Node, Linear],
    order: Mapping[ir.Node, int],
    pad: bool,
    bounds: bool,
) -> _Reach:
    """Follows the channels of a producer, node by node in graph order, to all their ends."""
    reach = _Reach(producer)
    known = {producer.value: producer.channels}
    pending: list[tuple[int, ir.Node]] = []

    def visit(value: ir.Value) -> None:
        if value.is_graph_output():
            reach.taps.append(Tap(value, known[value], None, 0, f"{value.name} is an output of the model"))
        for usage in value.uses():
            if usage.node.graph is not graph:
                reason = "reads it inside a body"
                reach.taps.append(Tap(value, known[value], usage.node, usage.idx, reason))
            elif not _ignores_values(usage.node, usage.idx) and (order[usage.node], usage.node) not in pending:
                heapq.heappush(pending, (order[usage.node], usage.node))

    def end(node: ir.Node, index: int, channels: Channels, why: str) -> None:
        value = node.inputs[index]
        assert value is not None
        reach.taps.append(Tap(value, channels, node, index, why))

    visit(producer.value)
    while pending:
        _, node = heapq.heappop(pending)
        read = {index: known[value] for index, value in enumerate(node.inputs) if value in known}
        read = {index: channels for index, channels in read.items() if not _ignores_values(node, index)}
        for index, why in ends(node, read).items():
            end(node, index, read.pop(index), why)
        if not read:
            continue
        present = np.concatenate([channels.present for channels in read.values()])
        try:
            if (consumer := _consumer(node, read, layers)) is not None:
                reach.consumers.append(consumer)
                reach.no_shift.append((_consumer_no_shift(consumer.linear, pad), present))
                continue
            step = follow(node, read)
        except Blocked as blocked:
            for index, channels in read.items():
                end(node, index, channels, str(blocked))
            continue
        where = f"{node.op_type} {node.name!r} "
        if step.no_scale and not (bounds and step.clips and node.op_type == "Clip"):
            reach.no_scale.append((where + step.no_scale, present))
        if step.no_shift:
            reach.no_shift.append((where + step.no_shift, present))
        for value, channels in step.outputs:
            if channels.present.size and (value.uses() or value.is_graph_output()):
                known[value] = channels
                if step.clips:
                    reach.clips.append((node, channels))
                visit(value)
    return reach


def _ignores_values(node: ir.Node, index: int) -> bool:
    """Whether a node only asks for the shape or the type of an input."""
    return node.op_type in ("Shape", "Size") or (node.op_type in ("CastLike", "ReshapeLike") and index == 1)


def _consumer(node: ir.Node, read: Mapping[int, Channels], layers: Mapping[ir.Node, Linear]) -> Consumer | None:
    linear = layers.get(node)
    if linear is None or set(read) != {linear.data_index}:
        return None
    axis, channels = _input_axis(linear), read[linear.data_index]
    if axis is None or (channels.axes and axis not in channels.axes):
        return None
    index = channels.along(axis, linear.input_channels)
    if index is None:
        raise Blocked("does not sum over these channels")
    return Consumer(linear, index)


def _input_axis(linear: Linear) -> int | None:
    """The axis of the activation that the layer sums over; None where it has none, or no known rank."""
    count = rank(linear.data)
    if count is None or count < 2:
        return None
    match linear.node.op_type:
        case "Conv" | "ConvTranspose":
            return 1
        case "Gemm":
            return 0 if linear.node.attributes.get_int("transA", 0) else 1
    return count - (1 if linear.data_index == 0 else 2)


def _pads(node: ir.Node) -> bool:
    return node.op_type == "Conv" and any(node.attributes.get_ints("pads", []))


def _consumer_no_shift(linear: Linear, pad: bool) -> str:
    """Why the layer cannot absorb an offset of its input into its bias, or ""."""
    node = linear.node
    where = f"{node.op_type} {node.name!r}"
    if node.op_type == "ConvTranspose":
        return f"{where} adds up fewer terms at the border"
    automatic = node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    if node.op_type == "Conv" and (automatic or (_pads(node) and not pad)):
        return f"{where} pads with zeros"
    if node.op_type == "MatMul" and (linear.weight_index == 0 or rank(linear.weight) != 2):
        return f"{where} takes no bias per output channel"
    if linear.bias is not None and constant(linear.bias) is None:
        return f"{where} has a bias that is not constant"
    return ""
