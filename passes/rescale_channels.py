"""Divides channels of a tensor by factors and takes offsets off them, without a change of what the graph computes.

    x~ = (x - z) / s    per channel

is absorbed by what makes x, and undone by every layer that reads it:

    normalisation                     scale / s                (bias - z) / s
    linear layer, of its outputs      W / s                    (b - z) / s
    linear layer, of its inputs       W s                      b + W z
    linear layer between two groups   W s_in / s_out           (b + W z_in - z_out) / s_out
    Relu, Clip, Pad on the way        their bounds, and what is filled in: `qonnx.passes.move_bounds`
    other readers                     one Mul by s and one Add of z in front of all that read the same tensor
    a tensor that nothing absorbs     one Sub of z and one Mul by 1 / s in front of the linear layers

Computed in float64 in one step, however many groups a layer is part of, and stored in the type that the weight had.
Weights are evaluated when the file is written; those that others share are copied. A convolution or Gemm without bias
gets one, a MatMul an Add.

A shift that is folded into a bias as W z takes part in quantization with the rounding error of W: times z, that is a
constant error per output channel. `qonnx.bias_correction` removes it; run it afterwards.

Only when

* the groups were found in this model, and scales are positive and finite;
* channels that a group cannot change have factor 1 and offset 0;
* what is padded with is the same for all channels of a tensor, then as before;
* the new weights do not overflow their type.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.channels import FOREIGN
from qonnx.errors import ModelError
from qonnx.graph import RESCALED, Names, constant, rank
from qonnx.groups import SmoothGroup, Tap
from qonnx.linear import Linear
from qonnx.matching import between
from qonnx.passes.initializers import as_tensor, dtype_of, replace, store
from qonnx.passes.move_bounds import move_bounds, needs_one_number
from qonnx.producers import Kind, Producer

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Rescaling:
    """What to do with one group.

    Attributes:
        group: where.
        scale: [channels] s, positive.
        shift: [channels] z, in units of the tensor before; None for no shift.
        method: what the file shall say about it.
    """

    group: SmoothGroup
    scale: Vector
    shift: Vector | None = None
    method: str = ""

    @property
    def offset(self) -> Vector:
        """The shift, zeros where there is none."""
        return np.zeros(self.scale.shape) if self.shift is None else self.shift


@dataclass(frozen=True, eq=False)
class RescaleChannels(ir.passes.InPlacePass):
    """See the module docstring. Applied again, it scales again: a rescaling says how much, not what to arrive at.

    Attributes:
        rescalings: at most one of each group.
    """

    rescalings: tuple[Rescaling, ...]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Checks everything first: it folds all of it or raises.

        Raises:
            ModelError: a rescaling does not fit its group, or new weights overflow float16.
        """
        active = [one for one in self.rescalings if (one.scale != 1).any() or one.offset.any()]
        for rescaling in active:
            _check(rescaling, model)
        edits: dict[ir.Node, _Edit] = {}
        for rescaling in active:
            _collect(rescaling, edits)
        for edit in edits.values():
            _check_overflow(edit)
        names = Names(model)
        for rescaling in active:
            _mark(rescaling)
        for rescaling in active:
            _restore_taps(rescaling, names)
        for rescaling in active:
            _change_producer(rescaling, names)
        for edit in edits.values():
            _apply(edit, names)
        for rescaling in active:
            move_bounds(rescaling.group, rescaling.scale, rescaling.offset, names)
        return ir.passes.PassResult(model, bool(active))


def _check(rescaling: Rescaling, model: ir.Model) -> None:
    group, scale, shift = rescaling.group, rescaling.scale, rescaling.offset
    where = f"channels of {group.value}"
    if group.producer.value.graph is not model.graph:
        raise ModelError(f"{where}: the group was found in another model; find groups in the model that is changed")
    if scale.shape != (group.producer.size,) or shift.shape != scale.shape:
        raise ModelError(f"{where}: {scale.size} factors and {shift.size} offsets for {group.producer.size} channels")
    if not (np.isfinite(scale) & (scale > 0) & np.isfinite(shift)).all():
        raise ModelError(f"{where}: factors must be positive and finite, offsets finite")
    if (scale[~group.free] != 1).any() or shift[~group.free].any():
        raise ModelError(
            f"{where}: {group.reason or 'some of them'} cannot be changed; leave them at factor 1, offset 0"
        )
    if (scale != 1).any() and group.no_scale:
        raise ModelError(f"{where}: no factor possible: {group.no_scale}")
    if shift.any() and group.no_shift:
        raise ModelError(f"{where}: no offset possible: {group.no_shift}")
    node = needs_one_number(group, scale, shift)
    if node is not None:
        raise ModelError(f"{where}: {node.op_type} {node.name!r} pads all channels with one number; use one offset")


@dataclass(eq=False)
class _Edit:
    """All that happens to one linear layer."""

    linear: Linear
    scale_in: Vector = field(init=False)
    shift_in: Vector = field(init=False)
    scale_out: Vector = field(init=False)
    shift_out: Vector = field(init=False)

    def __post_init__(self) -> None:
        self.scale_in, self.shift_in = np.ones(self.linear.input_channels), np.zeros(self.linear.input_channels)
        self.scale_out, self.shift_out = np.ones(self.linear.output_channels), np.zeros(self.linear.output_channels)

    def factor(self) -> Vector:
        """What the weight is multiplied by, in a shape that broadcasts over it as stored."""
        linear = self.linear
        shape = [1] * (rank(linear.weight) or 0)
        inputs, outputs = self.scale_in, 1 / self.scale_out
        if linear.groups == 1:
            in_shape, out_shape = list(shape), list(shape)
            in_shape[linear.input_axis], out_shape[linear.output_axis] = -1, -1
            return inputs.reshape(in_shape) * outputs.reshape(out_shape)
        # Grouped: one axis holds the channels of all groups, the other those of one.
        whole, part = (outputs, inputs) if linear.node.op_type == "Conv" else (inputs, outputs)
        rows = np.repeat(part.reshape(linear.groups, -1), whole.size // linear.groups, axis=0)
        return (whole[:, None] * rows).reshape(*rows.shape, *shape[2:])

    def response(self) -> Vector:
        """[output channels] what the layer makes of the offset of its input: W z."""
        linear, node = self.linear, self.linear.node
        if not self.shift_in.any() or linear.weight.const_value is None:
            return np.zeros(linear.output_channels)
        weight = linear.weight.const_value.numpy().astype(np.float64)
        if node.op_type == "Conv":
            weight = weight.reshape(*weight.shape[:2], -1).sum(axis=2)
            z = np.repeat(self.shift_in.reshape(linear.groups, -1), weight.shape[0] // linear.groups, axis=0)
            return np.asarray((weight * z).sum(axis=1))
        alpha = node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
        return np.asarray(alpha * np.tensordot(weight, self.shift_in, axes=(linear.input_axis, 0)))


def _collect(rescaling: Rescaling, edits: dict[ir.Node, _Edit]) -> None:
    scale, shift, producer = rescaling.scale, rescaling.offset, rescaling.group.producer
    if producer.linear is not None:
        edit = edits.setdefault(producer.linear.node, _Edit(producer.linear))
        edit.scale_out, edit.shift_out = edit.scale_out * scale, edit.shift_out + shift
    for consumer in rescaling.group.consumers:
        ours = consumer.index != FOREIGN
        edit = edits.setdefault(consumer.linear.node, _Edit(consumer.linear))
        edit.scale_in = edit.scale_in * np.where(ours, scale[consumer.index], 1.0)
        edit.shift_in = edit.shift_in + np.where(ours, shift[consumer.index], 0.0)


def _check_overflow(edit: _Edit) -> None:
    weight = edit.linear.weight.const_value
    if weight is not None and weight.dtype == ir.DataType.FLOAT16:
        largest = float(np.finfo(np.float16).max)
        if (np.abs(weight.numpy() * edit.factor()) > largest).any():
            raise ModelError(f"weight {edit.linear.weight.name}: scaled, it overflows float16; use a float32 model")


def _apply(edit: _Edit, names: Names) -> None:
    """Writes the new weight and bias of a layer."""
    linear, tensor = edit.linear, edit.linear.weight.const_value
    assert tensor is not None
    bias = (edit.response() - edit.shift_out) / edit.scale_out
    if (edit.scale_in != 1).any() or (edit.scale_out != 1).any():
        factor = edit.factor()

        def evaluate() -> ir.TensorProtocol:
            product = tensor.numpy().astype(np.float64) * factor
            return ir.Tensor(product.astype(tensor.dtype.numpy()), dtype=tensor.dtype)

        scaled = ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()))
        _replace_weight(linear, scaled, names)
    if bias.any() or (edit.scale_out != 1).any():
        _change_bias(edit, bias, names)


def _replace_weight(linear: Linear, tensor: ir.TensorProtocol, names: Names) -> None:
    """Makes a layer read a new weight; a path to it that other layers share is copied."""
    reader, index = linear.weight_reader
    if all(len(node.outputs[0].uses()) == 1 for node in linear.weight_path):
        replace(reader, index, tensor, names)
        return
    graph = linear.node.graph
    assert isinstance(graph, ir.Graph)
    value = store(graph, names.fresh(f"{linear.weight.name}_rescaled"), tensor)
    for node in linear.weight_path:
        copy = ir.node(
            node.op_type,
            [value, *node.inputs[1:]],
            attributes=dict(node.attributes),
            name=names.fresh(f"{node.name}_rescaled"),
            metadata_props=dict(node.metadata_props),
        )
        old = node.outputs[0]
        value = copy.outputs[0]
        value.name, value.type, value.shape = names.fresh(f"{old.name}_rescaled"), old.type, old.shape
        graph.insert_before(linear.node, [copy])
    linear.node.replace_input_with(linear.weight_index, value)


def _change_bias(edit: _Edit, added: Vector, names: Names) -> None:
    """Makes the bias (b / s_out + added), with a new one where there is none."""
    linear, node = edit.linear, edit.linear.node
    kind = linear.weight.dtype or ir.DataType.FLOAT
    bare = node.op_type == "MatMul" and linear.weight_index == 0
    old = None if linear.bias is None or bare else constant(linear.bias)
    if old is not None:
        beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
        node.attributes.pop("beta", None)
        bias = beta * old.astype(np.float64) / edit.scale_out + added
        kind = linear.bias.dtype or kind if linear.bias is not None else kind
        assert linear.bias_node is not None
        replace(linear.bias_node, list(linear.bias_node.inputs).index(linear.bias), as_tensor(bias, kind), names)
    elif added.any() and node.op_type != "MatMul":
        node.attributes.pop("beta", None)
        replace(node, 2, as_tensor(added, kind), names)
    elif added.any():
        _add_behind(node.outputs[0], node, as_tensor(added, kind), names)


def _mark(rescaling: Rescaling) -> None:
    """Says at every operator whose result changes that it does: it cannot be compared with the original's."""
    producer, consumers = rescaling.group.producer, rescaling.group.consumers
    if producer.kind is Kind.NONE:
        return  # its result stays: what is put behind it is new
    changed = [*between(producer.value, [consumer.linear.data for consumer in consumers])]
    if producer.linear is not None and producer.linear.bias_node is not None:
        changed.append(producer.linear.bias_node)
    for node in (producer.node, *changed):
        if node is not None:
            node.metadata_props[RESCALED] = rescaling.method or "yes"


def _change_producer(rescaling: Rescaling, names: Names) -> None:
    """Scale and bias of a normalisation; the operators of their own where nothing absorbs them."""
    producer, scale, shift = rescaling.group.producer, rescaling.scale, rescaling.offset
    if producer.kind is Kind.NONE:
        _insert_in_front(rescaling, names)
    if producer.scale is None:
        return
    node, index = producer.scale
    old = constant(node.inputs[index])
    assert old is not None
    factors, offsets = scale.reshape(old.shape), shift.reshape(old.shape)
    kind = dtype_of(node.inputs[index])
    replace(node, index, as_tensor(old.astype(np.float64) / factors, kind), names)
    if producer.bias is not None:
        node, index = producer.bias
        value = node.inputs[index] if index < len(node.inputs) else None
        bias = constant(value)
        if bias is not None:
            replace(node, index, as_tensor((bias.astype(np.float64) - offsets) / factors, dtype_of(value)), names)
        elif shift.any():
            replace(node, index, as_tensor(-offsets / factors, kind), names)


def _insert_in_front(rescaling: Rescaling, names: Names) -> None:
    """One Sub and one Mul behind a tensor that nothing can scale, for the linear layers of the group only."""
    producer = rescaling.group.producer
    value = producer.value
    if rescaling.offset.any():
        value = _behind(value, producer, "Sub", rescaling.offset, 0.0, names, "shifted")
    if (rescaling.scale != 1).any():
        value = _behind(value, producer, "Mul", 1 / rescaling.scale, 1.0, names, "scaled")
    for consumer in rescaling.group.consumers:
        consumer.linear.node.replace_input_with(consumer.linear.data_index, value)


def _behind(
    value: ir.Value, like: Producer | Tap, op: str, vector: Vector, neutral: float, names: Names, word: str
) -> ir.Value:
    """The result of an operator with a constant per channel, put directly behind a value."""
    graph = like.value.graph
    assert isinstance(graph, ir.Graph)
    stem, kind = f"{like.value.name}_{word}", dtype_of(value)
    operand = as_tensor(like.channels.spread(vector, neutral, rank(value) or 0), kind)
    node = ir.node(
        op,
        [value, store(graph, names.fresh(f"{stem}_by"), operand)],
        name=names.fresh(f"{stem}_{op}"),
        outputs=[ir.Value(name=names.fresh(stem), type=value.type, shape=value.shape)],
        metadata_props={"qonnx.pass": "RescaleChannels"},
    )
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], [node])
    else:
        graph.insert_after(producer, [node])
    return node.outputs[0]


def _restore_taps(rescaling: Rescaling, names: Names) -> None:
    """Gives every other reader of the channels what it read before: x = s x~ + z.

    Where it reads channels of another group, too, these may have been given back already.
    """
    scale, shift = rescaling.scale, rescaling.offset
    changed = (scale != 1) | (shift != 0)
    restored: dict[ir.Value, ir.Value] = {}
    for tap in rescaling.group.taps:
        if tap.node is None or not changed[tap.channels.present].any():
            continue
        read = tap.node.inputs[tap.input]
        assert read is not None
        if read not in restored:
            value = read
            if (scale != 1).any():
                value = _behind(value, tap, "Mul", scale, 1.0, names, "unscaled")
            if shift.any():
                value = _behind(value, tap, "Add", shift, 0.0, names, "restored")
            restored[read] = value
        tap.node.replace_input_with(tap.input, restored[read])


def _add_behind(value: ir.Value, node: ir.Node, bias: ir.TensorProtocol, names: Names) -> None:
    """Puts an Add behind a MatMul; its result takes the name of the product."""
    graph, name = node.graph, value.name or node.name or "MatMul"
    assert isinstance(graph, ir.Graph)
    operand = store(graph, names.fresh(f"{node.name}_bias"), bias)
    add = ir.node(
        "Add",
        [value, operand],
        name=names.fresh(f"{node.name}_Add"),
        outputs=[ir.Value(name=names.fresh(f"{name}_sum"), type=value.type, shape=value.shape)],
        metadata_props={**node.metadata_props, "qonnx.pass": "RescaleChannels"},
    )
    value.replace_all_uses_with(add.outputs[0], replace_graph_outputs=True)
    add.replace_input_with(0, value)
    graph.insert_after(node, [add])
    value.name, add.outputs[0].name = add.outputs[0].name, name
