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


@pytest.mark.parametrize("size", [0, 1, 5, 1 << 15, (1 << 15) + 3, 200_000])
@pytest.mark.parametrize("writable", [True, False])
def test_each_element_adds_one_to_its_cell(count: Count, size: int, writable: bool) -> None:
    patterns = np.random.default_rng(size).integers(0, 2**32, size, np.uint32)
    patterns.flags.writeable = writable
    table = np.full(1 << (32 - SHIFT), 7, np.int32)
    count(patterns, SHIFT, table)
    expected = np.bincount(patterns.astype(np.int64) >> SHIFT, minlength=1 << (32 - SHIFT)) + 7
    np.testing.assert_array_equal(table, expected)


def test_without_numba_numpy_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    counting.cache_clear()
    assert counting() is by_numpy
    counting.cache_clear()
