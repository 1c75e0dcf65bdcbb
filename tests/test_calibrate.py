from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest

from qonnx.calibrate import Progress, observe
from qonnx.errors import DataError, ModelError

MODEL = """
    <ir_version: 8, opset_import: ["" : 21]>
    chain (float[n, 3] x, float[3] shift) => (float[n, 3] z) <float[n, 3] y> {
        moved = Add(x, shift)
        y = Relu(moved)
        z = Neg(y)
    }
"""


@pytest.fixture
def model() -> ir.Model:
    return ir.from_onnx_text(MODEL)


def batches(rows: np.ndarray, size: int) -> list[dict[str, np.ndarray]]:
    shift = np.array([1, 0, -1], np.float32)
    return [{"x": rows[i : i + size], "shift": shift} for i in range(0, len(rows), size)]


def rows(count: int = 12) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)


def test_observed_values_are_what_numpy_computes(model: ir.Model) -> None:
    statistics = observe(model, ["x", "y"], batches(rows(), 5), channel_axes={"y": -1})
    assert list(statistics.tensors) == ["x", "y"]
    assert (statistics.batches, statistics.samples) == (3, 12)
    y = np.maximum(rows() + np.array([1, 0, -1], np.float32), 0)
    found = statistics.tensors["y"]
    assert (found.count, found.minimum, found.maximum) == (36, y.min(), y.max())
    np.testing.assert_array_equal(found.batch_maxima, [y[:5].max(), y[5:10].max(), y[10:].max()])
    np.testing.assert_array_equal(found.channel_maximum, y.max(0))
    assert found.channel_axis == 1
    np.testing.assert_allclose(found.mean_square, np.square(y).mean(), rtol=1e-6)


def test_the_size_and_order_of_batches_do_not_matter(model: ir.Model) -> None:
    one = observe(model, ["y"], batches(rows(), 12)).tensors["y"]
    many = observe(model, ["y"], batches(rows(), 1)[::-1]).tensors["y"]
    assert (one.count, one.minimum, one.maximum) == (many.count, many.minimum, many.maximum)
    np.testing.assert_allclose(one.mean_square, many.mean_square, rtol=1e-6)


def test_two_halves_merge_into_the_whole(model: ir.Model) -> None:
    stream = batches(rows(), 3)
    whole = observe(model, ["y"], stream).tensors["y"]
    halves = observe(model, ["y"], stream[:2]).merge(observe(model, ["y"], stream[2:])).tensors["y"]
    assert (halves.count, halves.minimum, halves.maximum) == (whole.count, whole.minimum, whole.maximum)
    np.testing.assert_array_equal(halves.batch_minima, whole.batch_minima)


def test_the_model_is_left_as_it_is(model: ir.Model) -> None:
    before = ir.to_onnx_text(model)
    observe(model, ["y"], batches(rows(), 4))
    assert ir.to_onnx_text(model) == before


def test_progress_is_told_after_each_batch(model: ir.Model) -> None:
    told: list[Progress] = []
    observe(model, ["y"], batches(rows(), 5), progress=told.append)
    assert [(p.batches, p.samples) for p in told] == [(1, 5), (2, 10), (3, 12)]
    assert told[-1].rate > 0


def test_batches_are_taken_one_by_one(model: ir.Model) -> None:
    taken: list[int] = []
    finished: list[int] = []

    def stream() -> Iterator[dict[str, np.ndarray]]:
        for index, batch in enumerate(batches(rows(), 4)):
            assert len(finished) == index
            taken.append(index)
            yield batch

    observe(model, ["y"], stream(), progress=lambda p: finished.append(p.batches))
    assert taken == [0, 1, 2]


def test_no_values_run_nothing(model: ir.Model) -> None:
    assert not observe(model, [], iter([])).tensors


def test_no_data_is_an_error(model: ir.Model) -> None:
    with pytest.raises(DataError, match="no calibration data"):
        observe(model, ["y"], [])


def test_unknown_values_are_an_error(model: ir.Model) -> None:
    with pytest.raises(ModelError, match="'nothing' is not computed"):
        observe(model, ["nothing"], batches(rows(), 4))
