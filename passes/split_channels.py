"""Repeats channels that stick out, each copy with its share of the weight that reads it.

    y = sum over c of x_c W_c  =  sum over c and its k_c copies of x_c (W_c / k_c)

Alone that changes nothing. But a factor per channel (`qonnx.passes.rescale_channels`) can then divide each copy by k_c:
one scale fits the tensor, and no weight has grown. From: Zhao et al., "Improving Neural Network Quantization without
Retraining using Outlier Channel Splitting", ICML 2019, with any number of copies.

Copies are made where channels come from: every linear layer that they are computed from, element by element, makes them
several times. No node is added; the layers grow by a few channels.

    down(silu(gate(x)) * up(x))        gate and up make more channels, down reads more

Only when

* the layer is a MatMul or Gemm of its own weight that sums over the last axis of what it reads;
* what it reads is made element by element, with numbers or constants per channel, from the results of such layers;
* nothing else reads these results, or anything in between, and none is an output of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.errors import ModelError
from qonnx.graph import Names, constant
from qonnx.linear import Linear, linear_of
from qonnx.passes.infer_shapes import InferShapes
from qonnx.passes.initializers import as_tensor, dtype_of, replace

# fmt: off
_ELEMENTWISE = frozenset({
    "Abs", "Add", "Cast", "Clip", "Div", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg", "Pow", "Relu", "Selu", "Sigmoid", "Softplus",
    "Sqrt", "Sub", "Swish", "Tanh",
})
# fmt: on


@dataclass(frozen=True)
class Split:
    """What to do with the inputs of one layer.

    Attributes:
        node: the name of the layer.
        copies: [input channels] how often each is there afterwards; 1 for as it is.
    """

    node: str
    copies: tuple[int, ...]

    @property
    def index(self) -> npt.NDArray[np.intp]:
        """[channels afterwards] which channel each is: all once, then the copies in order."""
        copies = np.asarray(self.copies)
        once = np.arange(copies.size)
        return np.concatenate([once, np.repeat(once, copies - 1)])


@dataclass(frozen=True)
class SplitChannels(ir.passes.InPlacePass):
    """See the module docstring.

    Attributes:
        splits: at most one of each layer.
    """

    splits: tuple[Split, ...]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Makes all copies.

        Raises:
            ModelError: a layer is not in the model, or its channels cannot be repeated.
        """
        nodes, names = {node.name: node for node in model.graph}, Names(model)
        for split in self.splits:
            node = nodes.get(split.node)
            region = None if node is None else find_region(node)
            if region is None or min(split.copies) < 1 or len(split.copies) != region.layer.input_channels:
                raise ModelError(f"the inputs of {split.node!r} cannot be repeated; leave this split out")
            _repeat(region, split, names)
        if self.splits:
            InferShapes()(model)
        return ir.passes.PassResult(model, bool(self.splits))


@dataclass(frozen=True, eq=False)
class Region:
    """Everything between the layers that make the channels of a tensor and the one that reads them.

    Attributes:
        layer: the reader.
        makers: the layers that the channels come from.
        constants: where nodes in between read a constant per channel.
        values: what is computed in between, results of the makers included.
    """

    layer: Linear
    makers: tuple[Linear, ...]
    constants: tuple[tuple[ir.Node, int], ...]
    values: tuple[ir.Value, ...]


def find_region(node: ir.Node) -> Region | None:
    """The region in front of a layer whose input channels can be repeated; None for all others."""
    layer = _plain(linear_of(node))
    if layer is None or node.graph is None:
        return None
    size, makers, constants = layer.input_channels, [], []
    inside: dict[ir.Value, None] = {}
    readers: set[ir.Node] = {node}
    pending = [layer.data]
    while pending:
        value = pending.pop()
        if value in inside:
            continue
        inside[value] = None
        maker = _maker(value)
        if maker is not None:
            if maker.output_channels != size or maker.node is node:
                return None
            makers.append(maker)
            inside[maker.node.outputs[0]] = None
            readers.add(maker.bias_node or maker.node)
            continue
        producer = value.producer()
        if producer is None or producer.op_type not in _ELEMENTWISE or producer.domain not in ("", "ai.onnx"):
            return None
        readers.add(producer)
        for index, read in enumerate(producer.inputs):
            if read is None:
                continue
            array = constant(read)
            if array is None:
                pending.append(read)
            elif array.ndim and array.shape[-1] == size and array.size == size:
                constants.append((producer, index))
            elif array.size != 1:
                return None
    closed = all(
        not value.is_graph_output() and all(usage.node in readers for usage in value.uses()) for value in inside
    )
    distinct = len({maker.node for maker in makers}) == len(makers)
    return Region(layer, tuple(makers), tuple(constants), tuple(inside)) if closed and distinct and makers else None


def _maker(value: ir.Value) -> Linear | None:
    """The layer whose result, bias included, a value is."""
    producer = value.producer()
    for node in (producer, *(() if producer is None else (one.producer() for one in producer.inputs if one))):
        linear = None if node is None else _plain(linear_of(node))
        if linear is not None and linear.output is value:
            return linear
    return None


def _plain(linear: Linear | None) -> Linear | None:
    """A MatMul or Gemm with a stored matrix of its own, and a bias per output channel if any."""
    if linear is None or linear.node.op_type not in ("MatMul", "Gemm") or linear.weight_index != 1:
        return None
    if linear.weight_path or linear.weight.is_graph_input() or linear.weight.const_value is None:
        return None
    if len(linear.weight.const_value.shape) != 2 or linear.node.attributes.get_int("transA", 0) == 1:
        return None
    if linear.bias is not None:
        bias = constant(linear.bias)
        if bias is None or bias.size not in (1, linear.output_channels) or bias.size != (bias.shape or (1,))[-1]:
            return None
    return linear


def _repeat(region: Region, split: Split, names: Names) -> None:
    index, copies = split.index, np.asarray(split.copies)
    for maker in region.makers:
        _taken(maker.node, maker.weight_index, index, maker.output_axis, names)
        bias = constant(maker.bias)
        if bias is not None and bias.size == copies.size and maker.bias_node is not None and maker.bias is not None:
            _taken(maker.bias_node, list(maker.bias_node.inputs).index(maker.bias), index, -1, names)
    for node, place in region.constants:
        _taken(node, place, index, -1, names)
    layer = region.layer
    _taken(layer.node, layer.weight_index, index, layer.input_axis, names, 1 / copies[index])
    for value in region.values:
        value.shape = None if value.shape is None else ir.Shape([*value.shape[:-1], int(index.size)])


def _taken(
    node: ir.Node,
    place: int,
    index: npt.NDArray[np.intp],
    axis: int,
    names: Names,
    factors: npt.NDArray[np.float64] | None = None,
) -> None:
    """Gives a node the elements of its constant along an axis that `index` names, times factors."""
    value = node.inputs[place]
    assert value is not None
    stored = ir.convenience.get_const_tensor(value)
    assert stored is not None
    dtype, shape = dtype_of(value), [int(size) for size in stored.shape.numpy()]
    shape[axis] = index.size

    def compute(tensor: ir.TensorProtocol = stored) -> ir.TensorProtocol:
        array = np.take(tensor.numpy(), index, axis=axis)
        if factors is not None:
            along = [-1 if number == axis % array.ndim else 1 for number in range(array.ndim)]
            array = array.astype(np.float64) * factors.reshape(along)
        return as_tensor(array, dtype)

    lazy: Callable[[], ir.TensorProtocol] = compute
    replace(node, place, ir.LazyTensor(lazy, dtype=dtype, shape=ir.Shape(shape), cache=False), names, "repeated")
