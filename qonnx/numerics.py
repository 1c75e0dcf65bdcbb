"""Quantization arithmetic: the numbers that QuantizeLinear and DequantizeLinear give, for every type and granularity.

    quantize      q = saturate(round(x / scale) + zero_point)      rounds half to even
    dequantize    x = (q - zero_point) * scale

Integers and float8 agree bit for bit with ONNX Runtime's CPU kernels, float4e2m1 (which has no kernel there) with the
ONNX specification. Where these leave something open, or differ from each other:

* Division and multiplication are done in float32, whatever the types of `x` and `scale`, and the dequantized value is
  rounded once to the type of the scale. (The specification divides in the type of the scale; ONNX Runtime does not.)
* Values outside the grid saturate, infinities included. ONNX Runtime does the same for quotients below 2^31; beyond
  that, and for NaN, its integer kernels other than 8 and 16 bits per tensor or per axis in float32 overflow an int32.
* NaN becomes the lowest code of an integer type, as in ONNX Runtime on x86; the specification says nothing. It stays
  NaN in float8, and becomes 6 in float4e2m1, as the specification of that type says.
* Integer types have one zero: -0.0 comes back as +0.0. Float types keep the sign.
"""

import enum
import functools
from collections.abc import Iterator
from typing import Any, ClassVar, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.errors import DataError, RecipeError

Array: TypeAlias = npt.NDArray[Any]

FLOAT32 = np.finfo(np.float32)
SHORT_FLOATS = (ir.DataType.FLOAT16.numpy(), ir.DataType.BFLOAT16.numpy())


class Dtype(enum.StrEnum):
    """A type that QuantizeLinear can write.

    >>> Dtype("int4").minimum, Dtype.INT4.maximum, Dtype.INT4.bits, Dtype.INT4.opset
    (-8.0, 7.0, 4, 21)
    """

    INT2 = "int2"
    UINT2 = "uint2"
    INT4 = "int4"
    UINT4 = "uint4"
    INT8 = "int8"
    UINT8 = "uint8"
    INT16 = "int16"
    UINT16 = "uint16"
    FLOAT8E4M3FN = "float8e4m3fn"
    FLOAT8E5M2 = "float8e5m2"
    FLOAT4E2M1 = "float4e2m1"

    @functools.cached_property
    def onnx(self) -> ir.DataType:
        """The ONNX element type."""
        return ir.DataType[self.name]

    @functools.cached_property
    def numpy(self) -> np.dtype[Any]:
        """The numpy element type: one element per byte for types below 8 bits, from `ml_dtypes`."""
        return self.onnx.numpy()

    @functools.cached_property
    def bits(self) -> int:
        """Bits per element in an ONNX file."""
        return int(self.onnx.bitwidth)

    @functools.cached_property
    def signed(self) -> bool:
        """Whether the grid has negative values."""
        return self.onnx.is_signed()

    @functools.cached_property
    def is_integer(self) -> bool:
        """Whether the grid is evenly spaced and takes a zero point."""
        return self.onnx.is_integer()

    @functools.cached_property
    def minimum(self) -> float:
        """The lowest value, as a finite number."""
        return float(self.onnx.min)

    @functools.cached_property
    def maximum(self) -> float:
        """The largest value, as a finite number."""
        return float(self.onnx.max)

    @property
    def opset(self) -> int:
        """The lowest ONNX opset whose QuantizeLinear writes this type. The granularity may need a higher one."""
        match self:
            case Dtype.INT8 | Dtype.UINT8:
                return 10
            case Dtype.FLOAT8E4M3FN | Dtype.FLOAT8E5M2:
                return 19
            case Dtype.INT4 | Dtype.UINT4 | Dtype.INT16 | Dtype.UINT16:
                return 21
            case Dtype.FLOAT4E2M1:
                return 23
            case Dtype.INT2 | Dtype.UINT2:
                return 25


class PerTensor(msgspec.Struct, frozen=True, tag_field="kind", tag="per_tensor", forbid_unknown_fields=True):
    """One scale for the whole tensor."""

    opset: ClassVar[int] = 10


class PerAxis(msgspec.Struct, frozen=True, tag_field="kind", tag="per_axis", forbid_unknown_fields=True):
    """One scale per index of `axis`; a negative axis counts from the back."""

    axis: int
    opset: ClassVar[int] = 13


class Blocked(msgspec.Struct, frozen=True, tag_field="kind", tag="blocked", forbid_unknown_fields=True):
    """One scale per `block_size` neighbours along `axis`; the last block may be shorter."""

    axis: int
    block_size: int
    opset: ClassVar[int] = 21

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise RecipeError(f"block_size {self.block_size} is not possible: give a size of 1 or more")


Granularity: TypeAlias = PerTensor | PerAxis | Blocked
"""Which elements share a scale. `opset` is the lowest ONNX opset whose QuantizeLinear can say so."""


def quantize(
    x: npt.ArrayLike, scale: npt.ArrayLike, zero_point: npt.ArrayLike | None, dtype: Dtype, granularity: Granularity
) -> Array:
    """What QuantizeLinear gives: `saturate(round(x / scale) + zero_point)`.

    Args:
        x: values, of any float type.
        scale: positive steps, of the shape `scale_shape(x.shape, granularity)`.
        zero_point: codes that stand for 0, of the same shape as `scale`; None is 0. Float types have none.
        dtype: type of the codes.
        granularity: which elements share a scale.

    Returns:
        Codes of type `dtype.numpy`, of the shape of `x`.

    Raises:
        RecipeError: shapes that do not fit together, a scale that is not positive, a zero point outside `dtype`.

    >>> quantize([0.5, 1.5, 2.6, 999.0], 1.0, None, Dtype.INT8, PerTensor())
    array([  0,   2,   3, 127], dtype=int8)
    """
    grid = _grid(np.asarray(x), scale, zero_point, dtype, granularity)
    if dtype.is_integer and dtype.bits < 8:  # a detour that is several times faster than the direct conversion
        return grid.astype(np.int8).astype(dtype.numpy)
    return grid.astype(dtype.numpy)


def dequantize(q: Array, scale: npt.ArrayLike, zero_point: npt.ArrayLike | None, granularity: Granularity) -> Array:
    """What DequantizeLinear gives: `(q - zero_point) * scale`.

    Args:
        q: codes of any type of `Dtype`, or int32 (a quantized bias).
        scale: steps, of the shape `scale_shape(q.shape, granularity)`.
        zero_point: codes that stand for 0, of the same shape as `scale`; None is 0.
        granularity: which elements share a scale.

    Returns:
        Values in the type of `scale` if that is float16 or bfloat16, else float32.

    Raises:
        RecipeError: shapes that do not fit together.

    >>> dequantize(np.array([[0, 7], [-8, 1]], np.int8), [0.5, 2.0], None, PerAxis(0))
    array([[  0. ,   3.5],
           [-16. ,   2. ]], dtype=float32)
    """
    q = np.asarray(q)
    return _from_grid(q, np.empty(q.shape, np.float32), scale, zero_point, granularity)


def fake_quantize(
    x: npt.ArrayLike, scale: npt.ArrayLike, zero_point: npt.ArrayLike | None, dtype: Dtype, granularity: Granularity
) -> Array:
    """`dequantize(quantize(x))`, without the codes in between for integer types.

    Args, errors and the type of the result are those of `quantize` and `dequantize`.

    >>> fake_quantize([-0.3, 0.1, 0.26, 9.0], 0.1, None, Dtype.INT4, PerTensor())
    array([-0.3,  0.1,  0.3,  0.7], dtype=float32)
    """
    x = np.asarray(x)
    grid = _grid(x, scale, zero_point, dtype, granularity)
    if not dtype.is_integer:
        grid[...] = grid.astype(dtype.numpy)
    return _from_grid(grid, grid, scale, zero_point, granularity)


def scale_and_zero_point(
    low: npt.ArrayLike, high: npt.ArrayLike, dtype: Dtype, *, symmetric: bool
) -> tuple[Array, Array]:
    """Scale and zero point of the ranges [low, high], so that 0 is exact and nothing in a range is clipped away.

    | grid                                  | scale                                 | zero point                    |
    |---------------------------------------|---------------------------------------|-------------------------------|
    | integer, affine                       | (high - low) / (maximum - minimum)    | round(minimum - low / scale)  |
    | signed integer, symmetric             | max(-low, high) / maximum             | 0                             |
    | unsigned integer, symmetric, low >= 0 | high / maximum                        | 0                             |
    | unsigned integer, symmetric, else     | max(-low, high) / (middle - 1)        | middle = (maximum + 1) / 2    |
    | float (`symmetric` means nothing)     | max(-low, high) / maximum             | 0                             |

    An affine range is widened to contain 0 first. A scale below the smallest normal float32, 2^-126, becomes 1: such a
    range is all zeros or next to it, its values get the code of 0, and 1 survives a cast to float16. Scales of ranges
    that reach the end of float32, as attention masks do, are lowered until every code dequantizes to a finite value.

    Args:
        low: lower ends, of any shape.
        high: upper ends, of the same shape.
        dtype: type of the codes.
        symmetric: 0 in the middle of the grid.

    Returns:
        Scales in float32 and zero points in `dtype.numpy`, of the shape of `low`.

    Raises:
        DataError: an end that is not finite in float32, or low > high.

    >>> scale_and_zero_point(-1.27, 0.5, Dtype.INT8, symmetric=True)
    (array(0.01, dtype=float32), array(0, dtype=int8))
    >>> scale_and_zero_point([0.0, -1.0], [2.55, 1.55], Dtype.UINT8, symmetric=False)
    (array([0.01, 0.01], dtype=float32), array([  0, 100], dtype=uint8))
    """
    low, high = _ends(low, high)
    reach = np.maximum(-low, high)
    if dtype.is_integer and not symmetric:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        span = dtype.maximum - dtype.minimum
        scale = _usable((high - low) / span, span)
        zero_point = np.clip(np.rint(dtype.minimum - low / scale), dtype.minimum, dtype.maximum)
    elif dtype.is_integer and not dtype.signed:
        middle = 2 ** (dtype.bits - 1)
        zero_point = np.where(low >= 0, 0, middle)
        codes = np.where(low >= 0, dtype.maximum, middle)
        scale = _usable(reach / np.where(low >= 0, dtype.maximum, middle - 1), codes)
    else:
        scale = _usable(reach / dtype.maximum, -dtype.minimum)
        zero_point = np.zeros_like(reach)
    return scale, np.asarray(zero_point).astype(dtype.numpy)


def minmax(x: npt.ArrayLike, granularity: Granularity) -> tuple[Array, Array]:
    """Smallest and largest value of every group of elements that shares a scale. NaN wins.

    Args:
        x: values, of any float or integer type.
        granularity: which elements share a scale.

    Returns:
        Two float32 arrays of the shape `scale_shape(x.shape, granularity)`.

    Raises:
        DataError: `x` has no elements.
        RecipeError: `granularity` does not fit the shape of `x`.

    >>> minmax(np.array([[1.0, -4.0, 3.0]]), Blocked(axis=1, block_size=2))
    (array([[-4.,  3.]], dtype=float32), array([[1., 3.]], dtype=float32))
    """
    x = np.asarray(x)
    scale_shape(x.shape, granularity)
    if x.size == 0:
        raise DataError(f"a tensor of shape {x.shape} has no values, so no range: give data with at least one element")
    match granularity:
        case PerTensor():
            low, high = x.min(), x.max()
        case PerAxis(axis):
            others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
            low, high = x.min(axis=others), x.max(axis=others)
        case Blocked(axis, block_size):
            starts = np.arange(0, x.shape[axis], block_size)
            low, high = np.minimum.reduceat(x, starts, axis=axis), np.maximum.reduceat(x, starts, axis=axis)
    return np.asarray(low, np.float32), np.asarray(high, np.float32)


def absmax(x: npt.ArrayLike, granularity: Granularity) -> Array:
    """Largest magnitude of every group of elements that shares a scale: see `minmax`.

    >>> absmax(np.array([[1.0, -4.0, 3.0]]), PerAxis(1))
    array([1., 4., 3.], dtype=float32)
    """
    low, high = minmax(x, granularity)
    return np.asarray(np.maximum(np.abs(low), np.abs(high)))


def scale_shape(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """The shape that ONNX gives the scales of a tensor of shape `shape`.

    Raises:
        RecipeError: an axis that the tensor does not have.

    >>> scale_shape((4, 10), PerTensor()), scale_shape((4, 10), PerAxis(-1)), scale_shape((4, 10), Blocked(1, 4))
    ((), (10,), (4, 3))
    """
    if isinstance(granularity, PerTensor):
        return ()
    axis = granularity.axis
    if not -len(shape) <= axis < len(shape):
        raise RecipeError(f"axis {axis} does not exist in a tensor of shape {shape}: choose one it has, or per_tensor")
    if isinstance(granularity, PerAxis):
        return (shape[axis],)
    axis %= len(shape)
    return (*shape[:axis], -(-shape[axis] // granularity.block_size), *shape[axis + 1 :])


def _grid(
    x: Array, scale: npt.ArrayLike, zero_point: npt.ArrayLike | None, dtype: Dtype, granularity: Granularity
) -> Array:
    """`x` on the grid of `dtype`, zero point added, saturated, still in float32 (float types: not rounded yet)."""
    steps, zeros = _parameters(scale, zero_point, x.shape, granularity)
    _check_parameters(steps, zeros, dtype)
    grid = np.empty(x.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity and (signaling) NaN are dealt with below
        for out, values, step, zero in _pieces(granularity, (grid, x), (steps, zeros)):
            np.divide(values, step, out=out, dtype=np.float32, casting="unsafe")
            if dtype.is_integer:
                np.rint(out, out=out)
                np.add(out, zero, out=out)  # also turns -0.0 into +0.0
    # fmax and fmin return the bound where the other operand is NaN, maximum and minimum keep the NaN.
    if dtype.is_integer:
        np.fmax(grid, np.float32(dtype.minimum), out=grid)
        np.fmin(grid, np.float32(dtype.maximum), out=grid)
    elif dtype is Dtype.FLOAT4E2M1:
        np.fmin(grid, np.float32(dtype.maximum), out=grid)
        np.fmax(grid, np.float32(dtype.minimum), out=grid)
    else:
        np.clip(grid, np.float32(dtype.minimum), np.float32(dtype.maximum), out=grid)
    return grid


def _from_grid(
    q: Array, values: Array, scale: npt.ArrayLike, zero_point: npt.ArrayLike | None, granularity: Granularity
) -> Array:
    """`(q - zero_point) * scale`, computed in the float32 buffer `values`, rounded once to the type of the scale."""
    steps, zeros = _parameters(scale, zero_point, q.shape, granularity)
    dtype = np.asarray(scale).dtype
    with np.errstate(over="ignore", invalid="ignore"):  # a code times a huge scale is infinity, as in the operator
        for codes, out, step, zero in _pieces(granularity, (q, values), (steps, zeros)):
            np.subtract(codes, zero, out=out, dtype=np.float32, casting="unsafe")
            np.multiply(out, step, out=out)
        return values.astype(dtype if dtype in SHORT_FLOATS else np.float32, copy=False)


def _parameters(
    scale: npt.ArrayLike, zero_point: npt.ArrayLike | None, shape: tuple[int, ...], granularity: Granularity
) -> tuple[Array, Array]:
    """Scale and zero point in float32, of the shape that the tensor asks for."""
    expected, found = scale_shape(shape, granularity), []
    for name, value in (("scale", scale), ("zero point", zero_point)):
        array = np.zeros(expected, np.float32) if value is None else np.asarray(value).astype(np.float32)
        if array.shape != expected and not (expected == () and array.shape == (1,)):
            raise RecipeError(
                f"{name} of shape {array.shape} does not fit a tensor of shape {shape} with {granularity}: "
                f"it needs shape {expected}"
            )
        found.append(array.reshape(expected))
    return found[0], found[1]


def _check_parameters(steps: Array, zeros: Array, dtype: Dtype) -> None:
    if not (np.isfinite(steps) & (steps > 0)).all():
        bad = steps[~(np.isfinite(steps) & (steps > 0))].flat[0]
        raise RecipeError(f"scale {bad} is not a positive finite number: take scales from scale_and_zero_point")
    low, high = (dtype.minimum, dtype.maximum) if dtype.is_integer else (0.0, 0.0)
    outside = ~((zeros >= low) & (zeros <= high) & (zeros == np.rint(zeros)))
    if outside.any():
        raise RecipeError(f"zero point {zeros[outside].flat[0]:g} is not possible for {dtype}: use {low:g} to {high:g}")


def _pieces(
    granularity: Granularity, tensors: tuple[Array, ...], parameters: tuple[Array, ...]
) -> Iterator[tuple[Array, ...]]:
    """Views of tensors and parameters that broadcast against each other: one set, or two where the last block is short.

    Splitting an axis needs no copy, so writing to a view writes to the tensor, and no scale is ever repeated.
    """
    if isinstance(granularity, PerTensor):
        yield (*tensors, *parameters)
        return
    shape = tensors[0].shape
    axis = granularity.axis % len(shape)
    if isinstance(granularity, PerAxis):
        column = (-1, *[1] * (len(shape) - axis - 1))
        yield (*tensors, *(p.reshape(column) for p in parameters))
        return
    size = granularity.block_size
    whole, rest = divmod(shape[axis], size)
    for first, count, length in ((0, whole, size), (whole, 1, rest)):
        if count * length:
            elements = _along(axis, first * size, first * size + count * length)
            split = (*shape[:axis], count, length, *shape[axis + 1 :])
            blocks = _along(axis, first, first + count)
            yield (
                *(t[elements].reshape(split) for t in tensors),
                *(np.expand_dims(p[blocks], axis + 1) for p in parameters),
            )


def _along(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    """The index of `start` to `stop` of one axis and everything of the others."""
    return (*[slice(None)] * axis, slice(start, stop))


def _ends(low: npt.ArrayLike, high: npt.ArrayLike) -> tuple[Array, Array]:
    """Range ends, checked, as float64: differences of float32 numbers do not overflow there."""
    with np.errstate(over="ignore"):
        low, high = np.asarray(low).astype(np.float32), np.asarray(high).astype(np.float32)
    if low.shape != high.shape:
        raise DataError(f"range ends have different shapes, {low.shape} and {high.shape}: give one pair per scale")
    bad = ~(np.isfinite(low) & np.isfinite(high) & (low <= high))
    if bad.any():
        where = [int(i[0]) for i in np.nonzero(np.atleast_1d(bad))]
        raise DataError(
            f"range [{low[bad].flat[0]}, {high[bad].flat[0]}] at index {where} is not a finite range: "
            "look for inf and NaN in the data"
        )
    return low.astype(np.float64), high.astype(np.float64)


def _usable(scale: Array, codes: npt.ArrayLike) -> Array:
    """`scale` in float32: small enough that `codes` steps are finite, and 1 where it would be subnormal."""
    limit = np.nextafter(np.asarray(FLOAT32.max / np.asarray(codes), np.float32), np.float32(0))
    single = np.minimum(np.asarray(scale, np.float32), limit)
    return np.where(single < FLOAT32.smallest_normal, np.float32(1), single)
