"""The offset of a tensor leaves the smallest range around zero, and is none where there is nothing to gain."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.passes.shift_range import middle


def test_a_relu6_gets_half_of_its_range() -> None:
    offset = middle(np.zeros(3), np.array([6.0, 2.0, 5.0]), alike=True)
    np.testing.assert_array_equal(offset.shift, [3, 3, 3])
    assert offset.gain_db == pytest.approx(20 * np.log10(2))


def test_every_channel_its_own() -> None:
    offset = middle(np.array([4.0, -3.0]), np.array([6.0, -1.0]), alike=False)
    np.testing.assert_array_equal(offset.shift, [5, -2])
    assert offset.gain_db == pytest.approx(20 * np.log10(6))


def test_channels_without_elements() -> None:
    low, high = np.array([0.0, np.inf]), np.array([6.0, -np.inf])
    np.testing.assert_array_equal(middle(low, high, alike=True).shift, [3, 3])
    np.testing.assert_array_equal(middle(low, high, alike=False).shift, [3, 0])
    assert middle(low[1:], high[1:], alike=True).gain_db == 0


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize(("low", "high"), [([-2.0, -1.0], [2.0, 1.0]), ([0.0, 0.0], [0.0, 0.0])])
def test_nothing_to_gain(low: list[float], high: list[float], alike: bool) -> None:
    offset = middle(np.array(low), np.array(high), alike=alike)
    assert not offset.shift.any()
    assert offset.gain_db == 0


ENDS = st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0, 1e3)), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(ENDS, st.booleans(), st.floats(-1e3, 1e3))
def test_no_other_offset_leaves_less(ends: list[tuple[float, float]], alike: bool, other: float) -> None:
    low = np.array([end for end, _ in ends])
    high = low + np.array([width for _, width in ends])
    offset = middle(low, high, alike=alike)

    def reach(shift: object) -> float:
        return float(max(np.abs(low - shift).max(), np.abs(high - shift).max()))

    assert reach(offset.shift) <= reach(0.0)
    assert reach(offset.shift) <= reach(other) * (1 + 1e-12)
    assert offset.gain_db >= 0
    if alike:
        assert np.ptp(offset.shift) == 0
