"""Random small networks with random weights, put together from the blocks that real networks are made of."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

Choice = TypeVar("Choice")

SAMPLES = 4
"""Along the first axis of every input, which is called `n` where it is dynamic."""

# Larger tensors are outputs; no block reads them.
_ELEMENTS = 16384
_VOCABULARY = 20
_OPSETS = (11, 13, 14, 16, 17, 18, 19, 20, 21, 22, 23)


class Network:
    """A graph in the making. The shapes of all of its values are known while it is made; samples are the first axis."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = self.pick(*_OPSETS)
        self.dynamic = self.chance(0.6)
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.table: ir.Value | None = None
        self._named = self.chance(0.8)
        self._in_nodes = self.chance(0.2)
        self._types: dict[str, onnx.TypeProto] = {}
        self._weights: dict[tuple[int, ...], ir.Value] = {}

    def pick(self, *options: Choice) -> Choice:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Adds a node; returns its one result."""
        return self.ops(kind, *inputs, count=1, **attributes)[0]

    def ops(self, kind: str, *inputs: ir.Value | None, count: int, **attributes: Any) -> Sequence[ir.Value]:
        """Adds a node with several results."""
        number = len(self.nodes)
        name = f"{kind}_{number}" if self._named else None
        node = ir.node(kind, inputs, attributes, num_outputs=count, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"v{number}_{index}"
        self.nodes.append(node)
        self._infer(node)
        return node.outputs

    def listed(self, kind: str, x: ir.Value, name: str, values: list[int], since: int, **others: Any) -> ir.Value:
        """Adds a node with a list of integers: an attribute of that name before opset `since`, and else an input."""
        if self.opset >= since:
            return self.op(kind, x, self.integers(*values), **others)
        return self.op(kind, x, **{name: values}, **others)

    def input(self, shape: Sequence[int], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        value = ir.val(f"x{len(self.inputs)}", dtype, [SAMPLES, *shape])
        self.inputs.append(value)
        return self._known(value)

    def constant(self, array: npt.ArrayLike) -> ir.Value:
        """An initializer, or in some networks the result of a node. Floats are float32."""
        data = np.asarray(array)
        tensor = ir.tensor(data.astype(np.float32) if data.dtype == np.float64 else data)
        if self._in_nodes:
            value = self.op("Constant", value=tensor)
            value.const_value, tensor.name = tensor, value.name
            return value
        value = ir.val(f"c{len(self.initializers)}", const_value=tensor)
        tensor.name = value.name
        self.initializers.append(value)
        return self._known(value)

    def integers(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def vector(self, size: int, mean: float = 0.0) -> ir.Value:
        """What norms and layers have one of per channel."""
        return self.constant(mean + 0.3 * self.rng.standard_normal(size))

    def weight(self, *shape: int, fan_in: int) -> ir.Value:
        """A weight that keeps the size of what it is multiplied with; now and then one that is there already."""
        if shape in self._weights and self.chance(0.2):
            return self._weights[shape]
        data = (self.rng.standard_normal(shape) / math.sqrt(fan_in)).astype(np.float32)
        if self.chance(0.2):
            data *= np.exp(self.rng.standard_normal((shape[0],) + (1,) * (len(shape) - 1))).astype(np.float32)
        self._weights[shape] = self._stored(data)
        return self._weights[shape]

    def _stored(self, data: npt.NDArray[np.float32]) -> ir.Value:
        """The weight as exporters store weights."""
        match self.pick(*["plain"] * 7, "transposed", "half", "flat"):
            case "transposed":
                order = list(range(data.ndim))[::-1]
                return self.op("Transpose", self.constant(np.ascontiguousarray(data.transpose(order))), perm=order)
            case "half":
                return self.op("Cast", self.constant(data.astype(np.float16)), to=ir.DataType.FLOAT.value)
            case "flat":
                return self.op("Reshape", self.constant(data.ravel()), self.integers(*data.shape))
        return self.constant(data)

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """Reshapes each sample."""
        return self.op("Reshape", x, self.integers(0 if self.dynamic else SAMPLES, *shape))

    def shaped(self, value: ir.Value, *shape: int) -> ir.Value:
        """Tells the shape of what bodies return, which is not inferred."""
        value.shape = ir.Shape(shape)
        return self._known(value)

    def _known(self, value: ir.Value) -> ir.Value:
        self._types[value.name or ""] = ir.serde.serialize_value(value).type
        return value

    def _infer(self, node: ir.Node) -> None:
        """Finds the types and shapes of results. Those of all values so far are given: bodies read them."""
        known = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(node.op_type, self.opset),
            ir.serde.serialize_node(node),
            self._types,
            {
                value.name or "": ir.serde.serialize_tensor(value.const_value)
                for value in node.inputs
                if value is not None and value.const_value is not None
            },
            opset_imports=[onnx.OperatorSetIdProto(version=self.opset)],
        )
        for value in node.outputs:
            proto = known[value.name or ""]
            value.type = ir.serde.deserialize_type_proto_for_type(proto)
            value.shape = ir.serde.deserialize_type_proto_for_shape(proto)
            self._types[value.name or ""] = proto

    def model(self, outputs: Sequence[ir.Value]) -> ir.Model:
        """The finished network: only inputs and outputs tell their shapes."""
        for value in (value for node in self.nodes for value in node.outputs):
            shape, value.shape = value.shape, None
            if value in outputs:
                value.shape = shape
        if self.dynamic:
            for value in (*self.inputs, *outputs):
                value.shape = ir.Shape(["n", *size(value)[1:]])
        graph = ir.Graph(
            self.inputs,
            outputs,
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={"": self.opset},
            name="random",
        )
        return ir.Model(graph, ir_version=8 if self.opset < 21 else 10)


def size(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None, value
    return value.shape.numpy()


# Activations: of any shape.


def none(net: Network, x: ir.Value) -> ir.Value:
    return x


def relu(net: Network, x: ir.Value) -> ir.Value:
    return net.op("Relu", x)


def gelu(net: Network, x: ir.Value) -> ir.Value:
    if net.opset >= 20 and net.chance(0.3):
        return net.op("Gelu", x)
    half = net.op("Mul", x, net.constant(0.5))
    return net.op("Mul", half, net.op("Add", net.op("Erf", net.op("Div", x, net.constant(2**0.5))), net.constant(1.0)))


def hard_swish(net: Network, x: ir.Value) -> ir.Value:
    if net.opset >= 14 and net.chance(0.5):
        return net.op("HardSwish", x)
    if net.chance(0.5):
        return net.op("Mul", x, net.op("HardSigmoid", x, alpha=1 / 6))
    bounded = net.op("Clip", net.op("Add", x, net.constant(3.0)), net.constant(0.0), net.constant(6.0))
    return net.op("Div", net.op("Mul", x, bounded), net.constant(6.0))


def silu(net: Network, x: ir.Value) -> ir.Value:
    return net.op("Mul", x, net.op("Sigmoid", x))


def relu6(net: Network, x: ir.Value) -> ir.Value:
    if net.chance(0.3):
        return net.op("Min", net.op("Max", x, net.constant(0.0)), net.constant(6.0))
    return net.op("Clip", x, net.constant(0.0), net.constant(6.0))


def prelu(net: Network, x: ir.Value) -> ir.Value:
    if len(size(x)) != 4:
        return net.op("LeakyRelu", x, alpha=0.1)
    return net.op("PRelu", x, net.constant(0.2 * net.rng.random((size(x)[1], 1, 1))))


def smooth(net: Network, x: ir.Value) -> ir.Value:
    return net.op(net.pick("Sigmoid", "Tanh", "Elu", "Softplus"), x)


def activation(net: Network, x: ir.Value) -> ir.Value:
    """An activation, or none."""
    return net.pick(*[none] * 2, *[relu] * 2, gelu, hard_swish, silu, relu6, prelu, smooth)(net, x)


# Images: samples, channels, height, width.


def convolution(net: Network, x: ir.Value) -> ir.Value:
    _, channels, height, width = size(x)
    choices = [(1, 16), (1, 16), (1, 24), (channels, channels), (channels, 2 * channels)]
    groups, outputs = net.pick(*choices, (2, 16) if channels % 2 == 0 else (1, 6))
    kernel, dilation, stride = net.pick(1, 3, 3, 5), net.pick(1, 1, 2), net.pick(1, 1, 2)
    reach = dilation * (kernel - 1)
    some = [[reach // 2] * 4, [reach // 2] * 4, [reach, reach, 0, 0]]
    pads = net.pick(*some, *([[0] * 4] if reach < min(height, width) else []))
    weight = net.weight(outputs, channels // groups, kernel, kernel, fan_in=channels // groups * kernel**2)
    biases = [net.vector(outputs)] if net.chance(0.5) else []
    shared = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "dilations": [dilation] * 2, "group": groups}
    y = net.op("Conv", x, weight, *biases, pads=pads, **shared)
    if net.chance(0.4):
        variance = net.constant(0.5 + net.rng.random(outputs))
        vectors = [net.vector(outputs, mean=1.0), net.vector(outputs), net.vector(outputs), variance]
        y = net.op("BatchNormalization", y, *vectors)
    return activation(net, y)


def inverted_residual(net: Network, x: ir.Value) -> ir.Value:
    """MobileNet's: wider by a 1 x 1 convolution, depthwise, narrower by another, and added to the input."""
    channels = size(x)[1]
    wide = 2 * channels
    y = net.op("Conv", x, net.weight(wide, channels, 1, 1, fan_in=channels), net.vector(wide))
    y = net.op("Conv", relu6(net, y), net.weight(wide, 1, 3, 3, fan_in=9), group=wide, pads=[1] * 4)
    if net.chance(0.5):
        y = squeeze_excite(net, activation(net, y))
    y = net.op("Conv", y, net.weight(channels, wide, 1, 1, fan_in=wide), net.vector(channels))
    return net.op("Add", x, y)


def squeeze_excite(net: Network, x: ir.Value) -> ir.Value:
    channels, few = size(x)[1], net.pick(4, 16)
    pooled = net.op("GlobalAveragePool", x) if net.chance(0.5) else net.listed("ReduceMean", x, "axes", [2, 3], 18)
    if net.chance(0.5):
        y = net.op("Relu", net.op("Conv", pooled, net.weight(few, channels, 1, 1, fan_in=channels), net.vector(few)))
        y = net.op("Conv", y, net.weight(channels, few, 1, 1, fan_in=few), net.vector(channels))
    else:
        flat = net.op("Flatten", pooled)
        y = net.op("Relu", net.op("Gemm", flat, net.weight(few, channels, fan_in=channels), net.vector(few), transB=1))
        y = net.reshape(net.op("MatMul", y, net.weight(few, channels, fan_in=few)), channels, 1, 1)
    return net.op("Mul", *net.pick((x, gate := net.op(net.pick("Sigmoid", "HardSigmoid"), y)), (gate, x)))


def pooling(net: Network, x: ir.Value) -> ir.Value:
    if min(size(x)[2:]) < 3 or net.chance(0.3):
        return net.op("GlobalAveragePool", x)
    if net.chance(0.3):  # a pyramid of one
        same = net.op("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4)
        return net.op("Concat", x, same, axis=1)
    return net.op(net.pick("MaxPool", "AveragePool"), x, kernel_shape=[2, 2], strides=[2, 2])


def two_paths(net: Network, x: ir.Value) -> ir.Value:
    """One half of the channels takes a detour."""
    half, odd = divmod(size(x)[1], 2)
    if odd or not half:
        return convolution(net, x)
    if net.chance(0.5):
        first, second = halves(net, x, net.pick(1, -3))
    else:
        bounds = [[net.integers(edge) for edge in (start, end, 1)] for start, end in ((0, half), (half, 2**31))]
        first, second = (net.op("Slice", x, *bound) for bound in bounds)
    detour = net.op("Conv", first, net.weight(half, half, 3, 3, fan_in=9 * half), net.vector(half), pads=[1] * 4)
    return net.op("Concat", activation(net, detour), second, axis=1)


def halves(net: Network, x: ir.Value, axis: int) -> Sequence[ir.Value]:
    return split(net, x, axis, [size(x)[axis] // 2] * 2)


def split(net: Network, x: ir.Value, axis: int, sizes: list[int]) -> Sequence[ir.Value]:
    if net.opset >= 13:
        return net.ops("Split", x, net.integers(*sizes), count=len(sizes), axis=axis)
    return net.ops("Split", x, count=len(sizes), axis=axis, split=sizes)


def space_to_channels(net: Network, x: ir.Value) -> ir.Value:
    """YOLO's Focus, channel shuffling, or an operator that does the like."""
    _, channels, height, width = size(x)
    if height % 2 or width % 2:
        return net.op("Pad", x, net.integers(0, 0, 1, 0, 0, 0, 0, 1))
    if channels % 2 == 0 and net.chance(0.5):
        pairs = net.op("Transpose", net.reshape(x, 2, channels // 2, height, width), perm=[0, 2, 1, 3, 4])
        return net.reshape(pairs, channels, height, width)
    if net.chance(0.3):
        return net.op("SpaceToDepth", x, blocksize=2)
    ends, axes, steps = net.integers(2**31, 2**31), net.integers(2, 3), net.integers(2, 2)
    starts = [net.integers(top, left) for top in (0, 1) for left in (0, 1)]
    return net.op("Concat", *(net.op("Slice", x, start, ends, axes, steps) for start in starts), axis=1)


def larger(net: Network, x: ir.Value) -> ir.Value:
    channels = size(x)[1]
    if net.chance(0.5):
        kernel = net.pick(2, 3)
        weight = net.weight(channels, 4, kernel, kernel, fan_in=channels * kernel)
        biases = [net.vector(4)] if net.chance(0.5) else []
        return activation(net, net.op("ConvTranspose", x, weight, *biases, strides=[2, 2]))
    nothing = None if net.opset >= 13 else net.constant(np.zeros(0, np.float32))
    return net.op("Resize", x, nothing, net.constant([1.0, 1.0, 2.0, 2.0]), mode=net.pick("nearest", "linear"))


def instance_norm(net: Network, x: ir.Value) -> ir.Value:
    channels = size(x)[1]
    return net.op("InstanceNormalization", x, net.vector(channels, mean=1.0), net.vector(channels))


def channels_last(net: Network, x: ir.Value) -> ir.Value:
    """ConvNeXt's: norm and multi-layer perceptron over the channels of each pixel."""
    y = mlp(net, layer_norm(net, net.op("Transpose", x, perm=[0, 2, 3, 1])))
    return net.op("Transpose", y, perm=[0, 3, 1, 2])


def affine(net: Network, x: ir.Value) -> ir.Value:
    """A constant for each channel."""
    shape = (size(x)[1], 1, 1) if len(size(x)) == 4 else size(x)[-1]
    return net.op(net.pick("Add", "Mul", "Sub", "Div"), x, net.constant(1.5 + 0.2 * net.rng.standard_normal(shape)))


def to_sequence(net: Network, x: ir.Value) -> ir.Value:
    _, channels, height, width = size(x)
    if height * width > 64:
        return convolution(net, x)
    return net.op("Transpose", net.reshape(x, channels, height * width), perm=[0, 2, 1])


def to_vector(net: Network, x: ir.Value) -> ir.Value:
    if len(size(x)) == 3:
        return net.op("Gather", x, net.constant(np.array(net.pick(0, -1))), axis=1)
    if math.prod(size(x)[1:]) > 512:
        x = net.op("GlobalAveragePool", x)
    return net.op("Flatten", x) if net.chance(0.5) else net.reshape(x, -1)


# Sequences: samples, tokens, features; and vectors: samples, features.


def linear(net: Network, x: ir.Value, outputs: int) -> ir.Value:
    """A weight of each form that exporters write for a linear layer."""
    inputs = size(x)[-1]
    forms = ["product", "product", "biased", "batched"] + ["gemm", "gemm", "scaled"] * (len(size(x)) == 2)
    match net.pick(*forms):
        case "gemm":
            return net.op("Gemm", x, net.weight(outputs, inputs, fan_in=inputs), net.vector(outputs), transB=1)
        case "scaled":
            bias = net.constant(net.rng.standard_normal(net.pick((1,), (outputs,), (1, outputs))))
            return net.op("Gemm", x, net.weight(inputs, outputs, fan_in=inputs), bias, alpha=0.5, beta=2.0)
        case "batched" if len(size(x)) == 3:
            return net.op("MatMul", x, net.weight(1, inputs, outputs, fan_in=inputs))
        case "biased":
            y = net.op("MatMul", x, net.weight(inputs, outputs, fan_in=inputs))
            return net.op("Add", *net.pick((y, bias := net.vector(outputs)), (bias, y)))
    return net.op("MatMul", x, net.weight(inputs, outputs, fan_in=inputs))


def layer(net: Network, x: ir.Value) -> ir.Value:
    return activation(net, linear(net, x, net.pick(12, 16, 24, 32)))


def mlp(net: Network, x: ir.Value) -> ir.Value:
    wide = net.pick(16, 32)
    if net.chance(0.4):  # gated: two layers, or two halves of one
        gate, y = halves(net, linear(net, x, 2 * wide), -1) if net.chance(0.5) else _layers(net, x, wide, wide)
        y = net.op("Mul", silu(net, gate), y)
    else:
        y = activation(net, linear(net, x, wide))
    return net.op("Add", x, linear(net, y, size(x)[-1]))


def _layers(net: Network, x: ir.Value, *outputs: int) -> Sequence[ir.Value]:
    """Linear layers beside each other."""
    return [linear(net, x, each) for each in outputs]


def layer_norm(net: Network, x: ir.Value) -> ir.Value:
    weight, bias = net.vector(size(x)[-1], mean=1.0), net.vector(size(x)[-1])
    if net.opset >= 17 and net.chance(0.5):
        return net.op("LayerNormalization", x, weight, *([bias] if net.chance(0.7) else []))
    centred = net.op("Sub", x, net.listed("ReduceMean", x, "axes", [-1], 18))
    return net.op("Add", net.op("Mul", _normed(net, centred), weight), bias)


def rms_norm(net: Network, x: ir.Value) -> ir.Value:
    weight = net.vector(size(x)[-1], mean=1.0)
    if net.opset >= 23 and net.chance(0.5):
        return net.op("RMSNormalization", x, weight)
    return net.op("Mul", _normed(net, x), weight)


def _normed(net: Network, x: ir.Value) -> ir.Value:
    """The input over its root mean square."""
    squares = net.op("Pow", x, net.constant(2.0)) if net.chance(0.5) else net.op("Mul", x, x)
    mean = net.op("Add", net.listed("ReduceMean", squares, "axes", [-1], 18), net.constant(1e-5))
    if net.chance(0.5):
        return net.op("Div", x, net.op("Sqrt", mean))
    return net.op("Mul", x, net.op("Reciprocal", net.op("Sqrt", mean)))


def attention(net: Network, x: ir.Value) -> ir.Value:
    """Written out, with as many heads for keys and values as for queries, or with one."""
    tokens, features = size(x)[1:]
    if tokens > 64:
        return layer(net, x)
    heads, each = net.pick(1, 2, 4), 16
    groups = net.pick(1, heads, heads)
    read = net.pick(layer_norm, rms_norm)(net, x) if net.chance(0.6) else x
    counts = (heads, groups, groups)
    projected = _projections(net, read, [count * each for count in counts])
    query, key, value = (_heads(net, part, count) for part, count in zip(projected, counts, strict=True))
    scores = net.op("MatMul", query, net.op("Transpose", key, perm=[0, 1, 3, 2]))
    scale = each**-0.5
    scores = net.op("Mul", scores, net.constant(scale)) if net.chance(0.5) else net.op("Div", scores, _root(net, each))
    mixed = net.op("MatMul", net.op("Softmax", _masked(net, scores, tokens), axis=3), value)
    joined = net.reshape(net.op("Transpose", mixed, perm=[0, 2, 1, 3]), tokens, heads * each)
    return net.op("Add", x, linear(net, joined, features))


def _projections(net: Network, x: ir.Value, outputs: list[int]) -> Sequence[ir.Value]:
    """One linear layer that is split, or several."""
    if net.chance(0.6):
        return _layers(net, x, *outputs)
    return split(net, linear(net, x, sum(outputs)), -1, outputs)


def _heads(net: Network, x: ir.Value, count: int) -> ir.Value:
    return net.op("Transpose", net.reshape(x, size(x)[1], count, size(x)[2] // count), perm=[0, 2, 1, 3])


def _root(net: Network, number: int) -> ir.Value:
    return net.op("Sqrt", net.constant(float(number)))


def _masked(net: Network, scores: ir.Value, tokens: int) -> ir.Value:
    """No token sees later ones, or all see all."""
    low = net.pick(-np.inf, -1e4, -1e9)
    match net.pick("none", "none", "added", "chosen"):
        case "added":
            return net.op("Add", scores, net.constant(np.triu(np.full((tokens, tokens), low), 1)))
        case "chosen":
            return net.op("Where", net.constant(np.tri(tokens, dtype=bool)), scores, net.constant(low))
    return scores


def softmax_pooling(net: Network, x: ir.Value) -> ir.Value:
    """Sums of tokens, weighted by how much each has to say."""
    scores = net.op("Transpose", linear(net, x, net.pick(1, 16)), perm=[0, 2, 1])
    return net.op("MatMul", net.op("Softmax", scores, axis=2), x)


def over_tokens(net: Network, x: ir.Value) -> ir.Value:
    """A weight on the left, or a convolution: what mixes tokens."""
    tokens = size(x)[1]
    if net.chance(0.5):
        return net.op("MatMul", net.weight(16, tokens, fan_in=tokens), x)
    return activation(net, net.op("Conv", x, net.weight(16, tokens, 3, fan_in=3 * tokens), net.vector(16), pads=[1, 1]))


def over_time(net: Network, x: ir.Value) -> ir.Value:
    """The mean or maximum of all tokens."""
    return net.listed(net.pick("ReduceMean", "ReduceMax"), x, "axes", [1], 18, keepdims=0)


def turned(net: Network, x: ir.Value) -> ir.Value:
    return net.op("Transpose", x, perm=[0, 2, 1])


def bounded(net: Network, x: ir.Value) -> ir.Value:
    if net.chance(0.5):
        return net.op("Where", net.op("Less", x, net.constant(0.0)), net.constant(0.1), x)
    return net.op("Min", net.op("Max", x, net.constant(-0.5)), net.constant(2.0))


def tied_head(net: Network, x: ir.Value) -> ir.Value:
    """Scores of words, by the table that looks words up."""
    if net.table is None:
        net.table = net.constant(net.rng.standard_normal((_VOCABULARY, 16)) / 4)
    if size(x)[-1] != size(net.table)[1]:
        x = linear(net, x, size(net.table)[1])
    return net.op("MatMul", x, net.op("Transpose", net.table, perm=[1, 0]))


def classifier(net: Network, x: ir.Value) -> ir.Value:
    return net.op(net.pick("Softmax", "LogSoftmax"), linear(net, x, net.pick(10, 20)), axis=len(size(x)) - 1)


def branch(net: Network, x: ir.Value) -> ir.Value:
    """A product in each body of an If."""
    features = size(x)[1]
    weight = net.weight(features, 16, fan_in=features)
    largest = net.listed("ReduceMax", x, "axes", [0, 1], 18, keepdims=0)
    positive = net.op("Greater", largest, net.constant(0.5))
    bodies = {f"{kind}_branch": _body(net, [x, weight], last) for kind, last in (("then", "Relu"), ("else", "Neg"))}
    return net.shaped(net.op("If", positive, **bodies), SAMPLES, 16)


def loop(net: Network, x: ir.Value) -> ir.Value:
    """A product in the body of a Loop, three times."""
    features = size(x)[1]
    weight = net.weight(features, features, fan_in=features)
    prefix = f"b{len(net.nodes)}"
    step = ir.val(f"{prefix}_step", ir.DataType.INT64, [])
    going = ir.val(f"{prefix}_going", ir.DataType.BOOL, [])
    state = ir.val(f"{prefix}_state", ir.DataType.FLOAT, size(x))
    body = _body(net, [state, weight], "Tanh")
    same = ir.node("Identity", [going], name=f"{prefix}_same")
    same.outputs[0].name = f"{prefix}_on"
    same.outputs[0].type = going.type
    same.outputs[0].shape = going.shape
    body.append(same)
    body.inputs.extend([step, going, state])
    body.outputs.insert(0, same.outputs[0])
    return net.shaped(net.op("Loop", net.constant(np.array(3)), net.constant(np.array(True)), x, body=body), *size(x))


def _body(net: Network, factors: list[ir.Value], last: str) -> ir.Graph:
    prefix = f"b{len(net.nodes)}_{last}"
    product = ir.node("MatMul", factors, name=f"{prefix}_product")
    end = ir.node(last, product.outputs, name=f"{prefix}_end")
    for node in (product, end):
        node.outputs[0].name = f"{node.name}_y"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph([], end.outputs, nodes=[product, end], name=prefix)


def to_other_rank(net: Network, x: ir.Value) -> ir.Value:
    """Vectors become images or sequences."""
    features = size(x)[1]
    if features % 16 == 0 and net.chance(0.5):
        return net.reshape(x, features // 16, 4, 4)
    return net.reshape(x, 4, features // 4) if features % 4 == 0 else net.listed("Unsqueeze", x, "axes", [1], 13)


Block = Callable[[Network, ir.Value], ir.Value]

# What may follow a tensor of that rank; twice is twice as often.
BLOCKS: dict[int, tuple[Block, ...]] = {
    4: (
        *[convolution] * 5,
        *[inverted_residual] * 2,
        *[pooling] * 2,
        *[two_paths] * 2,
        *[to_sequence] * 2,
        *(squeeze_excite, space_to_channels, larger, instance_norm, channels_last, affine, bounded, to_vector),
    ),
    3: (
        *[attention] * 4,
        *[layer] * 3,
        *[mlp] * 2,
        *(layer_norm, rms_norm, softmax_pooling, over_tokens, over_time, turned, bounded, affine, to_vector),
        *(tied_head, classifier),
    ),
    2: (*[layer] * 4, *[mlp] * 2, layer_norm, branch, loop, to_other_rank, bounded, affine, tied_head, classifier),
}


def join(net: Network, x: ir.Value, pool: Sequence[ir.Value]) -> ir.Value | None:
    """One operator on this value and another one of a shape that fits, if there is one."""
    fitting = [other for other in pool if other is not x and _broadcasts(other, x)]
    if not fitting:
        return None
    pair = (x, other := net.pick(*fitting)) if net.chance(0.5) else (other := net.pick(*fitting), x)
    if size(x) == size(other) and net.chance(0.4):
        return net.op("Concat", *pair, axis=1 if len(size(x)) == 4 else -1)
    if net.chance(0.2):
        return net.op("Where", net.op("Greater", *pair), *pair)
    if net.chance(0.2):
        return net.op("Mul", x, net.op("Sigmoid", other))
    return net.op(net.pick("Add", "Add", "Add", "Sub", "Max", "Min", "Mean"), *pair)


def _broadcasts(value: ir.Value, other: ir.Value) -> bool:
    pairs = zip(size(value), size(other), strict=False)
    return len(size(value)) == len(size(other)) and all(short in (1, long) for short, long in pairs)


def _start(net: Network) -> ir.Value:
    """An input, or what is looked up for its words."""
    match net.pick("image", "image", "sequence", "vector", "words"):
        case "image":
            return net.input((net.pick(1, 3, 8, 16), *[net.pick(6, 8, 12)] * 2))
        case "sequence":
            return net.input((net.pick(4, 16, 20), net.pick(16, 24, 32)))
        case "vector":
            return net.input((net.pick(16, 32),))
    net.table = net.table or net.constant(net.rng.standard_normal((_VOCABULARY, 16)))
    return net.op("Gather", net.table, net.input((net.pick(6, 16),), ir.DataType.INT64))


def random_model(seed: int) -> ir.Model:
    """A network of one or two inputs and three to ten blocks; what no block reads are its outputs.

    Args:
        seed: of everything: the same seed makes the same model.
    """
    net = Network(seed)
    pool = [_start(net) for _ in range(net.pick(1, 1, 1, 2))]
    for _ in range(int(net.rng.integers(3, 11))):
        small = [value for value in pool if math.prod(size(value)) <= _ELEMENTS and len(size(value)) in BLOCKS]
        x = small[-1] if net.chance(0.7) else net.pick(*small)
        joined = join(net, x, small) if net.chance(0.25) else None
        pool.append(joined or net.pick(*BLOCKS[len(size(x))])(net, x))
    read = {value for node in net.nodes for value in node.inputs}
    made = {value for node in net.nodes for value in node.outputs}
    ends = [value for value in pool if value in made and value not in read]
    inner = [value for value in pool if value in made and value in read]
    return net.model(ends + (inner[:1] if net.chance(0.15) else []))
