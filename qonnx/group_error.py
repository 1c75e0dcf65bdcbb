"""What smoothing methods decide from: what the channels of a group look like, and what quantization does to its layers.

    err(s, z) = sum over layers of  || Q(X~) Q(W~) - X~ W~ ||^2 / || X W ||^2        X~ = (X - z) / s,   W~ = s W

The quantizers are those that will be used: one scale for each tensor X~, one for each column of W~ or for all of it.
Both norms are taken around the mean over tokens of each output channel where bias correction will remove it.
No token counts more than 16 of median power: in a decoder the first one can have 10^6 times that (Sun et al., "Massive
Activations in Large Language Models", COLM 2024), and networks normalise each token before the next layer. Were it to
count in full, nothing else would.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from qonnx.channels import FOREIGN, Indices
from qonnx.errors import DataError
from qonnx.graph import float32
from qonnx.groups import Consumer, SmoothGroup
from qonnx.linear import Linear, by_group
from qonnx.numerics import Dtype, Granularity, PerAxis, PerTensor, absmax, fake_quantize, scale_and_zero_point
from qonnx.statistics import Statistics

Vector: TypeAlias = npt.NDArray[np.float64]
Array: TypeAlias = npt.NDArray[np.float32]
Samples: TypeAlias = Mapping[str, Array]
"""Value name -> [tokens, channels], some rows of what linear layers read: see `qonnx.group_samples`."""

# Multiplications per layer and candidate. Wider layers are measured on some of their outputs, evenly spaced.
_BUDGET = 1 << 26
_FEWEST = 16

# How many times the power of the median token one may count.
_LOUDEST = 16.0


class Quantizers(msgspec.Struct, frozen=True):
    """The quantizers that will be used behind the smoothing.

    Attributes:
        activations: type of the codes of activations, one scale for each tensor.
        symmetric: whether these have zero point 0.
        weights: type of the codes of weights, symmetric.
        per_channel: whether each output channel has a scale; otherwise the weight has one.
        correct_biases: whether biases will take up what moves the mean of an output.
    """

    activations: Dtype = Dtype.INT8
    symmetric: bool = True
    weights: Dtype = Dtype.INT8
    per_channel: bool = True
    correct_biases: bool = True


@dataclass(frozen=True, eq=False)
class Ranges:
    """What was observed of the channels of a group.

    Attributes:
        low: [channels] the smallest element of each in front of the linear layers.
        high: [channels] the largest.
        weight: [channels] the largest magnitude among the weights that multiply it, in all layers.
    """

    low: Vector
    high: Vector
    weight: Vector

    @property
    def reach(self) -> Vector:
        """[channels] the largest magnitude of each channel."""
        return np.asarray(np.maximum(np.abs(self.low), np.abs(self.high)))


def channel_axes(groups: Iterable[SmoothGroup]) -> dict[str, int]:
    """What `qonnx.observation.observe` has to observe per channel: value name -> axis."""
    return {name: axis for group in groups if not group.reason for name, (axis, _) in group.inputs.items()}


def measure(group: SmoothGroup, statistics: Statistics) -> Ranges:
    """Brings the statistics of all tensors that a group's layers read, and their weights, to the producer's channels.

    Raises:
        DataError: a tensor was not observed per channel, or was not always finite.
    """
    size = group.producer.size
    low, high, weight = np.full(size, np.inf), np.full(size, -np.inf), np.zeros(size)
    for name, (_, index) in group.inputs.items():
        seen = statistics.tensors.get(name)
        if seen is None or seen.channel_minimum is None or seen.channel_maximum is None:
            raise DataError(f"channels of {name} were not observed; calibrate with channel_axes")
        if not seen.finite:
            raise DataError(f"{name} is not always finite")
        ours = index != FOREIGN
        np.minimum.at(low, index[ours], seen.channel_minimum[ours])
        np.maximum.at(high, index[ours], seen.channel_maximum[ours])
    for consumer in group.consumers:
        ours = consumer.index != FOREIGN
        np.maximum.at(weight, consumer.index[ours], _input_reach(consumer.linear)[ours])
    unread = low > high
    low[unread] = high[unread] = 0.0
    return Ranges(low, high, weight)


def _input_reach(linear: Linear) -> Vector:
    """[input channels] the largest magnitude of the weights that multiply each."""
    tensor = linear.weight.const_value
    assert tensor is not None
    weight = np.abs(float32(tensor.numpy()))
    if linear.node.op_type == "Conv":  # [out, in / groups, ...]: a block of outputs for each group of inputs
        weight = weight.reshape(linear.groups, -1, weight.shape[1], int(np.prod(weight.shape[2:])))
        return np.asarray(weight.max(axis=(1, 3)).reshape(-1), np.float64)
    axes = tuple(axis for axis in range(weight.ndim) if axis != linear.input_axis)
    return np.asarray(weight.max(axis=axes), np.float64)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A linear layer on samples; convolutions without groups, and all other layers, are one group.

    Attributes:
        x: [tokens, groups times inputs].
        y: [groups, tokens, taps times outputs] what it makes of them, for some of its outputs.
        low: [groups times inputs] the smallest element of each input channel.
        high: [groups times inputs] the largest.
        weight: [groups, inputs, taps, outputs] of these outputs.
        whole: [groups, inputs, taps, outputs] of all.
        index: [groups times inputs] the producer's channel that each is.
        rows: [tokens, 1] what the noise of each token is multiplied by.
        signal: what the error is relative to.
    """

    x: Array
    y: Array
    low: Array
    high: Array
    weight: Array
    whole: Array
    index: Indices
    rows: Array
    signal: float


class GroupError:
    """The error that quantization makes in the results of a group's layers, for any factors and offsets.

    The taps of a convolution count as separate outputs, which ranks candidates as well. Layers without samples do not
    count.
    """

    def __init__(self, group: SmoothGroup, ranges: Ranges, samples: Samples, quantizers: Quantizers) -> None:
        self._quantizers = quantizers
        found = [self._layer(consumer, ranges, samples) for consumer in group.consumers]
        self._layers = [layer for layer in found if layer is not None]

    def _layer(self, consumer: Consumer, ranges: Ranges, samples: Samples) -> _Layer | None:
        linear, index = consumer.linear, consumer.index
        x, tensor = samples.get(linear.data.name or ""), linear.weight.const_value
        if x is None or not x.size or tensor is None:
            return None
        whole = by_group(linear, float32(tensor.numpy()))
        per_output = x.shape[0] * int(np.prod(whole.shape[:3]))
        count = max(_FEWEST, _BUDGET // max(1, per_output))
        weight = np.ascontiguousarray(whole[..., :: -(-whole.shape[3] // count)])
        y = _product(x, weight)
        ours = index != FOREIGN
        low = np.where(ours, ranges.low[index], x.min(axis=0)).astype(np.float32)
        high = np.where(ours, ranges.high[index], x.max(axis=0)).astype(np.float32)
        rows = np.ones((len(x), 1), np.float32)
        if linear.node.op_type in ("MatMul", "Gemm"):
            rows = loudness(np.einsum("gto,gto->t", y, y, dtype=np.float64)).astype(np.float32)[:, None]
        return _Layer(x, y, low, high, weight, whole, index, rows, self._power(y.copy(), rows) or 1.0)

    @property
    def measurable(self) -> bool:
        """Whether anything counts."""
        return bool(self._layers)

    def __call__(self, scale: Vector, shift: Vector) -> float:
        """The mean noise-to-signal ratio of the layers."""
        return sum(self._noise(layer, scale, shift) / layer.signal for layer in self._layers) / len(self._layers)

    def _noise(self, layer: _Layer, scale: Vector, shift: Vector) -> float:
        ours = layer.index != FOREIGN
        s = np.where(ours, scale[layer.index], 1.0).astype(np.float32)
        z = np.where(ours, shift[layer.index], 0.0).astype(np.float32)
        quantized = self._activations((layer.x - z) / s, (layer.low - z) / s, (layer.high - z) / s)
        error = _product(quantized, self._weight(layer, s))
        error -= layer.y
        error += _product(z[None], layer.weight)
        return self._power(error, layer.rows)

    def _power(self, y: Array, rows: Array) -> float:
        """The power of results [groups, tokens, outputs], around their mean where biases take it up; overwrites `y`."""
        equal = bool((rows == 1).all())
        if self._quantizers.correct_biases:
            y -= rows.T @ y / rows.sum()
        return float(np.vdot(y, y if equal else y * rows))

    def _activations(self, x: Array, low: Array, high: Array) -> Array:
        dtype = self._quantizers.activations
        step, zero = scale_and_zero_point(low.min(), high.max(), dtype, symmetric=self._quantizers.symmetric)
        return np.asarray(fake_quantize(x, step, zero, dtype, PerTensor()), np.float32)

    def _weight(self, layer: _Layer, s: Array) -> Array:
        dtype, per_channel = self._quantizers.weights, self._quantizers.per_channel
        factors = s.reshape(*layer.weight.shape[:2], 1, 1)
        weight = layer.weight * factors
        matrix = _columns(weight)
        granularity: Granularity = PerAxis(1) if per_channel else PerTensor()
        reach = absmax(matrix if per_channel else layer.whole * factors, granularity)
        step, zero = scale_and_zero_point(-reach, reach, dtype, symmetric=True)
        rounded = np.asarray(fake_quantize(matrix, step, zero, dtype, granularity), np.float32)
        return rounded.reshape(*weight.shape[1:3], weight.shape[0], weight.shape[3]).transpose(2, 0, 1, 3)


def loudness(power: Vector) -> Vector:
    """[tokens] what brings the power of each token down to `_LOUDEST` medians.

    >>> loudness(np.array([1.0, 2.0, 3.0, 64.0]))
    array([1.   , 1.   , 1.   , 0.625])
    """
    limit = _LOUDEST * (float(np.median(power)) or float(power.mean()))
    return np.asarray(limit / np.maximum(power, limit) if limit else np.ones_like(power))


def _columns(weight: Array) -> Array:
    """[inputs times taps, groups times outputs] of [groups, inputs, taps, outputs]: a column has one scale."""
    return weight.transpose(1, 2, 0, 3).reshape(weight.shape[1] * weight.shape[2], -1)


def _product(x: Array, weight: Array) -> Array:
    """[groups, tokens, taps times outputs] of x [tokens, groups times inputs]."""
    groups, inputs = weight.shape[:2]
    by_group = x.reshape(-1, groups, inputs).transpose(1, 0, 2)
    return np.asarray(by_group @ weight.reshape(groups, inputs, -1))


@dataclass(frozen=True, eq=False)
class Choice:
    """What a method would do with a group.

    Attributes:
        scale: [channels] s.
        shift: [channels] z.
        parameter: the method's own: alpha, or a threshold.
        method: in words.
    """

    scale: Vector
    shift: Vector
    parameter: float
    method: str


def best(choices: Iterable[Choice], error: GroupError) -> Choice:
    """The choice with the least error; of equals the first."""
    return min(choices, key=lambda choice: error(choice.scale, choice.shift))


def decibels(ratio: float) -> float:
    """A noise-to-signal ratio as a signal-to-noise ratio in dB.

    >>> decibels(0.01), decibels(0.0)
    (20.0, inf)
    """
    return -10 * math.log10(ratio) if ratio > 0 else math.inf
