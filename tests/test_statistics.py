import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.errors import DataError, OutputError
from qonnx.sketch import sketch
from qonnx.statistics import Part, Statistics, TensorStatistics, from_batch, from_parts


def of(*batches: Any, axis: int | None = None) -> TensorStatistics:
    parts = [tensor(np.asarray(batch, np.float32), axis) for batch in batches]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    return merged


def tensor(x: np.ndarray, axis: int | None = None) -> TensorStatistics:
    others = None if axis is None else tuple(i for i in range(x.ndim) if i != axis)
    with np.errstate(over="ignore"):
        squares = float(np.square(x).sum())
    return from_batch(
        x.size,
        float(x.min(initial=np.inf)),
        float(x.max(initial=-np.inf)),
        squares,
        axis,
        None if axis is None else x.min(others, initial=np.inf),
        None if axis is None else x.max(others, initial=-np.inf),
    )


def assert_equal(a: Statistics, b: Statistics) -> None:
    assert (a.batches, a.samples, a.data, a.model) == (b.batches, b.samples, b.data, b.model)
    assert list(a.tensors) == list(b.tensors)
    for name, left in a.tensors.items():
        right = b.tensors[name]
        assert (left.sketch is None) == (right.sketch is None)
        if left.sketch is not None and right.sketch is not None:
            np.testing.assert_array_equal(left.sketch.cells, right.sketch.cells)
            np.testing.assert_array_equal(left.sketch.counts, right.sketch.counts)
        for field in set(TensorStatistics.__dataclass_fields__) - {"sketch"}:
            np.testing.assert_array_equal(getattr(left, field), getattr(right, field), err_msg=f"{name} {field}")


FLOATS = st.floats(-1e6, 1e6, width=32)
BATCHES = st.lists(st.lists(FLOATS, max_size=5), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(BATCHES, st.randoms())
def test_counts_and_extremes_depend_on_neither_order_nor_batch_size_nor_the_tree_of_merges(
    batches: list[list[float]], random: Any
) -> None:
    elements = np.array([x for batch in batches for x in batch], np.float32)
    parts = [tensor(np.array(batch, np.float32)) for batch in batches]
    random.shuffle(parts)
    while len(parts) > 1:
        left = parts.pop(random.randrange(len(parts)))
        right = parts.pop(random.randrange(len(parts)))
        parts.append(left.merge(right))
    assert parts[0].count == elements.size
    assert parts[0].minimum == elements.min(initial=np.inf)
    assert parts[0].maximum == elements.max(initial=-np.inf)
    assert parts[0].finite
    squares = np.square(elements.astype(np.float64)).sum()
    np.testing.assert_allclose(parts[0].sum_squares, squares, rtol=1e-5, atol=1e-30)


def test_batches_are_kept_in_order() -> None:
    statistics = of([1, -2], [], [3, 4])
    np.testing.assert_array_equal(statistics.batch_minima, [-2, np.inf, 3])
    np.testing.assert_array_equal(statistics.batch_maxima, [1, -np.inf, 4])
    assert statistics.mean_square == (1 + 4 + 9 + 16) / 4
    assert statistics.absolute_maximum == 4


def test_channels_merge_channel_by_channel() -> None:
    statistics = of([[1, -2], [3, 4]], [[0, 9], [-1, 5]], axis=1)
    np.testing.assert_array_equal(statistics.channel_minimum, [-1, -2])
    np.testing.assert_array_equal(statistics.channel_maximum, [3, 9])


def test_an_empty_tensor_is_neutral() -> None:
    empty = of([])
    assert (empty.count, empty.mean_square, empty.absolute_maximum, empty.finite) == (0, 0, 0, True)
    assert of([], [2]).minimum == of([2], []).minimum == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_element_is_remembered(bad: float) -> None:
    assert not of([1, bad], [2]).finite
    assert not of([1], [2], [bad]).finite


def test_overflowing_squares_are_not_infinite_elements() -> None:
    assert of([1e30, -1e30]).finite


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        ({"x": of([1])}, {"y": of([1])}, "value 'x' was observed in one run only"),
        ({"x": of([[1]], axis=0)}, {"x": of([[1]], axis=1)}, "value 'x': channels along axis 0 and 1"),
        ({"x": of([[1]], axis=1)}, {"x": of([[1, 2]], axis=1)}, "value 'x': 1 and 2 channels"),
    ],
)
def test_runs_that_differ_do_not_merge(
    left: dict[str, TensorStatistics], right: dict[str, TensorStatistics], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Statistics(left, 1, 1).merge(Statistics(right, 1, 1))


def test_runs_on_different_models_do_not_merge() -> None:
    a, b, unknown = (Statistics({"x": of([1])}, 1, 1, "1", model) for model in ("a", "b", ""))
    with pytest.raises(DataError, match="measured on different models"):
        a.merge(b)
    assert a.merge(unknown).model == unknown.merge(a).model == "a"
    assert int(a.merge(a).data, 16) == 2


def test_no_statistics_are_neutral() -> None:
    some = Statistics({"x": of([1])}, 1, 1)
    assert_equal(Statistics({}, model="a").merge(some), Statistics(some.tensors, 1, 1, model="a"))
    assert_equal(some.merge(Statistics({}, model="a")), Statistics(some.tensors, 1, 1, model="a"))
    assert Statistics({}).merge(some) is some
    assert some.merge(Statistics({})) is some


def counted(*x: float) -> TensorStatistics:
    return dataclasses.replace(of(list(x)), sketch=sketch(np.array(x, np.float32)))


def test_distributions_add_up() -> None:
    merged = counted(1, 2).merge(counted(2, -3)).sketch
    assert merged is not None
    np.testing.assert_array_equal(merged.counts, [1, 2, 1])
    with pytest.raises(DataError, match="the distribution was measured in one run only"):
        counted(1).merge(of([1]))


def example() -> Statistics:
    tensors = {
        "counted": counted(1, 2, 2, -1e30).merge(counted(5)),
        "/layer.0/x:0": of([[1, -2], [3, 4]], [[5, 6], [7, 8]], axis=1),
        "ünïcode": of([], []),
        "bad": of([np.nan], [1]),
    }
    return Statistics(tensors, 2, 4, "0f" * 16, "a0" * 16)


def test_files_bring_everything_back(tmp_path: Path) -> None:
    example().save(tmp_path / "stats.npz")
    assert_equal(Statistics.load(tmp_path / "stats.npz"), example())
    Statistics({}).save(tmp_path / "none.npz")
    assert_equal(Statistics.load(tmp_path / "none.npz"), Statistics({}))


def test_equal_statistics_give_equal_bytes(tmp_path: Path) -> None:
    example().save(tmp_path / "a.npz")
    example().save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut short"])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "stats.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"stats\.npz: not readable as statistics") as caught:
        Statistics.load(path)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    example().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="not readable as statistics"):
        Statistics.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.ones(3))
    np.savez(tmp_path / "arrays.npz", x=np.ones(3))
    np.savez(tmp_path / "old.npz", header=np.frombuffer(b'{"format": 0}', np.uint8))
    for name, message in [
        ("array.npy", "not a file of statistics"),
        ("arrays.npz", "not a file of statistics"),
        ("old.npz", "written by another version"),
        ("missing.npz", "no such file"),
    ]:
        with pytest.raises(DataError, match=message):
            Statistics.load(tmp_path / name)


def test_an_unwritable_place_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        example().save(tmp_path / "missing" / "stats.npz")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_a_bad_piece_shows_in_its_batch(bad: float, where: int) -> None:
    pieces = [Part(3, 2.0, -1, 2, None, None), Part(4, 5.0, -3, 1, None, None)]
    pieces[where] = Part(3, 0.0, bad, bad, None, None)
    found = from_parts(pieces, None)
    assert not found.finite
    assert not np.isfinite(found.batch_maxima).any()
    assert np.isnan(found.batch_minima).any() == np.isnan(bad)


def test_pieces_of_other_channels_are_refused() -> None:
    parts = [Part(n, 0.0, 0, 0, np.zeros(n, np.float32), np.zeros(n, np.float32)) for n in (2, 3)]
    with pytest.raises(DataError, match="2 and 3 channels"):
        from_parts(parts, 1)
