"""Samples that come in other portions than the model takes, or all at once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qonnx
from qonnx.data import batches
from qonnx.graph import save
from qonnx.rebatch import Batch, rows, spread, together
from qonnx.runtime import InputSpec
from tests.graphs import model_of

MLP = (
    "g (float[n,16] x, float[16,16] w, float[16,16] w2) => (float[n,16] y) "
    "{ a = MatMul(x, w) r = Relu(a) y = MatMul(r, w2) }"
)


def specs(*shapes: tuple[int | str | None, ...] | None) -> list[InputSpec]:
    return [InputSpec(f"x{number}", np.dtype(np.float32), shape) for number, shape in enumerate(shapes)]


def given(*shapes: tuple[int, ...]) -> Batch:
    return {
        f"x{number}": np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
        for number, shape in enumerate(shapes)
    }


def joined(parts: list[Batch], name: str = "x0") -> Any:
    return np.concatenate([part[name] for part in parts])


def test_a_model_for_one_sample_takes_all_samples_one_by_one() -> None:
    data = given((5, 3), (5, 2, 4))
    parts = list(batches(data, specs((1, 3), (1, 2, "length"))))
    assert [rows(part) for part in parts] == [1] * 5
    assert all((joined(parts, name) == data[name]).all() for name in data)


def test_a_model_for_four_samples_takes_four_at_a_time_and_no_more_than_asked_for() -> None:
    parts = list(batches([given((8, 3)), given((4, 3))], specs((4, 3)), max_batches=2))
    assert [part["x0"].shape for part in parts] == [(4, 3), (4, 3)]
    assert (joined(parts) == given((8, 3))["x0"]).all()


@pytest.mark.parametrize(
    ("shapes", "data"),
    [
        (((1, 3),), given((5, 4))),  # another size differs
        (((4, 3),), given((6, 3))),  # no multiple
        (((1, 3), (1, 3)), given((4, 3), (5, 3))),  # the inputs disagree
        (((1,),), given((5,))),  # a vector, one number too long
        (((1, 3),), given((5, 3, 1))),  # another rank
    ],
)
def test_what_cannot_be_cut_to_size_is_refused_as_it_was_given(
    shapes: tuple[tuple[int, ...], ...], data: Batch
) -> None:
    with pytest.raises(qonnx.QonnxError, match="has shape"):
        list(batches(data, specs(*shapes)))


def test_a_single_batch_becomes_sixteen() -> None:
    data = given((100, 3), (100, 2))
    parts = list(spread([data], specs(("n", 3), ("n", "m"))))
    assert len(parts) == 16
    assert {rows(part) for part in parts} == {6, 7}
    assert all((joined(parts, name) == data[name]).all() for name in data)


@pytest.mark.parametrize(
    ("shapes", "data"),
    [
        ((("n", 3),), [given((100, 3)), given((100, 3))]),  # not a single one
        ((("n", 3),), [given((7, 3))]),  # small
        (((100, 3),), [given((100, 3))]),  # a fixed axis
        ((("n", 3), ("m", 3)), [given((100, 3), (100, 3))]),  # different axes
        ((("n",),), [given((100,))]),  # may be one sample
        ((("n", 3), (3,)), [given((100, 3), (3,))]),  # an input without that axis
        ((None,), [given((100, 3))]),  # nothing is known
    ],
)
def test_leaves_batches_alone(shapes: tuple[Any, ...], data: list[Batch]) -> None:
    parts = list(spread(data, specs(*shapes)))
    assert len(parts) == len(data)
    assert all(part is batch for part, batch in zip(parts, data, strict=True))


def test_no_batch_stays_none() -> None:
    assert not list(spread([], specs(("n", 3))))


@pytest.mark.parametrize(("count", "want"), [(2, 2), (3, 3), (5, 5), (99, 6)])
def test_samples_of_several_batches_come_together(count: int, want: int) -> None:
    data = [given((3, 2)), given((3, 2)), given((3, 4)), given((3, 2))]
    found = together(data, count)["x0"]
    assert (found == joined(data[:2])[:want]).all()
    assert len(found) == want


def test_one_array_is_calibrated_on_and_judged_by_different_rows(tmp_path: Path) -> None:
    save(model_of(MLP, weights="w w2", scale=0.2), tmp_path / "model.onnx")
    data = np.random.default_rng(0).standard_normal((512, 16)).astype(np.float32)
    result = qonnx.quantize(tmp_path / "model.onnx", data, tmp_path / "quantized.onnx")
    assert result.held_out == 2
    assert not result.warnings


@pytest.mark.parametrize(("size", "count"), [(1, 64), (8, 8), (64, 8)])
def test_the_choice_of_ranges_on_little_data_is_no_worse_than_the_plain_maximum(
    size: int, count: int, tmp_path: Path
) -> None:
    """A range that cuts off what few samples happen not to hold looks good on them, and is not."""
    save(model_of(MLP, weights="w w2", scale=0.25), tmp_path / "model.onnx")
    rng = np.random.default_rng(1)
    data = [{"x": rng.standard_normal((size, 16)).astype(np.float32)} for _ in range(count)]
    fresh = [{"x": rng.standard_normal((2000, 16)).astype(np.float32)}]
    found = {}
    for recipe in ("int8", "int8-minmax"):
        qonnx.quantize(tmp_path / "model.onnx", data, tmp_path / f"{recipe}.onnx", recipe=recipe)
        found[recipe] = qonnx.compare(tmp_path / "model.onnx", tmp_path / f"{recipe}.onnx", fresh).outputs[0].sqnr_db
    assert found["int8"] > found["int8-minmax"] - 1.5
