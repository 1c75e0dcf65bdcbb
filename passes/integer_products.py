"""Matrix products and convolutions as ONNX's integer operators, with the result rescaled to float.

    (a - za) sa @ (b - zb) sb       =  MatMulInteger(a, b, za, zb) * (sa sb)    sa per tensor or row, sb or column
    conv((x - zx) sx, (w - zw) sw)  =  ConvInteger(x, w, zx, zw) * (sx sw)      sw per tensor or output channel

Sums are exact in int32; only the rescaling rounds. ONNX Runtime turns MatMulInteger, Cast and `Mul(x, Mul(sa, sb))`
into one kernel that takes `sa` for a number, whatever its shape: scales per row must never be a factor of such a
product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.graph import constant, rank
from qonnx.passes.writer import Writer, discard

# Between a stored weight and its operator these keep every element; a Cast only changes the float type.
_PATH = frozenset({"Transpose", "Identity", "Cast"})

_CONV_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


class NoIntegerFormError(Exception):
    """Why a node cannot be written with integer operators. Passes catch it; it never leaves them."""


@dataclass(frozen=True, eq=False)
class Integers:
    """A tensor as its codes and what they mean: (codes - zero_point) * scale.

    Attributes:
        codes: int8, uint8 or fewer bits.
        scale: a scalar; or one value per index of `axis`; or (`per_row`) of the shape of the codes, but of size 1 along
            `axis`.
        zero_point: a scalar, or one per index of `axis`; None is 0.
        axis: of the tensor after `perm`; None for one scale.
        perm: how the codes have to be transposed first, or () for not at all.
        per_row: whether `axis` is the one along which elements share a scale, and not the one along which scales run.
        block_size: how many neighbours along `axis` share a scale; 0 for one scale per index.
    """

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    axis: int | None = None
    perm: tuple[int, ...] = ()
    per_row: bool = False
    block_size: int = 0

    def transposed(self, perm: tuple[int, ...]) -> Integers:
        """The same tensor with its axes in another order."""
        axis = None if self.axis is None else perm.index(self.axis)
        return replace(self, axis=axis, perm=tuple(self.perm[i] for i in perm) if self.perm else perm)


def dequantize_behind(value: ir.Value | None) -> tuple[ir.Node, list[ir.Node]] | None:
    """The DequantizeLinear that makes a value, and the Transpose, Identity and Cast nodes behind it, the last first."""
    path = []
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _PATH and node.domain == "":
        path.append(node)
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return None if node is None or node.op_type != "DequantizeLinear" or node.domain != "" else (node, path)


def integers_of(value: ir.Value | None) -> Integers | None:
    """The integers behind a float value: of a DequantizeLinear, seen through Transpose, Identity and Cast.

    None where there is none, and where the codes are not integers of at most 8 bits.
    """
    found = dequantize_behind(value)
    if found is None:
        return None
    node, path = found
    codes, scale, zero_point = [*node.inputs, None][:3]
    if codes is None or scale is None or codes.dtype is None:
        return None
    if not codes.dtype.is_integer() or codes.dtype.bitwidth > 8:
        return None
    size, turned = rank(codes), [step for step in path if step.op_type == "Transpose"]
    if size is None and (rank(scale) != 0 or turned):
        return None
    axis = node.attributes.get_int("axis", 1) % (size or 1) if rank(scale) else None
    integers = Integers(codes, scale, zero_point, axis, block_size=node.attributes.get_int("block_size", 0))
    for step in reversed(turned):
        backwards = tuple(reversed(range(size or 0)))
        integers = integers.transposed(tuple(step.attributes.get_ints("perm", backwards)))
    return integers


def product(write: Writer, left: Integers, right: Integers) -> ir.Value:
    """What `write.node` computes from its first two inputs, which are `left` and `right`, in its own float type.

    Raises:
        NoIntegerFormError: there is no such integer operator.
    """
    match write.node.op_type:
        case "MatMul":
            return _as_declared(write, _matmul(write, left, right))
        case "Gemm":
            return _gemm(write, left, right)
        case "Conv":
            return _conv(write, left, right)
    raise NoIntegerFormError(f"ONNX has no integer form of {write.node.op_type}")


def gemm_operands(node: ir.Node, left: Integers, right: Integers) -> tuple[Integers, Integers]:
    """The operands of a Gemm as those of a matrix product."""
    return (
        left.transposed((1, 0)) if node.attributes.get_int("transA", 0) else left,
        right.transposed((1, 0)) if node.attributes.get_int("transB", 0) else right,
    )


def eight_bits(write: Writer, integers: Integers) -> tuple[ir.Value, ir.Value]:
    """Codes and zero point in int8 or uint8, the codes transposed as they are needed."""
    codes, zero_point = integers.codes, integers.zero_point
    assert codes.dtype is not None
    if codes.dtype.bitwidth < 8:
        dtype = ir.DataType.INT8 if codes.dtype.is_signed() else ir.DataType.UINT8
        codes = write.add("Cast", [codes], dtype, codes.shape, {"to": dtype})
    if integers.perm and integers.perm != tuple(range(len(integers.perm))):
        shape = None if codes.shape is None else ir.Shape([codes.shape[i] for i in integers.perm])
        codes = write.add("Transpose", [codes], codes.dtype, shape, {"perm": list(integers.perm)})
    assert codes.dtype is not None
    if zero_point is None or zero_point.dtype != codes.dtype:
        scale, zeros = constant(integers.scale), constant(zero_point)
        array = np.zeros(() if scale is None else scale.shape) if zeros is None else zeros.astype(np.int32)
        zero_point = write.constant(array.astype(codes.dtype.numpy()), f"{integers.codes.name}_zero_point")
    return codes, zero_point


def shortest(write: Writer, zero_point: ir.Value) -> ir.Value | None:
    """The zero point for MatMulInteger and ConvInteger: None where it is a constant 0, a scalar where all are equal."""
    zeros = constant(zero_point)
    if zeros is None or np.unique(zeros).size > 1:
        return zero_point
    first = zeros.reshape(-1)[:1].reshape(())
    if first and not zeros.ndim:
        return zero_point
    discard(zero_point)
    return write.constant(first, f"{zero_point.name}_of_all") if first else None


def scale_array(integers: Integers) -> npt.NDArray[np.float32] | None:
    """The scale where it is a constant."""
    scale = constant(integers.scale)
    return None if scale is None else scale.astype(np.float32)


def check_matmul(left: Integers, right: Integers) -> None:
    """Raises where scales differ along the axis that is summed over, or there are more zero points than operators take.

    ONNX Runtime takes one zero point per column for a second operand with two axes only.
    """
    for name, integers, kept, summed in (("first", left, -2, -1), ("second", right, -1, -2)):
        if integers.axis is None:
            continue
        if integers.block_size:
            raise NoIntegerFormError(f"the scales of its {name} operand are blocked")
        size = rank(integers.codes) or 0
        wanted = size + (summed if integers.per_row else kept)
        if integers.axis != wanted or (size < 2 and not integers.per_row):
            raise NoIntegerFormError(f"the scales of its {name} operand do not run along the axis that is kept")
        if (integers is left or size > 2) and not integers.per_row and _zero_points_differ(integers):
            raise NoIntegerFormError(f"its {name} operand has different zero points; quantize it symmetrically")


def check_conv(left: Integers, right: Integers) -> None:
    """Raises where scales differ within an output channel."""
    if left.axis is not None:
        raise NoIntegerFormError("its input has more than one scale")
    if right.axis not in (None, 0) or right.block_size:
        raise NoIntegerFormError("the scales of its weight do not run along the output channels")


def _zero_points_differ(integers: Integers) -> bool:
    zeros = constant(integers.zero_point)
    return integers.zero_point is not None and (zeros is None or np.unique(zeros).size > 1)


def _matmul(write: Writer, left: Integers, right: Integers, alpha: float = 1.0) -> ir.Value:
    check_matmul(left, right)
    (a, za), (b, zb) = eight_bits(write, left), eight_bits(write, right)
    zeros = shortest(write, za), shortest(write, zb)
    sums = write.add("MatMulInteger", [a, b, *zeros], ir.DataType.INT32, write.node.outputs[0].shape)
    column = (-1, 1) if left.axis is not None and not left.per_row else (-1,)
    return _rescaled(write, sums, left, right, column, alpha)


def _gemm(write: Writer, left: Integers, right: Integers) -> ir.Value:
    node = write.node
    if left.per_row and node.attributes.get_int("transA", 0) != 0:
        left = replace(left, scale=write.add("Transpose", [left.scale], left.scale.dtype, None, {"perm": [1, 0]}))
    left, right = gemm_operands(node, left, right)
    result = _as_declared(write, _matmul(write, left, right, node.attributes.get_float("alpha", 1.0)))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return result
    beta = node.attributes.get_float("beta", 1.0)
    if beta != 1:
        dtype = bias.dtype or ir.DataType.FLOAT
        factor = write.constant(np.array(beta, dtype.numpy()), f"{node.name}_beta")
        bias = write.add("Mul", [bias, factor], dtype, bias.shape)
    return write.add("Add", [result, bias], result.dtype, result.shape)


def _conv(write: Writer, left: Integers, right: Integers) -> ir.Value:
    node = write.node
    check_conv(left, right)
    if _zero_points_differ(right):
        raise NoIntegerFormError("its weight has different zero points; quantize it symmetrically")
    (x, zx), (w, zw) = eight_bits(write, left), eight_bits(write, right)
    zeros = shortest(write, zx), shortest(write, zw)
    output = node.outputs[0]
    sums = write.add("ConvInteger", [x, w, *zeros], ir.DataType.INT32, output.shape, conv_attributes(node))
    channels = (-1, *[1] * ((rank(right.codes) or 4) - 2))
    result = _as_declared(write, _rescaled(write, sums, left, right, channels))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return result
    stored = constant(bias)
    if stored is None:
        shape = write.constant(np.array(channels, np.int64), f"{node.name}_bias_shape")
        column = write.add("Reshape", [bias, shape], bias.dtype)
    else:
        column = write.constant(stored.reshape(channels), f"{bias.name}_column")
    return write.add("Add", [result, column], result.dtype, result.shape)


def conv_attributes(node: ir.Node) -> dict[str, ir.Attr]:
    """The attributes that Conv, ConvInteger and QLinearConv share."""
    return {name: node.attributes[name] for name in _CONV_ATTRIBUTES if name in node.attributes}


def _rescaled(
    write: Writer, sums: ir.Value, left: Integers, right: Integers, kept: tuple[int, ...], alpha: float = 1.0
) -> ir.Value:
    """`sums` times both scales and `alpha`; a constant scale that runs along an axis gets the shape `kept`."""
    real = write.add("Cast", [sums], ir.DataType.FLOAT, sums.shape, {"to": ir.DataType.FLOAT})
    computed = [integers for integers in (left, right) if scale_array(integers) is None]
    known = np.asarray(np.float32(alpha))
    for array in (scale_array(left), scale_array(right)):
        if array is not None:
            known = known * (array.reshape(kept) if array.ndim else array)
    if computed == [left, right] and not left.per_row and alpha == 1:
        return _times(write, real, write.add("Mul", [left.scale, right.scale], ir.DataType.FLOAT, right.scale.shape))
    factor = write.constant(known.astype(np.float32), f"{write.node.name}_scale")
    if computed == [left] and not left.per_row:
        return _times(write, real, write.add("Mul", [left.scale, factor], ir.DataType.FLOAT, factor.shape))
    for integers in computed:
        real = _times(write, real, integers.scale)
    return _times(write, real, factor)


def _times(write: Writer, real: ir.Value, factor: ir.Value) -> ir.Value:
    return write.add("Mul", [real, factor], ir.DataType.FLOAT, real.shape)


def _as_declared(write: Writer, result: ir.Value) -> ir.Value:
    """The result in the float type that the operator declares."""
    dtype = write.node.outputs[0].dtype or ir.DataType.FLOAT
    return result if dtype == result.dtype else write.add("Cast", [result], dtype, result.shape, {"to": dtype})
