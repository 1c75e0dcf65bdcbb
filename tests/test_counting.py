import sys

import numpy as np
import pytest

from qonnx.counting import Count, by_numpy, counting

SHIFT = 20


@pytest.fixture(params=["numpy", "numba"])
def count(request: pytest.FixtureRequest) -> Count:
    if request.param == "numpy":
        return by_numpy
    pytest.importorskip("numba")
    assert counting() is not by_numpy
    return counting()


@pytest.mark.parametrize("size", [1, 5, 1 << 15, (1 << 15) + 3, 200_000])
@pytest.mark.parametrize("writable", [True, False])
def test_each_element_adds_one_to_its_cell(count: Count, size: int, writable: bool) -> None:
    patterns = np.random.default_rng(size).integers(0, 2**32, size, np.uint32)
    patterns.flags.writeable = writable
    table = np.full(1 << (32 - SHIFT), 7, np.int32)
    count(patterns.view(np.float32), SHIFT, table)
    expected = np.bincount(patterns.astype(np.int64) >> SHIFT, minlength=1 << (32 - SHIFT)) + 7
    np.testing.assert_array_equal(table, expected)


@pytest.mark.parametrize(
    "x",
    [
        np.random.default_rng(0).standard_normal(100_003).astype(np.float32),
        np.array([-3, -1e-40, -2], np.float32),
        np.array([3, 1e-40, 2], np.float32),
        np.array([-np.inf, 1], np.float32),
        np.array([-1, np.inf], np.float32),
        np.array([-0.0], np.float32),
        np.zeros(0, np.float32),
    ],
    ids=["normal", "negative", "positive", "-inf", "inf", "-0", "none"],
)
def test_extremes_come_with_the_counts(count: Count, x: np.ndarray) -> None:
    table = np.zeros(1 << (32 - SHIFT), np.int32)
    assert count(x, SHIFT, table) == (x.min(initial=np.inf), x.max(initial=-np.inf))
    assert table.sum() == x.size


@pytest.mark.parametrize("pattern", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], ids=hex)
def test_nan_shows_in_the_extremes(count: Count, pattern: int) -> None:
    x = np.concatenate([np.ones(40_000, np.float32), np.array([pattern], np.uint32).view(np.float32)])
    assert np.isnan(count(x, SHIFT, np.zeros(1 << (32 - SHIFT), np.int32))).any()


def test_without_numba_numpy_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    counting.cache_clear()
    assert counting() is by_numpy
    counting.cache_clear()
