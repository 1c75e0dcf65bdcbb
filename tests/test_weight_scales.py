"""Scales of weights: from the largest magnitude of each group, or the end of the grid with the least squared error."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.errors import DataError
from qonnx.numerics import Blocked, Dtype, Granularity, PerAxis, PerTensor, fake_quantize
from qonnx.recipe import Clip
from qonnx.weight_scales import weight_scales

KINDS: tuple[Granularity, ...] = (PerTensor(), PerAxis(0), PerAxis(1), Blocked(0, 4), Blocked(1, 5))


def groups(weight: np.ndarray, kind: Granularity) -> list[np.ndarray]:
    """The elements that share a scale, in the order of the scales."""
    match kind:
        case PerTensor():
            return [weight.ravel()]
        case PerAxis(axis):
            return list(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1))
    rows = weight if kind.axis == 1 else weight.T
    cut = [[row[i : i + kind.block_size] for i in range(0, len(row), kind.block_size)] for row in rows]
    ordered = cut if kind.axis == 1 else list(zip(*cut, strict=True))
    return [block for row in ordered for block in row]


def error(group: np.ndarray, scale: float, low: int, high: int) -> float:
    codes = np.clip(np.rint(group.astype(np.float64) / scale), low, high)
    return float(((group - codes * scale) ** 2).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [Dtype.INT2, Dtype.INT4, Dtype.INT8])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_end_of_the_grid_that_was_tried_leaves_less(dtype: Dtype, kind: Granularity, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_t(3, (8, 10)).astype(np.float32)
    plain, _ = weight_scales(weight, dtype, kind, symmetric=True, clip=Clip.NONE)
    found, zeros = weight_scales(weight, dtype, kind, symmetric=True, clip=Clip.MSE)
    assert not zeros.any()
    low, high = int(dtype.minimum), int(dtype.maximum)
    for group, start, scale in zip(groups(weight, kind), np.ravel(plain), np.ravel(found), strict=True):
        np.testing.assert_allclose(start, np.abs(group).max() / high, rtol=1e-6)
        least = min(error(group, float(start) * (1 - step / 32), low, high) for step in range(17))
        assert error(group, float(scale), low, high) <= least * 1.001 + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_zero_points_move_with_the_ends(kind: Granularity) -> None:
    weight = (np.random.default_rng(0).standard_normal((8, 10)) + 1).astype(np.float32)
    errors = []
    for clip in Clip:
        scale, zeros = weight_scales(weight, Dtype.UINT4, kind, symmetric=False, clip=clip)
        assert scale.shape == zeros.shape
        assert zeros.any()
        errors.append(((weight - fake_quantize(weight, scale, zeros, Dtype.UINT4, kind)) ** 2).sum())
    assert errors[1] <= errors[0]


def test_clipping_pays_where_one_weight_is_large() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    kept = []
    for clip in Clip:
        scale, _ = weight_scales(weight, Dtype.INT4, Blocked(1, 128), symmetric=True, clip=clip)
        rounded = fake_quantize(weight, scale, None, Dtype.INT4, Blocked(1, 128))
        kept.append(10 * np.log10((weight**2).sum() / ((weight - rounded) ** 2).sum()))
    assert kept[1] > kept[0] + 1


def test_a_group_of_zeros_has_a_scale() -> None:
    for clip in Clip:
        scale, _ = weight_scales(np.zeros((2, 4), np.float32), Dtype.INT4, PerAxis(0), symmetric=True, clip=clip)
        assert (scale > 0).all()


def test_what_is_not_finite_is_refused() -> None:
    weight = np.array([[1.0, np.nan]], np.float32)
    with pytest.raises(DataError, match="finite"):
        weight_scales(weight, Dtype.INT4, PerTensor(), symmetric=True, clip=Clip.MSE)
