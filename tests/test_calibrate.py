"""One pass over the data: in every form, in parts, interrupted, and the same in the end."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qonnx
from qonnx.errors import DataError
from qonnx.observation import Interrupted, Progress
from qonnx.statistics import Statistics
from tests.graphs import model_of
from tests.test_statistics import assert_equal

# Two inputs, one of them integers, and an activation that is not observed by name only.
MODEL = (
    "g (float[n,32] x, int64[n,k] ids, float[9,32] table, float[32,64] w, float[64] b, float[64,32] w2) "
    "=> (float[n,32] y) { "
    "e = Gather(table, ids) axes = Constant<value_ints=[1]>() s = ReduceSum<keepdims=0>(e, axes) t = Add(x, s) "
    "[fc1] a = Gemm(t, w, b) r = Relu(a) [fc2] y = MatMul(r, w2) }"
)

Batches = list[dict[str, np.ndarray]]


def assert_same(parts: Statistics, whole: Statistics) -> None:
    """Equal; sums of squares within the rounding of float64, as they depend on the order of additions."""
    tensors = dict(parts.tensors)
    for name, tensor in whole.tensors.items():
        np.testing.assert_allclose(tensors[name].sum_squares, tensor.sum_squares, rtol=1e-12)
        tensors[name] = dataclasses.replace(tensors[name], sum_squares=tensor.sum_squares)
    assert_equal(dataclasses.replace(parts, tensors=tensors), whole)


def made(seed: int = 0) -> ir.Model:
    return model_of(MODEL, weights="table w b w2", seed=seed, scale=0.2)


def data(sizes: tuple[int, ...] = (8,) * 11 + (3,), seed: int = 0) -> Batches:
    """The last batch is smaller."""
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((n, 32)).astype(np.float32), "ids": rng.integers(0, 9, (n, 4))} for n in sizes]


@pytest.fixture(scope="module")
def whole() -> Statistics:
    return qonnx.calibrate(made(), data())


def in_a_folder(folder: Path) -> Path:
    for number, batch in enumerate(data()):
        np.savez(folder / f"{number:02d}.npz", **batch)  # type: ignore[arg-type]
    return folder


def loader(labels: bool, as_dict: bool) -> Any:
    """A torch DataLoader over samples; the last batch is smaller."""
    import torch

    samples = [
        {name: torch.from_numpy(array[row]) for name, array in batch.items()}
        for batch in data()
        for row in range(len(batch["x"]))
    ]
    items: Any = samples if as_dict else [tuple(sample.values()) for sample in samples]
    if labels:
        items = [(item if as_dict else tuple(item), torch.tensor(0)) for item in items]
    return torch.utils.data.DataLoader(items, batch_size=8)


FORMS: dict[str, tuple[Callable[[Path], Any], int | None]] = {
    "a folder": (in_a_folder, 12),
    "the folder as text": (lambda folder: str(in_a_folder(folder)), 12),
    "a list of dicts": (lambda _: data(), 12),
    "tuples in input order": (lambda _: [tuple(batch.values()) for batch in data()], 12),
    "a generator": (lambda _: (batch for batch in data()), None),
    "a function": (lambda _: data, None),
    "a generator function": (lambda _: lambda: iter(data()), None),
    "DataLoader of dicts": (lambda _: loader(False, True), 12),
    "DataLoader of tuples": (lambda _: loader(False, False), 12),
    "DataLoader of dicts with labels": (lambda _: loader(True, True), 12),
    "DataLoader of tuples with labels": (lambda _: loader(True, False), 12),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same(form: str, tmp_path: Path, whole: Statistics) -> None:
    make, total = FORMS[form]
    told: list[Progress] = []
    assert_same(qonnx.calibrate(made(), make(tmp_path), progress=told.append), whole)
    assert [(p.batches, p.total) for p in told] == [(number, total) for number in range(1, 13)]
    told.clear()
    first = qonnx.calibrate(made(), make(tmp_path), max_batches=5, progress=told.append)
    assert_same(first, qonnx.calibrate(made(), data()[:5]))
    assert told[-1].total == (None if total is None else 5)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_can_be_quantized_with(form: str, tmp_path: Path) -> None:
    make, total = FORMS[form]
    (tmp_path / "calib").mkdir()
    told: list[Progress] = []
    result = qonnx.quantize(
        made(), make(tmp_path / "calib"), tmp_path / "q.onnx", recipe="int8-minmax", progress=told.append
    )
    assert result.held_out == 2
    assert told[-1].batches == 9
    assert told[-1].total == (None if total is None else 9)


@pytest.mark.parametrize(("size", "count"), [("n", 8), ("4", 6), ("8", 3)])
def test_one_array_is_cut_into_batches_whose_number_is_known(size: str, count: int) -> None:
    text = f"g (float[{size},32] x, float[32,64] w) => (float[{size},64] y) {{ y = MatMul(x, w) }}"
    told: list[Progress] = []
    x = data()[0]["x"] if size == "n" else np.concatenate([batch["x"] for batch in data()[:3]])
    statistics = qonnx.calibrate(model_of(text, weights="w"), x, progress=told.append)
    assert (statistics.batches, statistics.samples) == (count, len(x))
    assert [p.total for p in told] == [count] * count
    again = qonnx.calibrate(model_of(text, weights="w"), [{"x": x}, {"x": x}], max_batches=5, progress=told.append)
    assert told[-1].total == told[-1].batches == again.batches == (2 if size == "n" else 5)


@pytest.mark.parametrize("after", [1, 5, 11])
def test_an_interrupted_run_is_gone_on_with(after: int, tmp_path: Path, whole: Statistics) -> None:
    def stop(progress: Progress) -> None:
        if progress.batches == after:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        qonnx.calibrate(made(), data(), progress=stop)
    part = caught.value.statistics
    assert after <= part.batches <= 12
    part.save(tmp_path / "part.npz")
    assert_same(qonnx.calibrate(made(), data(), resume=tmp_path / "part.npz"), whole)
    assert_same(qonnx.calibrate(made(), data(), resume=part), whole)


def test_interrupted_twice(whole: Statistics) -> None:
    def stopped_after(count: int) -> Iterator[dict[str, np.ndarray]]:
        yield from data()[:count]
        raise KeyboardInterrupt

    part = None
    for count in (4, 9):
        with pytest.raises(Interrupted) as caught:
            qonnx.calibrate(made(), stopped_after(count), resume=part)
        part = caught.value.statistics
    assert part is not None
    assert part.batches == 9
    assert_same(qonnx.calibrate(made(), data(), resume=part), whole)


def test_parts_merge_into_the_whole(tmp_path: Path, whole: Statistics) -> None:
    """On two machines or after one another: counts, extremes and distributions are those of one run."""
    parts = [data()[:4], data()[4:9], data()[9:]]
    for number, part in enumerate(parts):
        qonnx.calibrate(made(), part).save(tmp_path / f"{number}.npz")
    files = [tmp_path / f"{number}.npz" for number in range(3)]
    assert_same(qonnx.calibrate(made(), merge=files), whole)
    assert_same(qonnx.calibrate(made(), parts[2], merge=files[:2]), whole)
    assert_same(functools.reduce(Statistics.merge, map(Statistics.load, files)), whole)
    shuffled = qonnx.calibrate(made(), merge=files[::-1])
    assert shuffled.data == whole.data


def other_weights(model: ir.Model) -> tuple[Statistics, str]:
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(np.asarray(value.const_value) + np.float32(1e-3), name=value.name)
    return qonnx.calibrate(model, image()), "measured on another model, or with other weights"


def another_model(_: ir.Model) -> tuple[Statistics, str]:
    return qonnx.calibrate(made(), data()), "measured on another model"


def another_target(model: ir.Model) -> tuple[Statistics, str]:
    return qonnx.calibrate(model, image(), target="ort-cpu"), "observed|another target"


def image() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 16, 8, 8)).astype(np.float32)


def convolutions() -> ir.Model:
    text = (
        "g (float[n,16,8,8] x, float[16,16,3,3] w, float[16,16,3,3] w2) => (float[n,16,4,4] y) "
        "{ a = Conv(x, w) r = Relu(a) s = Sigmoid(r) y = Conv(s, w2) }"
    )
    return model_of(text, weights="w w2", scale=0.2)


@pytest.mark.parametrize("other", [other_weights, another_model, another_target], ids=lambda other: other.__name__)
def test_statistics_that_do_not_fit_are_refused(
    other: Callable[[ir.Model], tuple[Statistics, str]], tmp_path: Path
) -> None:
    statistics, words = other(convolutions())
    statistics.save(tmp_path / "other.npz")
    for given in ({"merge": [tmp_path / "other.npz"]}, {"resume": tmp_path / "other.npz"}):
        with pytest.raises(DataError, match=words) as caught:
            qonnx.calibrate(convolutions(), image(), **given)
        assert "\n" not in str(caught.value)
    if other is not another_target:  # which has all tensors and more
        with pytest.raises(DataError, match=words):
            qonnx.quantize(convolutions(), image(), tmp_path / "q.onnx", statistics=tmp_path / "other.npz")
    else:
        mine = qonnx.calibrate(convolutions(), image())
        with pytest.raises(DataError, match=r"tensors are missing.*another target"):
            qonnx.quantize(convolutions(), image(), tmp_path / "q.onnx", statistics=mine, target="ort-cpu")


def test_nothing_to_calibrate_on() -> None:
    with pytest.raises(DataError, match="give data, or statistics to merge"):
        qonnx.calibrate(made())


def test_recipes_that_want_more_tensors_say_so_when_they_are_calibrated(tmp_path: Path) -> None:
    """Results of products and residuals, which others do not quantize: these statistics serve all recipes."""
    text = (
        "g (float[n,4,32] x, float[32,64] w, float[64] b, float[64,32] w2) => (float[n,4,32] y) "
        "{ m = MatMul(x, w) a = Add(m, b) r = Relu(a) h = MatMul(r, w2) y = Add(h, x) }"
    )
    model, rng = model_of(text, weights="w b w2", scale=0.2), np.random.default_rng(0)
    batches = [{"x": rng.standard_normal((8, 4, 32)).astype(np.float32)} for _ in range(8)]
    usual = qonnx.calibrate(model, batches)
    with pytest.raises(DataError, match="the recipe wants more tensors than most do: calibrate with it"):
        qonnx.quantize(model, batches, tmp_path / "q.onnx", recipe="bert-int8-mode2", statistics=usual)
    more = qonnx.calibrate(model, batches, recipe="bert-int8-mode2")
    assert more.tensors.keys() > usual.tensors.keys()
    for recipe in ("bert-int8-mode2", "int8-unsmoothed"):
        measured, again = (
            qonnx.quantize(model, batches, tmp_path / "q.onnx", recipe=recipe, statistics=each) for each in (more, None)
        )
        assert [tensor.value for tensor in measured.plan.activations] == [
            tensor.value for tensor in again.plan.activations
        ]
        assert abs(measured.comparison.outputs[0].sqnr_db - again.comparison.outputs[0].sqnr_db) < 1
