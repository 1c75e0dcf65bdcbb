import mmap
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qonnx.sketch import MANTISSA_BITS, Counter, Sketch, sketch

Floats = npt.NDArray[np.float32]

ARRAYS = hnp.arrays(np.float32, st.integers(0, 60), elements=st.floats(width=32, allow_nan=True))


def assert_equal(left: Sketch, right: Sketch) -> None:
    np.testing.assert_array_equal(left.cells, right.cells)
    np.testing.assert_array_equal(left.counts, right.counts)


@settings(max_examples=50, deadline=None)
@given(st.lists(ARRAYS, min_size=1, max_size=5), st.randoms())
def test_neither_order_nor_batch_size_nor_the_tree_of_merges_matters(parts: list[Floats], random: Any) -> None:
    whole = sketch(np.concatenate(parts))
    counter = Counter()
    for part in random.sample(parts, len(parts)):
        counter.add(part)
    assert_equal(counter.sketch(), whole)
    sketches = [sketch(part) for part in parts]
    while len(sketches) > 1:
        left, right = (sketches.pop(random.randrange(len(sketches))) for _ in range(2))
        assert_equal(left.merge(right), right.merge(left))
        sketches.append(left.merge(right))
    assert_equal(sketches[0], whole)


@settings(max_examples=50, deadline=None)
@given(ARRAYS)
def test_every_element_is_in_its_cell(x: Floats) -> None:
    found = sketch(x)
    finite = x[np.isfinite(x)].astype(np.float64)
    assert found.count == x.size
    assert found.nonfinite == x.size - finite.size
    low, high, counts = found.values()
    assert np.all(low < high)
    assert np.all(high[:-1] <= low[1:])
    # Cells are closed towards 0: [low, high) above it, (low, high] below it. -0.0 is counted below, beside 0.
    inside = np.where(
        high[:, None] <= 0,
        (finite > low[:, None]) & (finite <= high[:, None]) & (np.signbit(finite)),
        (finite >= low[:, None]) & (finite < high[:, None]) & ~np.signbit(finite),
    )
    np.testing.assert_array_equal(inside.sum(axis=1), counts)


@settings(max_examples=50, deadline=None)
@given(ARRAYS)
def test_magnitudes_fold_the_signs(x: Floats) -> None:
    folded, absolute = sketch(x).magnitudes(), sketch(np.abs(x)).values()
    for left, right in zip(folded, absolute, strict=True):
        np.testing.assert_array_equal(left, right)


def test_cells_are_narrow() -> None:
    x = np.geomspace(1.2e-38, 3.4e38, 10_000).astype(np.float32)
    low, high, _ = sketch(x).magnitudes()
    assert np.max(high / low - 1) <= 2.0**-MANTISSA_BITS


def test_special_values_are_counted() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1e-44, 1, -1], np.float32)
    found = sketch(x)
    assert (found.count, found.nonfinite, found.zeros) == (8, 3, 3)


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_squares_are_summed_over_the_finite_elements(factor: float) -> None:
    x = (np.random.default_rng(0).standard_t(3, size=10_000) * factor).astype(np.float32)
    expected = np.square(x, dtype=np.float64).sum()
    assert abs(sketch(np.append(x, np.float32(np.inf))).sum_squares / expected - 1) < 1e-4
    assert sketch(np.zeros(5, np.float32)).sum_squares == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_are_counted_as_float32(dtype: type[np.floating[Any]]) -> None:
    x = np.array([[1.5, -2.25], [0.1, 7]])
    assert_equal(sketch(x.astype(dtype)), sketch(x.astype(dtype).astype(np.float32)))


def test_any_shape_and_layout_is_counted() -> None:
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    for view in (x, x.T, x[:, ::2], x[0, 0, 0], x[:0]):
        assert_equal(sketch(view), sketch(view.copy().reshape(-1)))


def test_arrays_longer_than_a_chunk_are_counted_whole() -> None:
    x = np.random.default_rng(0).normal(size=600_001).astype(np.float32)
    counter = Counter()
    for part in np.array_split(x, 7):
        counter.add(part)
    assert counter.sketch().count == x.size
    assert_equal(counter.sketch(), sketch(x))


def test_counts_beyond_32_bits_add_up() -> None:
    many = Sketch(np.array([5], np.uint32), np.array([2**40], np.int64))
    assert many.merge(many).counts.tolist() == [2**41]


def test_threads_may_add_to_one_counter() -> None:
    x = np.random.default_rng(0).normal(size=(8, 400_000)).astype(np.float32)
    counter = Counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(counter.add, x))
    assert_equal(counter.sketch(), sketch(x))


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_a_table_holds_little_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    x = np.random.default_rng(0).normal(size=1 << 18).astype(np.float32)
    sketch(x)
    before, counters = resident(), [Counter() for _ in range(50)]
    for counter in counters:
        counter.add(x)
        counter.sketch()
    assert resident() - before < len(counters) << 20


@pytest.mark.parametrize("size", [0, 1, 1000, 1 << 16, 300_001])
def test_extremes_are_told_of_arrays_of_every_size(size: int) -> None:
    counter = Counter()
    for seed in range(3):
        x = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
        assert counter.add(x) == (x.min(initial=np.inf), x.max(initial=-np.inf))
    assert counter.sketch().count == 3 * size
