"""Writes products with weights of 2, 4 or 8 bits as MatMulNBits, an operator of ONNX Runtime.

    X -> MatMul(X, DequantizeLinear(W)) [-> Add(bias)]      MatMulNBits(X, packed W, scales, zero points, bias)
    X -> Gemm(X, DequantizeLinear(W), bias)

ONNX Runtime makes the same operator of the standard form when it optimizes a graph, but not of transposed weights, and
how exactly it then computes is an option of the session (by default activations are quantized too, to int8). Written
out, the file decides: `accuracy_level`.

    W  [N, K]  ->  uint8 [N, blocks, block_size * bits / 8], the lowest bits first; signed codes are shifted to unsigned
    scales     ->  [N, blocks]
    zero points->  uint8 [N, blocks * bits / 8]; left out where all are the middle of the grid, 2^(bits - 1)

Only for blocks of 16, 32, 64, 128 or 256 along the axis that is summed over; one scale per tensor or output channel is
repeated for blocks of 128. A last block that is short is padded.

Source: ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.errors import TargetError
from qonnx.graph import Names, constant, is_initializer, rank
from qonnx.passes.integer_products import Integers, gemm_operands, integers_of
from qonnx.passes.writer import MICROSOFT, Writer, take_over

BLOCK_SIZES = (16, 32, 64, 128, 256)

# For weights without blocks: large, so that the repeated scales take little room.
_REPEATED = 128


@dataclass(frozen=True)
class WriteMatMulNBits(ir.passes.InPlacePass):
    """See the module docstring.

    Attributes:
        accuracy_level: 1 computes in float32; 4 quantizes activations to int8 in blocks, which is faster.
    """

    accuracy_level: int = 1

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the products of the main graph.

        Raises:
            TargetError: a weight has blocks of another size.
        """
        products = [(node, weight) for node in model.graph if (weight := _weight(node)) is not None]
        names = Names(model)
        for node, weight in products:
            _rewrite(Writer(names, node, "WriteMatMulNBits"), weight, self.accuracy_level)
        if products:
            model.opset_imports.setdefault(MICROSOFT, 1)
        return ir.passes.PassResult(model, bool(products))


def _weight(node: ir.Node) -> Integers | None:
    """The weight of a product that MatMulNBits can express, as the [K, N] that the product sees."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain != "":
        return None
    weight = integers_of(node.inputs[1])
    if weight is None or not is_initializer(weight.codes) or rank(weight.codes) != 2 or constant(weight.scale) is None:
        return None
    if node.op_type == "Gemm":
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        scaled = node.attributes.get_float("alpha", 1.0) != 1 or node.attributes.get_float("beta", 1.0) != 1
        if node.attributes.get_int("transA", 0) != 0 or scaled or not _is_row(bias, node.outputs[0]):
            return None
        weight = gemm_operands(node, weight, weight)[1]
    if weight.block_size and weight.block_size not in BLOCK_SIZES and weight.axis == 0:
        raise TargetError(
            f"weight {weight.codes.name!r}: MatMulNBits takes blocks of 16, 32, 64, 128 or 256, not "
            f"{weight.block_size}; use one of these, or do without operators of com.microsoft"
        )
    return weight if weight.axis in ((0,) if weight.block_size else (None, 1)) else None


def _is_row(bias: ir.Value | None, result: ir.Value) -> bool:
    """Whether a bias is none, or has one element for each column: Gemm would repeat others."""
    if bias is None or bias.shape is None or result.shape is None:
        return bias is None
    return bias.shape.rank() == 1 and bias.shape[0] == result.shape[-1]


def _rewrite(write: Writer, weight: Integers, accuracy_level: int) -> None:
    node, tensor = write.node, weight.codes.const_value
    assert tensor is not None
    bits, signed = int(tensor.dtype.bitwidth), tensor.dtype.is_signed()
    shape = tuple(tensor.shape.numpy())
    k, n = (shape[i] for i in weight.perm or (0, 1))
    size = weight.block_size or _REPEATED
    blocks = -(-k // size)

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(pack(_unsigned(tensor.numpy(), bits, signed).transpose(weight.perm or (0, 1)).T, bits, size))

    packed = ir.LazyTensor(evaluate, dtype=ir.DataType.UINT8, shape=ir.Shape((n, blocks, size * bits // 8)))
    scale, zeros = constant(weight.scale), constant(weight.zero_point)
    assert scale is not None
    if node.inputs[0] is not None and node.inputs[0].dtype is not None:  # of another type where the weight is cast
        scale = scale.astype(node.inputs[0].dtype.numpy())
    stem = weight.codes.name
    middle = 2 ** (bits - 1)
    inputs: list[ir.Value | None] = [
        node.inputs[0],
        write.constant(packed, f"{stem}_packed"),
        write.constant(_per_block(scale, weight, n, blocks), f"{stem}_scales"),
        None,
    ]
    if zeros is not None or not signed:
        shifted = _unsigned(np.zeros_like(scale, np.int8) if zeros is None else zeros, bits, signed)
        if (shifted != middle).any():
            points = pack_bits(_per_block(shifted, weight, n, blocks), bits)
            inputs[3] = write.constant(points, f"{stem}_zero_points")
    if node.op_type == "Gemm" and len(node.inputs) > 2:
        inputs += [None, node.inputs[2]]
    attributes = {"K": k, "N": n, "bits": bits, "block_size": size, "accuracy_level": accuracy_level}
    result = node.outputs[0]
    take_over(result, write.add("MatMulNBits", inputs, result.dtype, result.shape, attributes, MICROSOFT))


def _unsigned(codes: npt.NDArray[Any], bits: int, signed: bool) -> npt.NDArray[Any]:
    shift = 2 ** (bits - 1) if signed else 0
    return (codes.astype(np.int16) + shift).astype(np.uint8)


def _per_block(parameter: npt.NDArray[Any], weight: Integers, n: int, blocks: int) -> npt.NDArray[Any]:
    """Scales or zero points as [N, blocks]."""
    if parameter.ndim == 2:
        return np.ascontiguousarray(parameter.transpose(weight.perm or (0, 1)).T)
    return np.ascontiguousarray(np.broadcast_to(parameter.reshape(-1, 1), (n, blocks)))


def pack(codes: npt.NDArray[Any], bits: int, block_size: int) -> npt.NDArray[Any]:
    """Codes [N, K] below 2^bits in the layout of MatMulNBits: [N, blocks, block_size * bits / 8].

    >>> pack(np.array([[1, 2, 3]], np.uint8), 4, 16)[0, 0, :3].tolist()
    [33, 3, 0]
    """
    n, k = codes.shape
    padded = np.pad(codes, ((0, 0), (0, -k % block_size)))
    return pack_bits(padded, bits).reshape(n, -1, block_size * bits // 8)


def pack_bits(codes: npt.NDArray[Any], bits: int) -> npt.NDArray[Any]:
    """Neighbours along the last axis in one byte, the first in the lowest bits; the last byte is filled with zeros.

    >>> pack_bits(np.array([[1, 2, 3]], np.uint8), 4).tolist(), pack_bits(np.array([[1, 2, 3]], np.uint8), 2).tolist()
    ([[33, 3]], [[57]])
    """
    per_byte = 8 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[-1] % per_byte)))
    fields = padded.reshape(len(padded), -1, per_byte) << np.arange(0, 8, bits, dtype=np.uint8)
    return np.asarray(np.bitwise_or.reduce(fields, axis=-1))
