import itertools
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qonnx.blocks import observing_session
from qonnx.errors import DataError, ModelError
from qonnx.observation import Interrupted, Progress, _Work, observe
from qonnx.runtime import Session
from qonnx.sketch import Sketch, sketch
from qonnx.statistics import Statistics

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


@pytest.fixture
def by_sample() -> ir.Model:
    return ir.from_onnx_text(MODEL.replace("float[3] shift", "float[n, 3] shift"))


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


def test_three_batches_are_held_at_most(model: ir.Model) -> None:
    finished: list[int] = []

    def stream() -> Iterator[dict[str, np.ndarray]]:
        for index, batch in enumerate(batches(rows(), 2)):
            assert len(finished) >= index - 2
            yield batch

    observe(model, ["y"], stream(), progress=lambda p: finished.append(p.batches))
    assert finished == [1, 2, 3, 4, 5, 6]


def test_no_values_run_nothing(model: ir.Model) -> None:
    assert not observe(model, [], iter([])).tensors


def test_no_data_is_an_error(model: ir.Model) -> None:
    with pytest.raises(DataError, match="no calibration data"):
        observe(model, ["y"], [])


def test_unknown_values_are_an_error(model: ir.Model) -> None:
    with pytest.raises(ModelError, match="'nothing' is not computed"):
        observe(model, ["nothing"], batches(rows(), 4))


def assert_equal(left: Sketch | None, right: Sketch | None) -> None:
    assert left is not None
    assert right is not None
    np.testing.assert_array_equal(left.cells, right.cells)
    np.testing.assert_array_equal(left.counts, right.counts)


def test_distributions_are_counted_where_asked_for(model: ir.Model) -> None:
    found = observe(model, ["x", "y", "z"], batches(rows(), 5), distributions=["x", "z"]).tensors
    y = np.maximum(rows() + np.array([1, 0, -1], np.float32), 0)
    assert_equal(found["x"].sketch, sketch(rows()))
    assert_equal(found["z"].sketch, sketch(-y))
    assert found["y"].sketch is None
    assert found["z"].minimum == -y.max()
    np.testing.assert_allclose(found["z"].mean_square, np.square(y).mean(), rtol=5e-4)
    assert found["z"].finite


@pytest.mark.parametrize("size", [1, 5, 12])
def test_distributions_depend_on_neither_batch_size_nor_order(model: ir.Model, size: int) -> None:
    whole = observe(model, ["y"], batches(rows(), 12), distributions=["y"]).tensors["y"].sketch
    stream = batches(rows(), size)[::-1]
    assert_equal(observe(model, ["y"], stream, distributions=["y"]).tensors["y"].sketch, whole)
    halves = [observe(model, ["y"], part, distributions=["y"]) for part in (stream[:1], stream[1:]) if part]
    merged = halves[0] if len(halves) == 1 else halves[0].merge(halves[1])
    assert_equal(merged.tensors["y"].sketch, whole)


def test_halves_and_float16_are_counted_as_float32() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["" : 21]>
        half (float16[n] x) => (float16[n] y) { y = Neg(x) }
    """)
    x = np.array([0.1, -7, 0], np.float16)
    found = observe(model, ["y"], [{"x": x}], distributions=["y"]).tensors["y"]
    assert_equal(found.sketch, sketch(-x.astype(np.float32)))


def test_bad_elements_are_counted_and_told(model: ir.Model) -> None:
    x = rows(2)
    x[0, 0], x[1, 2] = np.inf, np.nan
    found = observe(model, ["x"], batches(x, 1), distributions=["x"]).tensors["x"]
    assert not found.finite
    assert found.sketch is not None
    assert (found.sketch.count, found.sketch.nonfinite) == (6, 2)


def interrupted(model: ir.Model, after: int) -> Statistics:
    def stop(progress: Progress) -> None:
        if progress.batches == after:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        observe(model, ["y"], batches(rows(), 1), distributions=["y"], progress=stop)
    return caught.value.statistics


def test_what_was_measured_before_ctrl_c_is_kept_and_gone_on_from(model: ir.Model) -> None:
    part = interrupted(model, after=3)
    assert 3 <= part.batches <= 6  # those that were running are finished
    first = observe(model, ["y"], batches(rows(), 1)[: part.batches], distributions=["y"])
    assert_equal(part.tensors["y"].sketch, first.tensors["y"].sketch)
    told: list[Progress] = []
    stream = batches(rows(), 1)
    resumed = observe(model, ["y"], stream, distributions=["y"], earlier=part, progress=told.append)
    whole = observe(model, ["y"], stream, distributions=["y"])
    assert (resumed.batches, resumed.samples) == (12, 12)
    assert told[0].batches == part.batches + 1
    assert_equal(resumed.tensors["y"].sketch, whole.tensors["y"].sketch)
    np.testing.assert_array_equal(resumed.tensors["y"].batch_maxima, whole.tensors["y"].batch_maxima)


def test_ctrl_c_while_data_are_read_keeps_what_was_measured(model: ir.Model) -> None:
    def stream() -> Iterator[dict[str, np.ndarray]]:
        yield from batches(rows(), 4)
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        observe(model, ["y"], stream(), distributions=["y"])
    assert caught.value.statistics.batches == 3


def interrupting(after: int, times: int = 1) -> Any:
    """Opens sessions that send signals before the batch of this number finishes."""
    ran = itertools.count(1)

    class Interrupting(Session):
        def run(self, *arguments: Any, **options: Any) -> Any:
            results = super().run(*arguments, **options)
            for _ in range(times if next(ran) == after else 0):
                time.sleep(0.2)  # the main thread waits by now
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                time.sleep(0.2)
            return results

    def opened(*arguments: Any, **options: Any) -> Session:
        runner = observing_session(*arguments, **options)
        runner.__class__ = Interrupting
        return runner

    return opened


def test_a_second_ctrl_c_waits_for_nothing_and_keeps_nothing(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qonnx.observation.observing_session", interrupting(3, times=2))
    with pytest.raises(KeyboardInterrupt) as caught:
        observe(model, ["y"], batches(rows(100), 1))
    assert not isinstance(caught.value, Interrupted)


@pytest.mark.parametrize("after", [2, 7, 70])
def test_ctrl_c_while_a_batch_runs_loses_none_and_counts_none_twice(
    model: ir.Model, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread waits for a worker when the signal comes, as it does nearly all the time."""
    stream = batches(rows(100), 1)
    with monkeypatch.context() as patch:
        patch.setattr("qonnx.observation.observing_session", interrupting(after))
        with pytest.raises(Interrupted) as caught:
            observe(model, ["y"], stream, distributions=["y"])
    part = caught.value.statistics
    assert after <= part.batches <= after + 3
    first = observe(model, ["y"], stream[: part.batches], distributions=["y"])
    assert_equal(part.tensors["y"].sketch, first.tensors["y"].sketch)
    np.testing.assert_array_equal(part.tensors["y"].batch_maxima, first.tensors["y"].batch_maxima)
    assert part.data == first.data


@pytest.mark.parametrize("after", [2, 4, 6, 30])
def test_ctrl_c_while_a_piece_runs_keeps_whole_batches(
    by_sample: ir.Model, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qonnx.pieces._BYTES", 1)
    stream = [{"x": rows(100)[i : i + 4], "shift": rows(100)[i : i + 4]} for i in range(0, 100, 4)]
    with monkeypatch.context() as patch:
        patch.setattr("qonnx.observation.observing_session", interrupting(after))
        with pytest.raises(Interrupted) as caught:
            observe(by_sample, ["y"], stream, distributions=["y"])
    part = caught.value.statistics
    assert after // 4 - 1 <= part.batches < 25
    if part.batches:
        first = observe(by_sample, ["y"], stream[: part.batches], distributions=["y"])
        assert_equal(part.tensors["y"].sketch, first.tensors["y"].sketch)
        assert part.data == first.data


@pytest.mark.parametrize("batches_before", [1, 2, 3])
def test_ctrl_c_while_a_batch_is_read_loses_none_of_those_before(by_sample: ir.Model, batches_before: int) -> None:
    def stream() -> Iterator[dict[str, np.ndarray]]:
        yield from ({"x": rows(4), "shift": rows(4)} for _ in range(batches_before))
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        observe(by_sample, ["y"], stream(), distributions=["y"])
    assert caught.value.statistics.batches == batches_before


@pytest.mark.parametrize("failing", range(4, 12))
def test_whichever_piece_fails_the_error_is_told(
    by_sample: ir.Model, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qonnx.pieces._BYTES", 1)
    run, ran = Session.run, itertools.count(1)

    def broken(self: Session, *arguments: Any) -> dict[str, np.ndarray]:
        if next(ran) == failing:
            raise DataError("broken")
        return run(self, *arguments)

    monkeypatch.setattr(Session, "run", broken)
    with pytest.raises(DataError, match="broken"):
        observe(by_sample, ["y"], [{"x": rows(4), "shift": rows(4)}] * 3)


def test_batches_are_not_held(by_sample: ir.Model) -> None:
    held = list[weakref.ref[np.ndarray]]()

    def stream() -> Iterator[dict[str, np.ndarray]]:
        for _ in range(9):
            x = rows(4)
            held.append(weakref.ref(x))
            yield {"x": x, "shift": rows(4)}
            del x
            assert sum(array() is not None for array in held) <= 4

    assert observe(by_sample, ["y"], stream()).batches == 9


def test_a_batch_ends_with_its_last_piece() -> None:
    work = _Work({}, [dict, dict, dict])
    taken = [index for index, _ in work]
    assert [work.done(index, {}) for index in reversed(taken)] == [False, False, True]
    assert not list(work)


def test_which_piece_ends_first_changes_no_sum(by_sample: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qonnx.pieces._BYTES", 1)
    run, random = Session.run, np.random.default_rng(0)

    def late(self: Session, *arguments: Any) -> dict[str, np.ndarray]:
        time.sleep(random.uniform(0, 2e-3))
        return run(self, *arguments)

    monkeypatch.setattr(Session, "run", late)
    x = np.exp(rows(64) * 5)
    shift = np.zeros((64, 3), np.float32)
    sums = {observe(by_sample, ["y"], [{"x": x, "shift": shift}]).tensors["y"].sum_squares for _ in range(5)}
    assert len(sums) == 1


def test_an_earlier_run_over_other_data_or_values_is_refused(model: ir.Model) -> None:
    part = observe(model, ["y"], batches(rows(), 1)[:3])
    for stream in (batches(rows() + 1, 1), batches(rows(), 1)[:2], batches(rows(), 2)):
        with pytest.raises(DataError, match=r"counted 3 batches, and the first \d of these data are others"):
            observe(model, ["y"], stream, earlier=part)
    with pytest.raises(DataError, match="observed other values"):
        observe(model, ["x", "y"], batches(rows(), 1), earlier=part)


def test_the_time_left_counts_this_run_only(model: ir.Model) -> None:
    told: list[Progress] = []
    stream = batches(rows(), 1)
    part = observe(model, ["y"], stream[:8], total=8, progress=told.append)
    observe(model, ["y"], stream, earlier=part, total=12, progress=told.append)
    assert [(p.batches, p.total) for p in told] == [*((n, 8) for n in range(1, 9)), *((n, 12) for n in range(9, 13))]
    for p in told:
        done = p.batches - (0 if p.total == 8 else 8)
        assert p.left == pytest.approx(p.seconds / done * ((p.total or 0) - p.batches))
        assert p.rate == pytest.approx(done / p.seconds)
    observe(model, ["y"], stream, progress=told.append)
    assert told[-1].left is None


def test_a_batch_that_does_not_fit_stops_the_run(model: ir.Model) -> None:
    bad = {"x": np.zeros((2, 5), np.float32), "shift": np.zeros(3, np.float32)}
    with pytest.raises(DataError, match="does not run on this batch"):
        observe(model, ["y"], [*batches(rows(), 4), bad, *batches(rows(), 4)], distributions=["y"])


def test_many_batches_stay_in_order(model: ir.Model) -> None:
    stream = batches(rows(300), 1)
    found = observe(model, ["x"], stream).tensors["x"]
    np.testing.assert_array_equal(found.batch_maxima, [batch["x"].max() for batch in stream])
