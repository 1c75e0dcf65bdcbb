"""The one call: what it writes, what it says, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qonnx
from qonnx.attempts import _missed
from qonnx.comparison import Comparison, Difference
from qonnx.errors import DataError, ModelError, OutputError, QonnxError, TargetError
from qonnx.graph import load, save
from qonnx.result import by_default, loading
from qonnx.runtime import Optimization, Session, session
from qonnx.smooth_choice import smoothed
from tests.graphs import model_of

MLP = (
    "g (float[n,32] x, float[32,64] w, float[64] b, float[64,32] w2, float[32] b2) => (float[n,32] y) "
    "{ [fc1] a = Gemm(x, w, b) r = Relu(a) [fc2] m = MatMul(r, w2) y = Add(m, b2) }"
)


def data(count: int = 10, rows: int = 64, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((rows, 32)).astype(np.float32)} for _ in range(count)]


@pytest.fixture
def float_file(tmp_path: Path) -> Path:
    save(model_of(MLP, weights="w b w2 b2", scale=0.2), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_writes_a_valid_file_and_says_how_good_it_is(float_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "quantized.onnx"
    result = qonnx.quantize(float_file, data(), output)
    onnx.checker.check_model(str(output), full_check=True)
    assert [layer.node for layer in result.plan.quantized_layers] == ["fc1", "fc2"]
    assert result.held_out == 2
    (difference,) = result.comparison.outputs
    assert difference.sqnr_db > 30
    assert result.quantized_bytes < 0.4 * result.float_bytes
    assert not result.warnings
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "quantized.onnx"]


def test_the_comparison_is_about_the_written_file(float_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "quantized.onnx"
    result = qonnx.quantize(float_file, data(), output)
    held = [data()[5], data()[9]]
    again = qonnx.compare(float_file, output, held)
    assert again.outputs == result.comparison.outputs


@pytest.mark.parametrize("towers", [1, 2])
def test_a_file_that_is_not_fully_optimized_is_told(towers: int, tmp_path: Path) -> None:
    """ONNX Runtime cannot load it so, together with what keeps integers exact."""
    second = "[right] z = MatMul(x2, w)" if towers == 2 else "z = Neg(x2)"
    inputs = "float[n,32] x, float[n,32] x2, float[32,64] w"
    text = f"g ({inputs}) => (float[n,64] y, float[n,m] z) {{ [left] y = MatMul(x, w) {second} }}"
    save(model_of(text, weights="w"), tmp_path / "model.onnx")
    stream = [{**batch, "x2": 2 * batch["x"]} for batch in data()]
    result = qonnx.quantize(tmp_path / "model.onnx", stream, tmp_path / "q.onnx", target="a800")
    assert len(result.plan.quantized_layers) == towers
    notes = [note for note in result.notes if "basic optimizations; set ORT_ENABLE_BASIC" in note]
    assert len(notes) == towers - 1
    assert all("existing tensor" in note and "leave out session.x64quantprecision" in note for note in notes)


@pytest.mark.parametrize(("target", "told"), [("ort-cpu", True), ("a800", False)])
def test_what_a_session_with_default_options_makes_of_the_file(target: str, told: bool, tmp_path: Path) -> None:
    """It pads with the lowest number what the graph pads with zeros, where all are negative."""
    text = (
        "g (float[n,4,8,8] x, float[16,4,3,3] w) => (float[n,16,3,3] y) <int64[8] p = {0,0,1,1,0,0,1,1}, "
        "float b = {-9}> { [conv] c = Conv(x, w) a = Add(c, b) d = Pad(a, p) "
        "y = MaxPool <kernel_shape = [3,3], strides = [3,3]> (d) }"
    )
    model = model_of(text, weights="w")
    rng = np.random.default_rng(0)
    stream = [{"x": rng.standard_normal((8, 4, 8, 8)).astype(np.float32)} for _ in range(10)]
    result = qonnx.quantize(model, stream, tmp_path / "q.onnx", target=target)
    notes = [note for note in result.notes if "default options" in note]
    assert bool(notes) == told
    assert all("disabled_optimizers=['WeightBiasQuantization', 'Pad_Fusion']" in note for note in notes)


def test_default_options_are_told_of_where_they_cost_something() -> None:
    def measured(*ratios: float, nonfinite: int = 0, equal: float = math.nan, refusal: str = "") -> Comparison:
        found = [
            Difference(name, db, 1, 0, 0, equal, 8, 0, nonfinite, 0) for name, db in zip("abc", ratios, strict=False)
        ]
        return Comparison(tuple(found), (), (), 1, Optimization.BASIC if refusal else Optimization.ALL, refusal)

    (note,) = by_default(measured(40, 30, math.nan), measured(20, 15.04, math.nan))
    assert note.startswith(
        "in a session with ONNX Runtime's default options, output b keeps 15.0 dB on this CPU, not 30.0"
    )
    assert by_default(measured(40, 30), measured(39.5, 31)) == ()
    assert by_default(measured(math.inf), measured(150)) == ()
    (note,) = by_default(measured(40), ModelError("q.onnx: no kernel"))
    assert "default options does not run this file (q.onnx: no kernel): set session.x64quantprecision=1" in note
    (note,) = by_default(measured(40, 30), measured(40, 30, nonfinite=1))
    assert "output a has values that are not finite" in note
    assert by_default(measured(40, nonfinite=2), measured(40, nonfinite=2)) == ()
    (note,) = by_default(measured(math.nan, equal=0.995), measured(math.nan, equal=0.9))
    assert "output a keeps 90.00% of its integers on this CPU, not 99.50%" in note
    assert by_default(measured(math.nan, equal=0.995), measured(math.nan, equal=0.99)) == ()
    assert by_default(measured(40, refusal="equal weights"), measured(20)) == ()  # told by `loading`


def test_why_a_file_is_not_optimized_is_told() -> None:
    def told(refusal: str, level: Optimization, batches: int = 1) -> tuple[str, ...]:
        return loading(Comparison((), (), (), batches, level, refusal))

    (note,) = told("no kernel", Optimization.BASIC)
    assert note.endswith(
        "(no kernel): it was measured with basic optimizations; set ORT_ENABLE_BASIC in your own session"
    )
    (note,) = told("Attempt to replace the existing tensor", Optimization.NONE)
    assert "with no optimizations; set ORT_DISABLE_ALL in your own session, or leave out session.x64quantprec" in note
    assert told("", Optimization.BASIC) == told("no kernel", Optimization.BASIC, batches=0) == ()


def test_an_output_that_does_not_depend_on_the_data_is_warned_of(tmp_path: Path) -> None:
    """It would be called exact."""
    text = (
        "g (float[n,32] x, float[32,64] w) => (float[n,64] y) <float zero = {0}, float[64] b = {"
        + ", ".join(["1"] * 64)
        + "}> { h = MatMul(x, w) z = Mul(h, zero) y = Add(z, b) }"
    )
    result = qonnx.quantize(model_of(text, weights="w"), data(), tmp_path / "q.onnx")
    assert any(warning.startswith("output y is the same for every sample") for warning in result.warnings)


@pytest.mark.parametrize("scores", ["s = MatMul(x, w)", "s = Mul(x, half)"])
def test_a_layer_behind_a_softmax_is_quantized(scores: str, tmp_path: Path) -> None:
    """A memory of learned slots: `quantize` took the weight for the values of an attention and stopped on it."""
    text = (
        "g (float[n,32] x, float[32,32] w, float[32,32] w2) => (float[n,32] y) <float half = {0.5}> "
        f"{{ {scores} p = Softmax(s) y = MatMul(p, w2) }}"
    )
    result = qonnx.quantize(model_of(text, weights="w w2"), data(), tmp_path / "q.onnx")
    assert not result.plan.float_layers
    assert result.comparison.outputs[0].sqnr_db > 20
    assert [tensor.high for tensor in result.plan.activations if tensor.source.startswith("softmax")]


def test_why_no_more_layers_are_left_in_float() -> None:
    assert "with 1 layer left in float, and no more than one in 4 may be: skip" in _missed(40, 1, 0)
    assert "with 2 layers left in float, and no other layer costs anything alone: skip" in _missed(40, 2, 1)


def test_smoothing_is_chosen_on_half_of_what_is_held_back(
    float_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def spy(*given: Any) -> Any:
        seen.extend(given[-1])
        return smoothed(*given)

    monkeypatch.setattr("qonnx.pipeline.smoothed", spy)
    single = data(200, rows=1)
    result = qonnx.quantize(float_file, single, tmp_path / "out.onnx", settings=["activations.calibrator.kind=minmax"])
    numbers = [next(i for i, batch in enumerate(single) if np.array_equal(batch["x"], each["x"])) for each in seen]
    held = list(range(1, 200, 4))
    assert len(numbers) >= 8
    assert numbers == held[: len(numbers)]
    assert len(numbers) + result.held_out <= len(held)


def test_biases_take_up_the_shift_of_the_mean(float_file: Path, tmp_path: Path) -> None:
    off = qonnx.quantize(float_file, data(), tmp_path / "off.onnx", settings=["correct_biases=false"])
    on = qonnx.quantize(float_file, data(), tmp_path / "on.onnx")
    assert not off.plan.biases
    assert {bias.node for bias in on.plan.biases} == {"fc1", "fc2"}
    mean = [np.abs(_mean_error(float_file, Path(result.output))).mean() for result in (off, on)]
    assert mean[1] < mean[0]


def _mean_error(reference: Path, candidate: Path) -> np.ndarray:
    batches = data(8, seed=1)
    outputs = [
        [np.concatenate([_y(runner, batch) for batch in batches])] for runner in map(session, (reference, candidate))
    ]
    return np.asarray((outputs[0][0] - outputs[1][0]).mean(axis=0))


def _y(runner: Session, batch: dict[str, np.ndarray]) -> np.ndarray:
    return runner.run(batch)["y"]


def test_a_file_tells_how_it_was_made(float_file: Path, tmp_path: Path) -> None:
    qonnx.quantize(float_file, data(), tmp_path / "quantized.onnx")
    model = load(tmp_path / "quantized.onnx")
    assert json.loads(model.metadata_props["qonnx.recipe"])["name"] == "int8"
    assert model.metadata_props["qonnx.target"] == "a800"
    assert model.metadata_props["qonnx.calibration_data"]
    assert model.producer_name == "qonnx"


def test_the_same_inputs_give_the_same_bytes(float_file: Path, tmp_path: Path) -> None:
    for name in ("one.onnx", "two.onnx"):
        qonnx.quantize(float_file, data(), tmp_path / name)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_a_plan_that_is_fed_back_gives_the_same_file(float_file: Path, tmp_path: Path) -> None:
    result = qonnx.quantize(float_file, data(), tmp_path / "one.onnx")
    result.plan.save(tmp_path / "plan.json")
    qonnx.quantize(float_file, data(), tmp_path / "two.onnx", plan=tmp_path / "plan.json")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_external_data_in_and_out(tmp_path: Path) -> None:
    save(model_of(MLP, weights="w b w2 b2", scale=0.2), tmp_path / "model.onnx", external_data_bytes=100)
    assert (tmp_path / "model.onnx.data").is_file()
    qonnx.quantize(tmp_path / "model.onnx", data(), tmp_path / "quantized.onnx")
    assert session(tmp_path / "quantized.onnx").run(data()[0])["y"].shape == (64, 32)


OUTLIER = (
    "g (float[n,32] x, float[32] k, float[32,64] w, float[64] b, float[64,32] w2, float[32,32] w3, float[32,32] w4) "
    "=> (float[n,32] y) "
    "{ s = Mul(x, k) [good] a = Gemm(s, w, b) r = Relu(a) [fine] m = MatMul(r, w2) [bad] z = MatMul(m, w3)"
    " [last] y = MatMul(z, w4) }"
)


def spoiled_model() -> ir.Model:
    """One feature drowns the other 31, and nothing but those 31 reaches the output."""
    model = model_of(OUTLIER, weights="k w b w2 w3 w4", scale=0.2)

    def change(name: str, index: Any, value: float) -> None:
        stored = model.graph.initializers[name]
        assert stored.const_value is not None
        array = stored.const_value.numpy().copy()
        array[index] = value
        stored.const_value = ir.Tensor(array, name=name)

    change("w2", (slice(None), 3), 500.0)
    change("w3", (3, slice(None)), 0.0)
    return model


def test_the_layer_to_blame_stays_in_float_and_the_rest_keeps_the_output(tmp_path: Path) -> None:
    settings = ["smooth.kind=none"]
    result = qonnx.quantize(spoiled_model(), data(), tmp_path / "quantized.onnx", settings=settings)
    assert [layer.node for layer in result.plan.float_layers] == ["bad"]
    assert "quantized alone" in result.plan.float_layers[0].reason
    assert result.comparison.outputs[0].sqnr_db > 17
    assert not result.warnings


def test_smoothing_needs_no_layer_in_float(tmp_path: Path) -> None:
    output = tmp_path / "quantized.onnx"
    result = qonnx.quantize(spoiled_model(), data(rows=128), output)
    assert not result.plan.float_layers
    assert result.comparison.outputs[0].sqnr_db > 25
    assert any(report.method for report in result.smoothing if report.value == "m")
    assert result.plan.smoothing
    qonnx.quantize(spoiled_model(), data(rows=128), tmp_path / "again.onnx", plan=result.plan)
    assert output.read_bytes() == (tmp_path / "again.onnx").read_bytes()


def test_without_the_fallback_it_warns_and_names_the_layer(tmp_path: Path) -> None:
    settings = ["minimum_sqnr_db=-100", "smooth.kind=none"]
    output = tmp_path / "quantized.onnx"
    silent = qonnx.quantize(spoiled_model(), data(), output, settings=[*settings, "goal_sqnr_db=0"])
    assert silent.comparison.outputs[0].sqnr_db < 5
    unreachable = qonnx.quantize(spoiled_model(), data(), output, settings=[*settings, "goal_sqnr_db=90"])
    assert any("measure the task" in warning for warning in unreachable.warnings)
    assert unreachable.costs[0].node == "bad"
    (note,) = (note for note in unreachable.notes if "were not reached" in note)
    assert note.startswith(
        "90.25 dB (goal_sqnr_db and 0.25 more) were not reached with 1 layer left in float, and no more than one in 4"
    )
    assert not any("were not reached" in note for note in silent.notes)
    assert len(unreachable.plan.float_layers) <= max(1, len(unreachable.plan.layers) // 4)


def test_a_graph_with_nothing_to_quantize_is_written_and_says_so(tmp_path: Path) -> None:
    model = model_of("g (float[n,32] x) => (float[n,32] y) { y = Sigmoid(x) }")
    result = qonnx.quantize(model, data(), tmp_path / "same.onnx")
    assert any("no layer was quantized" in warning for warning in result.warnings)
    assert np.isfinite(session(tmp_path / "same.onnx").run(data()[0])["y"]).all()


@pytest.mark.parametrize(
    ("text", "recipe", "warned"),
    [
        ("{ y = Conv(x, w) }", "int8-dynamic", True),
        ("{ y = Conv(x, w) }", "w8", False),
        ("{ f = Flatten(x) y = MatMul(f, m) }", "int8-dynamic", False),
    ],
)
def test_it_says_that_convolutions_are_slow_at_run_time(text: str, recipe: str, warned: bool, tmp_path: Path) -> None:
    weight = "float[8,3,3,3] w" if "Conv" in text else "float[192,8] m"
    result = "float[n,8,6,6] y" if "Conv" in text else "float[n,8] y"
    model = model_of(f"g (float[n,3,8,8] x, {weight}) => ({result}) {text}", weights=weight.split()[1])
    output = tmp_path / "q.onnx"
    warnings = qonnx.quantize(model, None, output, recipe=recipe, target="ort-cpu").warnings
    assert any("ConvInteger" in warning for warning in warnings) == warned


def test_a_single_batch_serves_for_both_and_it_says_so(float_file: Path, tmp_path: Path) -> None:
    result = qonnx.quantize(float_file, data(1, rows=4), tmp_path / "quantized.onnx")
    assert result.held_out == 0
    assert any("only one batch" in warning for warning in result.warnings)


def test_a_reason_written_by_hand_keeps_a_layer_in_float(float_file: Path, tmp_path: Path) -> None:
    plan = qonnx.quantize(float_file, data(), tmp_path / "one.onnx").plan
    layers = tuple(
        msgspec.structs.replace(layer, reason="I say so") if layer.node == "fc1" else layer for layer in plan.layers
    )
    qonnx.quantize(float_file, data(), tmp_path / "two.onnx", plan=msgspec.structs.replace(plan, layers=layers))
    model = load(tmp_path / "two.onnx")
    assert "w" in model.graph.initializers
    assert "w2" not in model.graph.initializers


def test_a_plan_keeps_what_a_convolution_writes_on_integers_for_a_layer_in_float(tmp_path: Path) -> None:
    """ONNX Runtime runs a convolution on integers only where its result is quantized, whoever reads that."""
    text = (
        "g (float[n,8,6,6] x, float[16,8,3,3] w, float[4,16,1,1] w2) => (float[n,4,4,4] y) "
        "{ [wide] a = Conv(x, w) r = Relu(a) [narrow] y = Conv(r, w2) }"
    )
    model = model_of(text, weights="w w2", scale=0.2)
    rng = np.random.default_rng(0)
    stream = [{"x": rng.standard_normal((8, 8, 6, 6)).astype(np.float32)} for _ in range(10)]
    result = qonnx.quantize(model, stream, tmp_path / "one.onnx", target="ort-cpu")
    assert [layer.node for layer in result.plan.float_layers] == ["narrow"]
    again = qonnx.quantize(model, stream, tmp_path / "two.onnx", target="ort-cpu", plan=result.plan)
    assert again.plan == result.plan
    assert (tmp_path / "two.onnx").read_bytes() == (tmp_path / "one.onnx").read_bytes()


def test_a_plan_for_another_target_is_refused(float_file: Path, tmp_path: Path) -> None:
    plan = qonnx.quantize(float_file, data(), tmp_path / "one.onnx", target="ort-cpu").plan
    with pytest.raises(TargetError, match="made for ort-cpu"):
        qonnx.quantize(float_file, data(), tmp_path / "two.onnx", plan=plan)


def test_statistics_of_another_model_are_refused(float_file: Path, tmp_path: Path) -> None:
    other = model_of("g (float[n,32] x, float[32,64] w) => (float[n,64] y) { y = MatMul(x, w) }", weights="w")
    statistics = qonnx.calibrate(other, data())
    with pytest.raises(DataError, match="were measured on another model"):
        qonnx.quantize(float_file, data(), tmp_path / "q.onnx", statistics=statistics)


def test_statistics_serve_many_recipes(float_file: Path, tmp_path: Path) -> None:
    statistics = qonnx.calibrate(float_file, data())
    for kind in ("minmax", "average", "entropy", "mse", "auto"):
        settings = [f"activations.calibrator.kind={kind}"]
        result = qonnx.quantize(float_file, data(), tmp_path / "q.onnx", settings=settings, statistics=statistics)
        assert result.comparison.outputs[0].sqnr_db > 20


def test_statistics_of_the_same_data_leave_nothing_unseen_to_judge_by(float_file: Path, tmp_path: Path) -> None:
    statistics = qonnx.calibrate(float_file, data())
    result = qonnx.quantize(float_file, data(), tmp_path / "q.onnx", statistics=statistics)
    assert result.held_out == 0
    (warning,) = result.warnings
    assert warning.startswith("the statistics are of the same data: the comparison uses batches that calibration saw")
    other = qonnx.quantize(float_file, data(seed=1), tmp_path / "q.onnx", statistics=statistics)
    assert other.held_out == 2
    assert not other.warnings


def test_a_plan_is_not_made_from_the_statistics_beside_it(float_file: Path, tmp_path: Path) -> None:
    statistics = qonnx.calibrate(float_file, data())
    plan = qonnx.quantize(float_file, data(seed=1), tmp_path / "q.onnx", statistics=statistics).plan
    again = qonnx.quantize(float_file, data(), tmp_path / "q.onnx", plan=plan, statistics=statistics)
    assert again.held_out == 2


def test_statistics_alone_are_not_enough(float_file: Path, tmp_path: Path) -> None:
    statistics = qonnx.calibrate(float_file, data())
    with pytest.raises(DataError, match=r"statistics do not tell .*: give data, too"):
        qonnx.quantize(float_file, None, tmp_path / "q.onnx", statistics=statistics)


def test_the_data_of_the_float_model_are_not_overwritten(tmp_path: Path) -> None:
    model = model_of(MLP, weights="w b w2 b2", scale=0.2)
    ir.save(model, tmp_path / "model.onnx", external_data="q.onnx.data")
    with pytest.raises(OutputError, match="would overwrite the float model"):
        qonnx.quantize(tmp_path / "model.onnx", data(), tmp_path / "q.onnx")


def test_what_is_reported_is_what_fresh_data_give(float_file: Path, tmp_path: Path) -> None:
    """Choices are made on one held-back batch and judged on others: other draws of the same size give the same."""
    excess = []
    for seed in range(6):
        result = qonnx.quantize(float_file, data(12, rows=16, seed=seed), tmp_path / "q.onnx")
        draws = [data(result.held_out, rows=16, seed=1000 * seed + draw) for draw in range(1, 9)]
        fresh = [qonnx.compare(float_file, tmp_path / "q.onnx", draw).outputs[0].sqnr_db for draw in draws]
        excess.append(result.comparison.outputs[0].sqnr_db - np.mean(fresh))
    assert abs(np.mean(excess)) < 1.0


def test_a_model_in_memory_is_not_changed(tmp_path: Path) -> None:
    model = model_of(MLP, weights="w b w2 b2", scale=0.2)
    before = ir.to_onnx_text(model)
    qonnx.quantize(model, data(), tmp_path / "quantized.onnx")
    assert ir.to_onnx_text(model) == before


def test_refuses_to_overwrite_the_float_model(float_file: Path) -> None:
    with pytest.raises(OutputError, match="would overwrite the float model"):
        qonnx.quantize(float_file, data(), float_file)


def test_refuses_a_quantized_model(float_file: Path, tmp_path: Path) -> None:
    qonnx.quantize(float_file, data(), tmp_path / "quantized.onnx")
    with pytest.raises(ModelError, match="quantized already"):
        qonnx.quantize(tmp_path / "quantized.onnx", data(), tmp_path / "twice.onnx")


def test_a_failure_half_way_leaves_nothing_behind(float_file: Path, tmp_path: Path) -> None:
    batches = data()
    batches[5]["x"][0, 0] = np.nan
    before = sorted(tmp_path.iterdir())
    with pytest.raises(QonnxError):
        qonnx.quantize(float_file, batches, tmp_path / "quantized.onnx")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("target", ["a800", "ort-cpu"])
def test_optimizations_off_and_on_agree(float_file: Path, tmp_path: Path, target: str) -> None:
    output = tmp_path / "quantized.onnx"
    qonnx.quantize(float_file, data(), output, target=target)
    plain, fused = (session(output, optimize=optimize).run(data()[0])["y"] for optimize in (False, True))
    assert np.abs(plain - fused).max() < 0.02 * np.abs(plain).max()


def test_the_public_names_are_functions_however_they_are_reached() -> None:
    import qonnx.comparison
    import qonnx.exporter

    for name in ("export", "calibrate", "quantize", "compare", "build_engine"):
        assert callable(getattr(qonnx, name))
        assert callable(getattr(qonnx, name))
    assert sorted(qonnx.__all__) == list(qonnx.__all__)
    assert set(dir(qonnx)) == set(qonnx.__all__)


@pytest.mark.parametrize(("name", "without_rank"), [("", ()), ("g", ("y",)), ("g", ("x",)), ("g", ("x", "y"))])
def test_files_that_run_although_they_are_not_valid(
    name: str, without_rank: tuple[str, ...], float_file: Path, tmp_path: Path
) -> None:
    """Runtimes take graphs without a name, and inputs and outputs without a rank; so do we."""
    proto = onnx.load(float_file)
    proto.graph.name = name
    for value in (*proto.graph.input, *proto.graph.output):
        if value.name in without_rank:
            value.type.tensor_type.ClearField("shape")
    onnx.save(proto, float_file)
    result = qonnx.quantize(float_file, data(), tmp_path / "quantized.onnx")
    assert len(result.plan.quantized_layers) == 2
    assert result.comparison.outputs[0].sqnr_db > 30


@pytest.mark.parametrize("linear", [True, False], ids=["linear indices", "coordinates"])
def test_sparse_weights_are_read(linear: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((32, 16)).astype(np.float32) * (rng.random((32, 16)) < 0.3)
    model = ir.to_proto(model_of("g (float[n,32] x, float[32,16] w) => (float[n,16] y) { y = MatMul(x, w) }"))
    del model.graph.input[1]
    places = np.flatnonzero(dense) if linear else np.argwhere(dense)
    values = onnx.numpy_helper.from_array(dense[dense != 0], "w")
    indices = onnx.numpy_helper.from_array(places.astype(np.int64))
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=values, indices=indices, dims=[32, 16]))
    onnx.save(model, tmp_path / "sparse.onnx")
    weight = load(tmp_path / "sparse.onnx").graph.initializers["w"].const_value
    assert weight is not None
    np.testing.assert_array_equal(weight.numpy(), dense)
    x = rng.standard_normal((8, 32)).astype(np.float32)
    result = qonnx.quantize(tmp_path / "sparse.onnx", [{"x": x}] * 4, tmp_path / "q.onnx")
    assert len(result.plan.quantized_layers) == 1
    assert result.comparison.outputs[0].sqnr_db > 30


def test_an_output_that_is_a_sequence_is_judged_by_what_it_is_made_of(tmp_path: Path) -> None:
    text = (
        "g (float[n,32] x, float[32,16] w) => (seq(float[n,?]) y) { a = MatMul(x, w) y = SplitToSequence<axis=1>(a) }"
    )
    rng = np.random.default_rng(0)
    batches = [{"x": rng.standard_normal((8, 32)).astype(np.float32)} for _ in range(4)]
    result = qonnx.quantize(model_of(text, weights="w"), batches, tmp_path / "q.onnx")
    assert len(result.plan.quantized_layers) == 1
    assert "no output is a tensor: nothing could be compared" in result.warnings
