import sys
from typing import Any

import numpy as np
import pytest

from qonnx.counting import SHIFT, Count, Table, by_numpy, counting

BITS = 32 - SHIFT


@pytest.fixture(params=["numpy", "numba"])
def count(request: pytest.FixtureRequest) -> Count:
    if request.param == "numpy":
        return by_numpy
    pytest.importorskip("numba")
    assert counting() is not by_numpy
    return counting()


def counted(table: Table) -> dict[int, int]:
    cells, counts = table.counts()
    return dict(zip(cells.tolist(), counts.tolist(), strict=True))


def expected(x: np.ndarray) -> dict[int, int]:
    cells, counts = np.unique(x.view(np.uint32) >> (32 - BITS), return_counts=True)
    return dict(zip(cells.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize("size", [1, 5, 1 << 15, (1 << 15) + 3, 200_000])
@pytest.mark.parametrize("writable", [True, False])
def test_each_element_adds_one_to_its_cell(count: Count, size: int, writable: bool) -> None:
    patterns = np.random.default_rng(size).integers(0, 2**32, size, np.uint32)
    patterns.flags.writeable = writable
    table = Table()
    count(patterns.view(np.float32), table)
    assert counted(table) == expected(patterns)
    count(patterns.view(np.float32), table)
    assert counted(table) == expected(np.tile(patterns, 2))


@pytest.mark.parametrize("size", [7, 9, 70_000, 300_001])
@pytest.mark.parametrize("negative", [[], [-0.0], [-1.0]], ids=["none", "-0", "-1"])
def test_zeros_behind_a_relu_are_counted_as_others(count: Count, size: int, negative: list[float]) -> None:
    x = np.maximum(np.random.default_rng(size).standard_normal(size), 0).astype(np.float32)
    x[: len(negative)] = negative
    x[3] = 1e-40
    table = Table()
    for _ in range(2):
        count(x, table)
    assert counted(table) == expected(np.tile(x, 2))
    assert counted(table) == expected(np.tile(x, 2))  # reading it changes nothing


@pytest.mark.parametrize("value", [0.0, 1.5, -0.0, np.nan, -1.5, 1e-45, -1e-39, np.inf, -np.inf])
@pytest.mark.parametrize("times", [65_535, 65_536, 65_537, 1 << 20])
def test_counts_do_not_overflow(count: Count, value: float, times: int) -> None:
    x, table = np.full(times, value, np.float32), Table()
    for _ in range(2):
        count(x, table)
    assert counted(table) == {int(x[:1].view(np.uint32)[0]) >> (32 - BITS): 2 * times}


def test_cells_that_are_nearly_full_stay_so(count: Count) -> None:
    table, total = Table(), np.zeros(0, np.float32)
    for value, times in [(1.5, 32_000), (-1.5, 40_000), (1.5, 32_000), (1.5, 32_000), (-1.5, 40_000), (1.5, 32_000)]:
        x = np.full(times, value, np.float32)
        count(x, table)
        total = np.concatenate([total, x])
    assert counted(table) == expected(total)


@pytest.mark.parametrize("size", [1, 63, 1000, 4096, 5000])
def test_counts_do_not_overflow_in_small_steps(count: Count, size: int) -> None:
    values = np.array([3, -3, 0, 1e-40, -1e-30, 3e38, 0.25], np.float32)
    x, table = values[np.random.default_rng(size).choice(7, size, p=[0.7, 0.2, *[0.02] * 5])], Table()
    steps = 200_000 // size
    for _ in range(steps):
        count(x, table)
    assert counted(table) == {cell: steps * times for cell, times in expected(x).items()}


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
    table = Table()
    assert count(x, table) == (x.min(initial=np.inf), x.max(initial=-np.inf))
    assert counted(table) == expected(x)


@pytest.mark.parametrize("pattern", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], ids=hex)
def test_nan_shows_in_the_extremes(count: Count, pattern: int) -> None:
    x = np.concatenate([np.ones(40_000, np.float32), np.array([pattern], np.uint32).view(np.float32)])
    assert np.isnan(count(x, Table())).all()


def test_without_numba_numpy_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    counting.cache_clear()
    assert counting() is by_numpy
    counting.cache_clear()


def test_files_that_cannot_be_read_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba")
    compiled, kept = numba.njit, list[bool]()

    def njit(*arguments: Any, cache: bool = False, **options: Any) -> Any:
        kept.append(cache)
        if cache:
            raise EOFError("damaged")
        return compiled(*arguments, **options)

    monkeypatch.setattr(numba, "njit", njit)
    counting.cache_clear()
    table = Table()
    assert counting()(np.ones(5, np.float32), table) == (1, 1)
    assert (kept, sum(counted(table).values())) == ([True, False], 5)
    counting.cache_clear()
