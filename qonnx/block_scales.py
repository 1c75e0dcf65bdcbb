"""Scales of blocks that take less room than a float each: powers of two, and integers under one float a channel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qonnx.errors import RecipeError
from qonnx.numerics import Dtype

# float32 has 24 significant bits: a code of n bits times a step of 24 - n is exact.
_SIGNIFICANT_BITS = 24

# The exponents of normal float32 numbers.
_EXPONENTS = (-126, 127)


def power_of_two_scale(largest: npt.ArrayLike, dtype: Dtype) -> npt.NDArray[np.float32]:
    """The scale of a block in a Microscaling format: 2^(floor(log2 largest) - floor(log2 maximum)).

    With int8 and blocks of 32 this is MXINT8, with float8 MXFP8, with float4e2m1 MXFP4. The largest elements of a block
    may saturate: they lie below twice the power of two under them, and the grid may end before that.

    Args:
        largest: the largest magnitude of each block, of any shape.
        dtype: type of the codes.

    Returns:
        Float32 powers of two of the shape of `largest`; 1 for blocks of zeros.

    Source: OCP Microscaling Formats (MX) Specification 1.0, 2023, section 6.3.

    >>> power_of_two_scale([0.0, 1.0, 1.99, 100.0], Dtype.INT8)
    array([1.      , 0.015625, 0.015625, 1.      ], dtype=float32)
    """
    exponent = np.frexp(np.asarray(largest, np.float32))[1] - np.frexp(dtype.maximum)[1]
    powers = np.ldexp(np.float32(1), np.clip(exponent, *_EXPONENTS))
    return np.where(np.asarray(largest) > 0, powers, np.float32(1)).astype(np.float32)


def integer_scales(
    scale: npt.ArrayLike, axis: int, bits: int = 8
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Scales as integers under one float a channel: scale <= codes * step, with equality for the largest.

    Rounded up, so that no element is clipped that was not before. Steps have so few significant bits that every product
    is exact in float32: code and step can be told from the products alone.

    Args:
        scale: positive, one per block.
        axis: of `scale`, along which the channels run.
        bits: of the codes, at most 8.

    Returns:
        Codes from 1 to 2^bits - 1 of the shape of `scale`, and one float32 step per channel.

    Raises:
        RecipeError: more than 8 bits, or fewer than 1.

    Source: Dai et al., VS-Quant: Per-Vector Scaled Quantization, MLSys 2021 (arXiv 2102.04503), section 4.

    >>> codes, step = integer_scales([[0.5, 0.25], [3.0, 1.0]], axis=0, bits=4)
    >>> codes, step
    (array([[15,  8],
           [15,  5]], dtype=uint8), array([0.03333336, 0.20000005], dtype=float32))
    """
    if not 1 <= bits <= 8:
        raise RecipeError(f"scales of {bits} bits are not possible: choose 1 to 8")
    scale = np.asarray(scale, np.float32)
    levels = 2**bits - 1
    others = tuple(i for i in range(scale.ndim) if i != axis % scale.ndim)
    step = _rounded_up(scale.max(axis=others).astype(np.float64) / levels, _SIGNIFICANT_BITS - bits)
    column = step.reshape(-1, *[1] * (scale.ndim - axis % scale.ndim - 1)).astype(np.float64)
    codes = np.clip(np.ceil(scale / column), 1, levels)
    return codes.astype(np.uint8), step


def split_scales(
    scale: npt.ArrayLike, axis: int, bits: int = 8
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]] | None:
    """The codes and steps that these scales are products of, or None where `integer_scales` did not make them.

    >>> codes, step = integer_scales([[0.5, 0.25], [3.0, 1.0]], axis=0)
    >>> split_scales(codes * step[:, None], axis=0)[0].tolist() == codes.tolist(), split_scales([[0.5, 0.3]], axis=0)
    (True, None)
    """
    scale = np.asarray(scale, np.float32)
    codes, step = integer_scales(scale, axis, bits)
    column = step.reshape(-1, *[1] * (scale.ndim - axis % scale.ndim - 1))
    return (codes, step) if np.array_equal(codes * column, scale) else None


def _rounded_up(values: npt.NDArray[np.float64], bits: int) -> npt.NDArray[np.float32]:
    """The next numbers with so many significant bits."""
    mantissa, exponent = np.frexp(values)
    return np.asarray(np.ldexp(np.ceil(np.ldexp(mantissa, bits)), exponent - bits), np.float32)
