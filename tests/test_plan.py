"""Plans: the numbers, the reasons, and JSON that reads back."""

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qonnx.calibrators import Auto
from qonnx.errors import RecipeError
from qonnx.numerics import Dtype
from qonnx.observation import observe
from qonnx.passes.prepare import prepare
from qonnx.placement import candidates, place
from qonnx.plan import QuantPlan
from qonnx.planner import make_plan
from qonnx.ranges import calibrated
from qonnx.recipe import Recipe, load_recipe
from qonnx.resolve import resolve
from qonnx.targets import target
from tests.graphs import model_of

MLP = (
    "g (float[n,32] x, float[32,64] w, float[64] b, float[64,32] w2) => (float[n,32] y) "
    "{ [fc1] a = Gemm(x, w, b) r = Relu(a) [fc2] y = MatMul(r, w2) }"
)


def planned(
    model: ir.Model, batches: list[dict[str, np.ndarray]], recipe: Recipe | None = None, name: str = "a800"
) -> QuantPlan:
    prepare(model)
    chosen = resolve(recipe or load_recipe("int8-average"), target(name))
    values = candidates(place(model, chosen, target(name)))
    statistics = observe(model, values, batches)
    calibrator, dtype = chosen.activations.calibrator, chosen.activations.dtype
    assert not isinstance(calibrator, Auto)
    assert isinstance(dtype, Dtype)
    ranges = calibrated(values, statistics, calibrator, dtype, symmetric=target(name).symmetric)
    return make_plan(model, statistics, ranges, chosen, target(name))


def mlp() -> ir.Model:
    return model_of(MLP, weights="w b w2", scale=0.2)


def data(count: int = 3, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((8, 32)).astype(np.float32)} for _ in range(count)]


def test_scales_are_the_largest_magnitude_over_127() -> None:
    batches = data()
    plan = planned(mlp(), batches, load_recipe("int8-minmax"))
    (first,) = [tensor for tensor in plan.activations if tensor.value == "x"]
    largest = max(np.abs(batch["x"]).max() for batch in batches)
    assert np.float32(first.scale[0]) == np.float32(largest) / np.float32(127)
    assert first.zero_point == ()
    model = mlp()
    weight = next(tensor for tensor in plan.weights if tensor.value == "w")
    stored = model.graph.initializers["w"].const_value
    assert stored is not None
    np.testing.assert_array_equal(
        np.array(weight.scale, np.float32), np.abs(stored.numpy()).max(axis=0) / np.float32(127)
    )


def test_the_average_uses_the_mean_of_the_extremes_of_batches() -> None:
    batches = data()
    plan = planned(mlp(), batches, load_recipe("int8-average"))
    (first,) = [tensor for tensor in plan.activations if tensor.value == "x"]
    high = np.mean([batch["x"].max() for batch in batches])
    low = np.mean([batch["x"].min() for batch in batches])
    np.testing.assert_allclose(first.scale[0], max(high, -low) / 127, rtol=1e-6)


def test_the_estimated_signal_to_noise_ratio_is_close_to_the_real_one() -> None:
    batches = data(16)
    plan = planned(mlp(), batches)
    (first,) = [tensor for tensor in plan.activations if tensor.value == "x"]
    x = np.concatenate([batch["x"] for batch in batches])
    scale = np.float32(first.scale[0])
    noise = x - np.round(x / scale) * scale
    real = 10 * np.log10(np.sum(x**2) / np.sum(noise**2))
    assert first.sqnr_db is not None
    assert abs(first.sqnr_db - real) < 0.3


def test_a_layer_whose_input_would_be_rounded_away_stays_in_float_and_says_so() -> None:
    x = data()[0]["x"]
    x = np.tile(x, (500, 1))
    x[3, 5] = 5000.0
    plan = planned(mlp(), [{"x": x}])
    reason = {layer.node: layer.reason for layer in plan.layers}["fc1"]
    assert "its input x would keep" in reason
    assert all(tensor.value != "x" for tensor in plan.activations)
    assert all(tensor.value != "w" for tensor in plan.weights)


def test_an_input_that_is_not_finite_keeps_its_layer_in_float() -> None:
    model = model_of(
        "g (float[8,32] x, float[32,32] w) => (float[8,32] y) { l = Log(x) y = MatMul(l, w) }", weights="w"
    )
    plan = planned(model, data())
    assert plan.layers[0].reason == "its input l is not always finite"
    assert not plan.activations


def test_an_all_zero_input_keeps_its_layer_in_float() -> None:
    plan = planned(mlp(), [{"x": np.zeros((8, 32), np.float32)}])
    reasons = {layer.node: layer.reason for layer in plan.layers}
    assert reasons["fc1"] == "its input x was 0 in all of the data: nothing tells how far it reaches"
    assert not reasons["fc2"]
    assert plan.activations
    for tensor in plan.activations:
        assert tensor.scale[0] > 0
        assert math.isfinite(tensor.scale[0])


def test_scales_of_a_float16_graph_are_float16_values() -> None:
    text = MLP.replace("float[", "float16[")
    model = model_of(text, weights="w b w2", scale=0.2)
    batches = [{"x": batch["x"].astype(np.float16)} for batch in data()]
    for tensor in (plan := planned(model, batches)).activations + plan.weights:
        scale = np.array(tensor.scale, np.float32)
        np.testing.assert_array_equal(scale, scale.astype(np.float16).astype(np.float32))
        assert (scale > 0).all()


def test_json_reads_back_to_the_same_plan(tmp_path: Path) -> None:
    plan = planned(mlp(), data())
    plan.save(tmp_path / "plan.json")
    assert QuantPlan.load(tmp_path / "plan.json") == plan
    lines = (tmp_path / "plan.json").read_text().splitlines()
    entries = [line for line in lines if '"value":' in line]
    assert len(entries) == len(plan.activations) + len(plan.weights)


def test_planning_twice_gives_the_same_bytes() -> None:
    assert planned(mlp(), data()).to_json() == planned(mlp(), data()).to_json()


@pytest.mark.parametrize("text", ["", "{}", '{"target": "a800"}', "not json"])
def test_what_is_not_a_plan_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(RecipeError, match="not a valid plan"):
        QuantPlan.load(tmp_path / "plan.json")


def test_onnx_runtime_gets_unsigned_activations_with_zero_points() -> None:
    plan = planned(mlp(), data(), name="ort-cpu")
    by_value = {tensor.value: tensor for tensor in plan.activations}
    assert by_value["x"].zero_point
    assert not by_value["r"].zero_point  # after Relu the lowest code is zero
