"""How much arithmetic and memory traffic a matrix product or a convolution is, and how long that takes at best.

    attainable = min(peak, intensity * bandwidth)               (Williams, Waterman and Patterson, CACM 2009)
    seconds    = max(FLOP / peak, bytes / bandwidth)

Each operand is read once and each result written once. Integer operations count as FLOP too. Scales of blocks are
counted, scales of whole channels are not: they are as few as biases.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import msgspec

from qonnx.devices import Device, Format

FLOAT_BITS = 16
BLOCK_SIZE = 128


class Scheme(enum.StrEnum):
    """Bits of weights and activations. W4A16 has one scale for `BLOCK_SIZE` weights and multiplies in FP16.

    >>> Scheme.W4A16.weight_bits, Scheme.W4A16.activation_bits, Scheme.W4A16.compute.value
    (4, 16, 'fp16')
    """

    FP16 = "fp16"
    W8A8 = "w8a8"
    W4A16 = "w4a16"
    W4A8 = "w4a8"

    @property
    def weight_bits(self) -> int:
        """Bits per weight, scales not included."""
        return {Scheme.FP16: 16, Scheme.W8A8: 8}.get(self, 4)

    @property
    def activation_bits(self) -> int:
        """Bits per element of what is multiplied with the weights."""
        return 8 if self in (Scheme.W8A8, Scheme.W4A8) else 16

    @property
    def compute(self) -> Format:
        """What the tensor cores multiply."""
        return Format.INT8 if self.activation_bits == 8 else Format.FP16


class Bound(enum.StrEnum):
    """What keeps a kernel from being faster."""

    COMPUTE = "compute"
    MEMORY = "memory"


class Work(msgspec.Struct, frozen=True):
    """What a kernel has to do.

    Attributes:
        flop: operations; one multiplication and one addition are two.
        inputs: bytes of activations that are read.
        weights: bytes of constant weights that are read.
        scales: bytes of the scales of their blocks.
        outputs: bytes that are written.
        format: what is multiplied.

    Example:
        >>> from qonnx.devices import device
        >>> work = gemm(1, 4096, 4096)
        >>> round(work.intensity, 1), work.bound(device("a800")).value
        (1.0, 'memory')
    """

    flop: int
    inputs: int
    weights: int
    scales: int
    outputs: int
    format: Format = Format.FP16

    @property
    def bytes(self) -> int:
        """All traffic."""
        return self.inputs + self.weights + self.scales + self.outputs

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flop / self.bytes if self.bytes else math.inf

    def seconds(self, device: Device) -> float:
        """The least time it takes."""
        return max(self.flop / device.peak(self.format), self.bytes / device.bandwidth)

    def bound(self, device: Device) -> Bound:
        """Which of the two roofs it meets."""
        return Bound.COMPUTE if self.intensity >= device.ridge(self.format) else Bound.MEMORY


def gemm(m: int, n: int, k: int, scheme: Scheme = Scheme.FP16, *, output_bits: int = FLOAT_BITS) -> Work:
    """The product of activations [m, k] and a constant weight [k, n]: 2 m n k operations.

    Example:
        >>> [round(gemm(16, 4096, 4096, scheme).intensity, 1) for scheme in Scheme]
        [15.9, 31.6, 60.2, 60.7]
    """
    return Work(
        flop=2 * m * n * k,
        inputs=packed_bytes(m * k, scheme.activation_bits),
        weights=packed_bytes(k * n, scheme.weight_bits),
        scales=_scale_bytes(k * n, n, scheme),
        outputs=packed_bytes(m * n, output_bits),
        format=scheme.compute,
    )


def conv(
    image: Sequence[int],
    filters: Sequence[int],
    output: Sequence[int],
    scheme: Scheme = Scheme.FP16,
    *,
    output_bits: int = FLOAT_BITS,
) -> Work:
    """A convolution, grouped or not: 2 operations per output and weight of its filter.

    Args:
        image: shape of the input, [batch, channels, ...].
        filters: shape of the weight, [out channels, channels / groups, ...].
        output: shape of the result, [batch, out channels, ...].
        scheme: bits of weights and activations.
        output_bits: bits per element of the result.

    Example:
        >>> work = conv([1, 1, 64, 64], [1, 1, 3, 3], [1, 1, 62, 62])
        >>> work.flop, work.bytes, round(work.intensity, 2)
        (69192, 15898, 4.35)
    """
    weights = math.prod(filters)
    return Work(
        flop=2 * math.prod(output) * math.prod(filters[1:]),
        inputs=packed_bytes(math.prod(image), scheme.activation_bits),
        weights=packed_bytes(weights, scheme.weight_bits),
        scales=_scale_bytes(weights, filters[0], scheme),
        outputs=packed_bytes(math.prod(output), output_bits),
        format=scheme.compute,
    )


def block_count(weights: int, channels: int, block_size: int = BLOCK_SIZE) -> int:
    """The number of blocks, and so of scales, of a weight whose output channels are cut into blocks each."""
    return channels * math.ceil(weights / channels / block_size) if channels else 0


def packed_bytes(count: int, bits: int) -> int:
    """The bytes of `count` elements of `bits` bits each, without gaps."""
    return (count * bits + 7) // 8


def _scale_bytes(weights: int, channels: int, scheme: Scheme) -> int:
    return packed_bytes(block_count(weights, channels), FLOAT_BITS) if scheme.weight_bits == 4 else 0
