"""Weights as their codes stand for, and the biases that take up what rounding them does to the mean."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qonnx
from qonnx.graph import load
from qonnx.numerics import Blocked, Dtype, Granularity, PerAxis
from qonnx.placement import Edge
from qonnx.plan import QuantPlan, TensorPlan
from qonnx.recipe import Format
from qonnx.runtime import session
from qonnx.stored_weights import with_stored_weights
from tests.graphs import model_of

TWO = (
    "g (float[n,8] x, float[8,6] w, float[6] b) => (float[n,6] y, float[n,6] z) "
    "{ [first] y = Gemm(x, w, b) [second] z = MatMul(x, w) }"
)


def plan(scale: np.ndarray, granularity: Granularity, dtype: Dtype) -> QuantPlan:
    scales = tuple(float(each) for each in scale.reshape(-1))
    tensor = TensorPlan("w", (Edge("first", 1),), dtype, granularity, scales)
    return QuantPlan(
        recipe="w8", target="ort-cpu", format=Format.WEIGHT_ONLY, activations=(), weights=(tensor,), layers=()
    )


def initializer(model: ir.Model, name: str) -> np.ndarray:
    stored = model.graph.initializers[name].const_value
    assert stored is not None
    return stored.numpy()


@pytest.mark.parametrize(("bits", "dtype"), [(2, Dtype.INT2), (4, Dtype.INT4), (8, Dtype.INT8)])
@pytest.mark.parametrize("blocked", [False, True])
def test_the_planned_layer_reads_rounded_weights_and_no_other_does(bits: int, dtype: Dtype, blocked: bool) -> None:
    model = model_of(TWO, weights="w b", opset=13)
    weight = initializer(model, "w")
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.05, 0.2, (2, 6) if blocked else 6).astype(np.float32)
    full = np.repeat(scale, 4, axis=0) if blocked else scale
    expected = np.clip(np.round(weight / full), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * full
    before = ir.to_onnx_text(model)
    stored = with_stored_weights(model, plan(scale, Blocked(0, 4) if blocked else PerAxis(1), dtype))
    assert ir.to_onnx_text(model) == before
    x = rng.standard_normal((5, 8)).astype(np.float32)
    found = session(stored).run({"x": x})
    bias = initializer(model, "b")
    np.testing.assert_allclose(found["y"], x @ expected + bias, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["z"], x @ weight, rtol=1e-5, atol=1e-5)


NETWORK = (
    "g (float[n,16,6,6] x, float[16,16,1,1] w, float[16,16] v, float[16] c) => (float[n,16] y) "
    "{ [conv] a = Conv(x, w) r = Relu(a) p = GlobalAveragePool(r) f = Flatten(p) [fc] y = Gemm(f, v, c) }"
)


def positive(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.uniform(0.5, 1.5, (16, 16, 6, 6)).astype(np.float32)} for _ in range(count)]


def made(tmp_path: Path, recipe: str, *settings: str, data: list[dict[str, np.ndarray]] | None) -> Path:
    output = tmp_path / f"{'-'.join((recipe, *settings))}-{data is None}.onnx"
    model = model_of(NETWORK, weights="w v c", scale=0.5)
    qonnx.quantize(model, data, output, recipe=recipe, target="ort-cpu", settings=settings)
    return output


def mean_error(file: Path) -> np.ndarray:
    reference, candidate = session(model_of(NETWORK, weights="w v c", scale=0.5)), session(file)
    unseen = positive(8, seed=7)
    errors = [candidate.run(batch)["y"] - reference.run(batch)["y"] for batch in unseen]
    return np.asarray(np.abs(np.concatenate(errors).mean(axis=0)))


@pytest.mark.parametrize("recipe", ["w8", "w4"])
def test_biases_take_up_what_rounding_weights_does_to_the_mean(recipe: str, tmp_path: Path) -> None:
    plain = mean_error(made(tmp_path, recipe, "correct_biases=false", data=positive(8)))
    corrected = mean_error(made(tmp_path, recipe, data=positive(8)))
    assert corrected.max() < 0.2 * plain.max()


def test_without_data_biases_stay_as_they_are(tmp_path: Path) -> None:
    plain, default = (made(tmp_path, "w8", *settings, data=None) for settings in (("correct_biases=false",), ()))
    weights = [
        {name: initializer(model, name).tobytes() for name in model.graph.initializers}
        for model in (load(plain), load(default))
    ]
    assert weights[0] == weights[1]


def test_ranges_found_at_run_time_leave_biases_alone(tmp_path: Path) -> None:
    model = model_of(NETWORK, weights="w v c", scale=0.5)
    output = tmp_path / "q.onnx"
    assert not qonnx.quantize(model, positive(8), output, recipe="int8-dynamic", target="ort-cpu").plan.biases
    assert qonnx.quantize(model, positive(8), output, recipe="w8", target="ort-cpu").plan.biases


def test_a_plan_with_biases_is_judged_by_what_it_was_not_learned_from(tmp_path: Path) -> None:
    model, output = model_of(NETWORK, weights="w v c", scale=0.5), tmp_path / "q.onnx"
    first = qonnx.quantize(model, positive(12), output, recipe="w8", target="ort-cpu")
    bytes_of_first = output.read_bytes()
    again = qonnx.quantize(model, positive(12), output, recipe="w8", target="ort-cpu", plan=first.plan)
    assert output.read_bytes() == bytes_of_first
    assert again.held_out == first.held_out < 12
    assert again.comparison == first.comparison


def test_per_token_gains_by_corrected_biases(tmp_path: Path) -> None:
    plain = mean_error(made(tmp_path, "int8-per-token", "correct_biases=false", data=positive(8)))
    corrected = mean_error(made(tmp_path, "int8-per-token", data=positive(8)))
    assert corrected.max() < 0.7 * plain.max()


def test_weights_that_nobody_reads_any_more_are_not_kept() -> None:
    model = model_of(NETWORK, weights="w v c", scale=0.5)
    weight = TensorPlan("w", (Edge("conv", 1),), Dtype.INT8, PerAxis(0), (0.01,) * 16)
    only = QuantPlan(
        recipe="w8", target="ort-cpu", format=Format.WEIGHT_ONLY, activations=(), weights=(weight,), layers=()
    )
    assert "w" not in with_stored_weights(model, only).graph.initializers
    assert "w" in model.graph.initializers
