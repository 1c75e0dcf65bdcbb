"""Rounding with error feedback: what one weight loses to its grid, the weights after it make up for.

A layer computes X W. Of all codes, those are wanted that disturb that least, and not those that are nearest to W:

    min  sum ((W - Q)^T H (W - Q))   over the columns of W,   with H = X^T X

Rows of W are rounded one after the other. With H = R R^T, R upper triangular, and D = W - Q of the rows before,

    Q[j] = quantize(W[j] + (sum over i < j of R[i, j] D[i]) / R[j, j])

which gives the codes of Frantar et al., "GPTQ", ICLR 2023 (arXiv 2210.17323), equations 2 and 3, and needs no inverse
of H. Their "Cholesky form" updates all rows that are left; this one sums up what they would have been given.

The inputs that count most (the largest H[j, j]) come first, while there are many left to make up for them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qonnx.errors import DataError
from qonnx.numerics import Dtype, PerAxis, dequantize, quantize

Array = npt.NDArray[Any]

# Of the mean of the diagonal of H, added to it: the default of the paper. Ten times as much where that is not enough.
DAMPENING = 0.01
_MOST_DAMPENING = 10.0

# Rows whose feedback is summed up at a time; inside, one after the other.
_ROWS = 64


class Factor(NamedTuple):
    """A Hessian, ready to use.

    Attributes:
        order: in which rows are rounded, int [inputs].
        upper: R in that order, divided by its diagonal column by column, float32 [inputs, inputs].
    """

    order: npt.NDArray[np.intp]
    upper: npt.NDArray[np.float32]


def factor(hessian: Array, dampening: float = DAMPENING) -> Factor:
    """Orders and factors a Hessian.

    Args:
        hessian: sum over all samples of x x^T, [inputs, inputs]; an input that was always 0 influences no other.
        dampening: what is added to the diagonal, in parts of its mean; 10 at most.

    Raises:
        DataError: the Hessian is not finite.

    Example:
        >>> factor(np.diag([1.0, 4.0])).order
        array([1, 0])
    """
    diagonal = np.array(np.diagonal(hessian), np.float64)
    if not np.isfinite(diagonal).all():
        raise DataError("the inputs of the layer are not always finite: its weight can only be rounded to nearest")
    order = np.argsort(-diagonal, kind="stable")
    # From the last row to the first: a Cholesky factor is lower triangular, and R is upper.
    backwards = order[::-1]
    matrix, mean = hessian[np.ix_(backwards, backwards)].astype(np.float64), float(diagonal.mean()) or 1.0
    dampening = min(dampening, _MOST_DAMPENING)
    while dampening <= _MOST_DAMPENING:
        np.fill_diagonal(matrix, diagonal[backwards] + dampening * mean)
        try:
            lower = np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            dampening *= 10
        else:
            upper = lower[::-1, ::-1]
            return Factor(order, (upper / np.diagonal(upper)).astype(np.float32))
    raise DataError("the inputs of the layer have no positive definite second moments: round its weight to nearest")


def round_with_feedback(weight: Array, by: Factor, scale: Array, zero_point: Array, size: int, dtype: Dtype) -> Array:
    """The codes of a weight.

    Args:
        weight: [inputs, outputs].
        by: the factored Hessian of the inputs.
        scale: [blocks, outputs].
        zero_point: [blocks, outputs].
        size: of a block of inputs; all of them where there is one block.
        dtype: of the codes.

    Returns:
        Codes [inputs, outputs].
    """
    order, upper = by
    rows = np.asarray(weight, np.float32)[order]
    lost = np.empty_like(rows)
    codes = np.empty(rows.shape, dtype.numpy)
    for start in range(0, len(rows), _ROWS):
        stop = min(start + _ROWS, len(rows))
        wanted = rows[start:stop] + upper[:start, start:stop].T @ lost[:start]
        for row, index in enumerate(range(start, stop)):
            wanted[row] += upper[start:index, index] @ lost[start:index]
            block = order[index] // size
            parameters = scale[block], zero_point[block]
            codes[index] = quantize(wanted[row], *parameters, dtype, PerAxis(0))
            lost[index] = rows[index] - dequantize(codes[index], *parameters, PerAxis(0))
    placed = np.empty_like(codes)
    placed[order] = codes
    return placed
