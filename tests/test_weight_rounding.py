"""Codes chosen by what layers read: which weights get them, and that their layers lose less."""

from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qonnx
from qonnx import weight_rounding
from qonnx.errors import RecipeError
from qonnx.gptq import factor, round_with_feedback
from qonnx.graph import load
from qonnx.numerics import Array, Blocked, Dtype, PerAxis, PerTensor, dequantize, quantize
from qonnx.placement import Edge
from qonnx.plan import QuantPlan, TensorPlan
from qonnx.recipe import Format, Rounding
from qonnx.runtime import session
from tests.graphs import model_of

X, W = "float[n,48] x", "float[48,32] w"
PRODUCTS = {
    "MatMul": f"g ({X}, {W}) => (float[n,32] y) {{ [n] y = MatMul(x, w) }}",
    "MatMul of three axes": f"g (float[n,5,48] x, {W}) => (float[n,5,32] y) {{ [n] y = MatMul(x, w) }}",
    "MatMul, weight first": "g (float[n,48,5] x, float[32,48] w) => (float[n,32,5] y) { [n] y = MatMul(w, x) }",
    "MatMul, transposed weight": (
        f"g ({X}, float[32,48] w) => (float[n,32] y) {{ t = Transpose <perm = [1,0]> (w) [n] y = MatMul(x, t) }}"
    ),
    "Gemm": f"g ({X}, {W}) => (float[n,32] y) {{ [n] y = Gemm(x, w) }}",
    "Gemm, transB": f"g ({X}, float[32,48] w) => (float[n,32] y) {{ [n] y = Gemm <transB = 1> (x, w) }}",
    "Gemm, transA": f"g (float[48,n] x, {W}) => (float[n,32] y) {{ [n] y = Gemm <transA = 1> (x, w) }}",
    "Gemm, both": (
        "g (float[48,n] x, float[32,48] w) => (float[n,32] y) { [n] y = Gemm <transA = 1, transB = 1> (x, w) }"
    ),
}
SETTINGS = {
    "blocks of 16": ["weights.granularity={kind: blocked, block_size: 16}"],
    "per channel": ["weights.granularity.kind=per_channel"],
    "per tensor": ["weights.granularity.kind=per_tensor"],
    "zero points": ["weights.dtype=uint4"],
}


def data(model: ir.Model, count: int = 8, rows: int = 64) -> list[dict[str, Array]]:
    """Batches whose 48 channels depend on each other."""
    rng = np.random.default_rng(0)
    value = model.graph.inputs[0]
    assert value.shape is not None
    sizes = [size if isinstance(size, int) else rows for size in value.shape]
    axis, mix = sizes.index(48), rng.standard_normal((48, 48)) * rng.uniform(0.1, 2, 48)
    shape = [size for size in sizes if size != 48]
    draws = [np.moveaxis(rng.standard_normal((*shape, 48)) @ mix, -1, axis) for _ in range(count)]
    return [{"x": draw.astype(np.float32)} for draw in draws]


def sqnr(result: qonnx.Result) -> float:
    return result.comparison.outputs[0].sqnr_db


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_results_lose_less_on_data_that_was_not_seen(name: str, how: str, tmp_path: Path) -> None:
    model = model_of(PRODUCTS[name], weights="w")
    common = ["weights.clip=mse", *SETTINGS[how]]
    batches = data(model)
    rounded, nearest = (
        qonnx.quantize(
            model, batches, tmp_path / "q.onnx", recipe="w4", target="ort-cpu",
            settings=[*common, f"weights.rounding={rounding}"],
        )
        for rounding in (Rounding.GPTQ, Rounding.NEAREST)
    )  # fmt: skip
    assert rounded.held_out == 2
    assert rounded.plan.weights[0].rounding is Rounding.GPTQ
    assert rounded.plan.weights[0].scale == nearest.plan.weights[0].scale
    assert any("codes of 1 weights chosen by what their layers read" in note for note in rounded.notes)
    assert sqnr(rounded) > sqnr(nearest) + 2


def two(text: str, weights: str = "w w2") -> ir.Model:
    return model_of(text, weights=weights, scale=0.3)


SHARED = f"g ({X}, float[48,48] w) => (float[n,48] y) {{ [a] h = MatMul(x, w) r = Relu(h) [b] y = MatMul(r, w) }}"
RULED = ["rules=[{match: {name: n}, weights: {rounding: gptq}}]"]
KEPT_NEAREST = {
    "no matrix product": (
        "g (int64[n] x, float[48,32] w) => (float[n,32] y) { [n] y = Gather(w, x) }",
        ["rules=[{match: {op: Gather}, weights: {rounding: gptq}}]"],
    ),
    "a stack of matrices": (
        "g (float[2,n,48] x, float[2,48,32] w) => (float[2,n,32] y) { [n] y = MatMul(x, w) }",
        [],
    ),
    "read in float, too": (
        f"g ({X}, float[48,48] w) => (float[n,48] y, float[n,48] z) {{ [a] y = MatMul(x, w) [b] z = MatMul(y, w) }}",
        ["rules=[{match: {name: b}, skip: true}]"],
    ),
    "a convolution of nine taps": (
        "g (float[n,48,4,4] x, float[32,48,3,3] w) => (float[n,32,2,2] y) { [n] y = Conv(x, w) }",
        RULED,
    ),
    "a convolution of two groups": (
        "g (float[n,48,2,2] x, float[32,24,1,1] w) => (float[n,32,2,2] y) { [n] y = Conv <group = 2> (x, w) }",
        RULED,
    ),
    "a convolution with strides": (
        "g (float[n,48,4,4] x, float[32,48,1,1] w) => (float[n,32,2,2] y) { [n] y = Conv <strides = [2,2]> (x, w) }",
        RULED,
    ),
    "a transposed convolution": (
        "g (float[n,48,2,2] x, float[48,32,1,1] w) => (float[n,32,2,2] y) { [n] y = ConvTranspose(x, w) }",
        RULED,
    ),
    "16 bits": (PRODUCTS["MatMul"], ["weights.dtype=int16", "weights.granularity.kind=per_channel"]),
}


@pytest.mark.parametrize("name", KEPT_NEAREST)
def test_other_weights_are_rounded_to_nearest(name: str, tmp_path: Path) -> None:
    text, settings = KEPT_NEAREST[name]
    model = model_of(text, weights="w")
    rng = np.random.default_rng(0)
    shape = [8 if not isinstance(size, int) else size for size in model.graph.inputs[0].shape or ()]
    integers = model.graph.inputs[0].dtype == ir.DataType.INT64
    draws = [rng.integers(0, 48, shape) if integers else rng.standard_normal(shape) for _ in range(3)]
    batches = [{"x": draw.astype(np.int64 if integers else np.float32)} for draw in draws]
    found = qonnx.quantize(model, batches, tmp_path / "q.onnx", recipe="w4", target="ort-cpu", settings=settings)
    plain = ["weights.rounding=nearest", *(each.replace("gptq", "nearest") for each in settings)]
    qonnx.quantize(model, batches, tmp_path / "plain.onnx", recipe="w4", target="ort-cpu", settings=plain)
    assert {tensor.rounding for tensor in found.plan.weights} == {Rounding.NEAREST}
    assert any("1 weights are rounded to nearest" in note for note in found.notes)
    runs = [session(tmp_path / f"{stem}.onnx").run(batches[0]) for stem in ("q", "plain")]
    for value in runs[0]:
        np.testing.assert_array_equal(runs[0][value], runs[1][value])


def test_a_weight_with_two_readers_is_rounded_for_both(tmp_path: Path) -> None:
    model = two(SHARED, "w")
    batches = data(model)
    rounded, nearest = (
        qonnx.quantize(model, batches, tmp_path / "q.onnx", recipe="w4", target="ort-cpu", settings=settings)
        for settings in ([], ["weights.rounding=nearest"])
    )
    assert len(rounded.plan.weights) == 1
    assert sqnr(rounded) > sqnr(nearest) + 1


def test_without_data_weights_are_rounded_to_nearest_and_that_is_said(tmp_path: Path) -> None:
    model = model_of(PRODUCTS["Gemm"], weights="w")
    blind = qonnx.quantize(model, None, tmp_path / "blind.onnx", recipe="w4", target="ort-cpu")
    assert any("1 weights are rounded to nearest: give data" in note for note in blind.notes)
    assert blind.plan.weights[0].rounding is Rounding.NEAREST
    settings = ["weights.rounding=nearest"]
    qonnx.quantize(model, None, tmp_path / "plain.onnx", recipe="w4", target="ort-cpu", settings=settings)
    graphs = [
        ir.to_onnx_text(ir.Model(load(tmp_path / f"{name}.onnx").graph, ir_version=10)) for name in ("blind", "plain")
    ]
    assert graphs[0] == graphs[1]


def test_a_plan_that_is_fed_back_gives_the_same_codes(tmp_path: Path) -> None:
    model = two(SHARED, "w")
    batches = data(model)
    first = qonnx.quantize(model, batches, tmp_path / "one.onnx", recipe="w4", target="ort-cpu")
    first.plan.save(tmp_path / "plan.json")
    assert QuantPlan.load(tmp_path / "plan.json") == first.plan
    again = qonnx.quantize(model, batches, tmp_path / "two.onnx", target="ort-cpu", plan=tmp_path / "plan.json")
    assert again.held_out == first.held_out == 2
    graphs = [load(tmp_path / f"{name}.onnx").graph for name in ("one", "two")]
    assert ir.to_onnx_text(ir.Model(graphs[0], ir_version=10)) == ir.to_onnx_text(ir.Model(graphs[1], ir_version=10))
    assert load(tmp_path / "two.onnx").metadata_props["qonnx.calibration_data"]


@pytest.mark.parametrize("dtype", [Dtype.INT8, Dtype.UINT8, Dtype.INT4, Dtype.FLOAT4E2M1, Dtype.FLOAT8E4M3FN])
@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-3, 100))
def test_codes_are_found_again_in_what_they_stand_for(scale: float, kind: Any, dtype: Dtype) -> None:
    """A weight carries its codes to where it is written, in the float type of the graph."""
    if dtype.bits > 4 and kind is ml_dtypes.bfloat16:
        return  # eight significant bits are not enough: such weights are rounded to nearest
    step, zero = np.array(scale).astype(kind).astype(np.float32), np.array(dtype is Dtype.UINT8, dtype.numpy)
    values = np.arange(2**dtype.bits, dtype=np.uint8).view(np.uint8)
    codes = values.view(dtype.numpy) if dtype.bits == 8 else values.astype(np.int8).astype(dtype.numpy)
    codes = codes[np.isfinite(codes.astype(np.float32))]
    stands_for = dequantize(codes, step, zero, PerTensor()).astype(kind).astype(np.float32)
    again = quantize(stands_for, step, zero, dtype, PerTensor())
    np.testing.assert_array_equal(again.astype(np.float32), codes.astype(np.float32))


def test_half_precision(tmp_path: Path) -> None:
    text = "g (float16[n,48] x, float16[48,32] w) => (float16[n,32] y) { [n] y = MatMul(x, w) }"
    model = model_of(text, weights="w")
    batches = [{"x": batch["x"].astype(np.float16)} for batch in data(model)]
    rounded, nearest = (
        qonnx.quantize(model, batches, tmp_path / "q.onnx", recipe="w4", target="ort-cpu", settings=settings)
        for settings in ([], ["weights.rounding=nearest"])
    )
    assert rounded.plan.weights[0].rounding is Rounding.GPTQ
    assert sqnr(rounded) > sqnr(nearest) + 2


def test_layers_are_worked_off_in_parts_where_their_hessians_take_too_much_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        f"g ({X}, {W}, float[32,16] w2) => (float[n,16] y) {{ [a] h = MatMul(x, w) r = Relu(h) [b] y = MatMul(r, w2) }}"
    )
    files = []
    for size in (1 << 30, 1):
        monkeypatch.setattr(weight_rounding, "_BYTES", size)
        file = tmp_path / f"{size}.onnx"
        model = two(text)
        result = qonnx.quantize(model, data(model), file, recipe="w4", target="ort-cpu")
        assert [tensor.rounding for tensor in result.plan.weights] == [Rounding.GPTQ] * 2
        files.append(file.read_bytes())
    assert files[0] == files[1]


def test_inputs_that_are_not_finite_leave_the_weight_at_nearest(tmp_path: Path) -> None:
    model = two(f"g ({X}, {W}) => (float[n,32] y) {{ l = Log(x) [n] h = MatMul(l, w) y = Tanh(h) }}")
    batches = data(model, 3)
    with np.errstate(invalid="ignore"):
        result = qonnx.quantize(model, batches, tmp_path / "q.onnx", recipe="w4", target="ort-cpu")
    assert result.plan.weights[0].rounding is Rounding.NEAREST


def test_one_batch_is_enough_and_is_told(tmp_path: Path) -> None:
    model = model_of(PRODUCTS["Gemm"], weights="w")
    result = qonnx.quantize(model, data(model, 1, 1), tmp_path / "q.onnx", recipe="w4", target="ort-cpu")
    assert result.held_out == 0
    assert any("only one batch was given" in warning for warning in result.warnings)


@pytest.mark.parametrize("recipe", ["int8", "int8-qoperator", "int8-dynamic", "int8-per-token", "w8"])
def test_every_format_follows_it(recipe: str, tmp_path: Path) -> None:
    model = model_of(PRODUCTS["Gemm"], weights="w")
    settings = ["weights.rounding=gptq"]
    batches = data(model)
    plan = qonnx.quantize(model, batches, tmp_path / "q.onnx", recipe=recipe, target="ort-cpu", settings=settings).plan
    assert plan.weights[0].rounding is Rounding.GPTQ
    codes = stored_codes(tmp_path / "q.onnx")
    settings = ["weights.rounding=nearest"]
    qonnx.quantize(model, batches, tmp_path / "n.onnx", recipe=recipe, target="ort-cpu", settings=settings)
    difference = np.abs(codes.astype(int) - stored_codes(tmp_path / "n.onnx"))
    assert 0 < difference.max() < 9
    plan.save(tmp_path / "plan.json")
    again = qonnx.quantize(model, batches, tmp_path / "r.onnx", target="ort-cpu", plan=tmp_path / "plan.json")
    np.testing.assert_array_equal(stored_codes(tmp_path / "r.onnx"), codes)
    assert again.plan == plan


def shifted(model: ir.Model, **sizes: int) -> list[dict[str, Array]]:
    """Batches whose mean is far larger than what they differ by."""
    return [{"x": batch["x"] + np.float32(20)} for batch in data(model, **sizes)]


@pytest.mark.parametrize("recipe", ["int8", "w4"])
def test_biases_fit_the_codes_that_are_written(recipe: str, tmp_path: Path) -> None:
    model = model_of(BIASED, weights="w b")
    batches = shifted(model, count=24)
    settings = ["weights.rounding=gptq", *(["minimum_sqnr_db=-100"] if recipe == "int8" else [])]
    plan = qonnx.quantize(model, batches, tmp_path / "q.onnx", recipe=recipe, target="ort-cpu", settings=settings).plan
    assert [bias.node for bias in plan.biases] == ["n"]
    moved = [session(tmp_path / "q.onnx").run(batch)["y"] - session(model).run(batch)["y"] for batch in batches]
    difference = np.concatenate(moved)
    assert np.abs(difference.mean(axis=0)).max() < 0.3 * difference.std(axis=0).min()


def test_a_plan_fits_other_data_and_none(tmp_path: Path) -> None:
    model = model_of(BIASED, weights="w b")
    batches = shifted(model, count=24)
    first, others, test = batches[:8], batches[8:16], batches[16:]

    def keeps(data: list[dict[str, Array]] | None, **options: Any) -> tuple[float, qonnx.Result]:
        result = qonnx.quantize(model, data, tmp_path / "q.onnx", target="ort-cpu", **options)
        return qonnx.compare(model, tmp_path / "q.onnx", test).outputs[0].sqnr_db, result

    fresh, made = keeps(first, recipe="w4")
    nearest, _ = keeps(None, recipe="w4")
    replayed, again = keeps(others, plan=made.plan)
    blind, bare = keeps(None, plan=made.plan)
    assert again.plan.biases != made.plan.biases
    assert replayed > fresh - 1
    assert blind == pytest.approx(nearest)
    assert not bare.plan.biases
    assert any("the biases of 1 layers stay" in note for note in bare.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "nope"}, "input 1 of node 'n' is 'w', not 'nope'"),
        ({"value": "x", "edges": (Edge("n", 0),)}, "'x'"),
        ({"scale": (1.0, 1.0)}, "has 2 scales; its granularity needs 32"),
        ({"zero_point": (1, 2)}, "has 2 zero points for 32 scales"),
        ({"granularity": Blocked(0, 7)}, "has 32 scales; its granularity needs 224"),
        ({"granularity": Blocked(5, 48)}, "has 2 axes, so none of number 5"),
    ],
)
@pytest.mark.parametrize("seen", [True, False])
def test_a_plan_that_was_edited_wrongly_is_refused(
    seen: bool, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = model_of(PRODUCTS["MatMul"], weights="w")
    batches = data(model)
    plan = qonnx.quantize(model, batches, tmp_path / "q.onnx", recipe="w4", target="ort-cpu").plan
    wrong = msgspec.structs.replace(plan, weights=(msgspec.structs.replace(plan.weights[0], **change),))
    with pytest.raises(RecipeError, match=message):
        qonnx.quantize(model, batches if seen else None, tmp_path / "r.onnx", target="ort-cpu", plan=wrong)
    assert not (tmp_path / "r.onnx").exists()


def test_a_mean_that_no_bias_takes_up_counts_in_the_choice(tmp_path: Path) -> None:
    text = (
        "g (float[1,s,48] x, float[48,32] w, float[32] b) => (float[1,s,32] y) { [n] h = MatMul(x, w) y = Add(h, b) }"
    )
    model = model_of(text, weights="w b")
    batches = shifted(model, count=1)  # one sample: the mean of others is not known
    options: dict[str, Any] = {"recipe": "w4", "target": "ort-cpu"}
    result = qonnx.quantize(model, batches, tmp_path / "a.onnx", **options)
    assert not result.plan.biases
    without = qonnx.quantize(model, batches, tmp_path / "b.onnx", settings=["correct_biases=false"], **options)
    assert sqnr(result) == pytest.approx(sqnr(without))


def stored_codes(path: Path) -> Array:
    """The only initializer of 48 x 32 in 8 bits, as stored."""
    arrays = [value.const_value.numpy() for value in load(path).graph.initializers.values() if value.const_value]
    (codes,) = [array for array in arrays if array.size == 48 * 32 and array.dtype.itemsize == 1]
    return np.asarray(codes)


@pytest.mark.parametrize(("activation", "centred"), [("Identity(h)", True), ("Relu(h)", False)])
def test_behind_an_activation_the_mean_over_all_counts_in_the_choice(
    activation: str, centred: bool, tmp_path: Path
) -> None:
    """Biases take up the mean of what the activation lets through there, which is another one."""
    text = (
        "g (float[n,48] x, float[48,32] w, float[32] b) => (float[n,32] y) "
        f"{{ [n] h = Gemm(x, w, b) y = {activation} }}"
    )
    model = model_of(text, weights="w b")
    batches = [{"x": batch["x"] + 20} for batch in data(model, count=4, rows=64)]
    results = [
        qonnx.quantize(
            model, batches, tmp_path / f"{corrects}.onnx", recipe="w4", target="ort-cpu",
            settings=[f"correct_biases={str(corrects).lower()}"],
        )
        for corrects in (True, False)
    ]  # fmt: skip
    assert [bool(result.plan.biases) for result in results] == [True, False]
    with_biases, without = (stored_codes(tmp_path / f"{corrects}.onnx") for corrects in (True, False))
    assert np.array_equal(with_biases, without) != centred


@pytest.mark.parametrize("granularity", ["per_channel", "{kind: blocked, block_size: 16}"])
def test_filters_of_one_tap_are_matrices(granularity: str, tmp_path: Path) -> None:
    text = "g (float[n,48,3,3] x, float[32,48,1,1] w) => (float[n,32,3,3] y) { [n] y = Conv(x, w) }"
    model = model_of(text, weights="w")
    rounded, nearest = (
        qonnx.quantize(
            model, data(model, rows=32), tmp_path / "q.onnx", recipe="w8", target="ort-cpu",
            settings=["weights.dtype=int4", f"weights.rounding={rounding}",
                      f"weights.granularity={granularity}" if "kind" in granularity else "weights.clip=none"],
        )
        for rounding in (Rounding.GPTQ, Rounding.NEAREST)
    )  # fmt: skip
    assert rounded.plan.weights[0].rounding is Rounding.GPTQ
    assert sqnr(rounded) > sqnr(nearest) + 2


BIASED = f"g ({X}, {W}, float[32] b) => (float[n,32] y) {{ [n] y = Gemm(x, w, b) }}"


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("rows", [4, 64])
def test_codes_disturb_least_what_biases_do_not_take_up(corrected: bool, rows: int) -> None:
    model = model_of(BIASED, weights="w b")
    batches = [{"x": batch["x"] + 20} for batch in data(model, count=1, rows=rows)]
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    w = weight.numpy()
    scale = np.abs(w).max(axis=0) / 7
    tensor = TensorPlan("w", (Edge("n", 1),), Dtype.INT4, PerAxis(1), tuple(map(float, scale)), rounding=Rounding.GPTQ)
    plan = QuantPlan("ort-cpu", "w4", (), (tensor,), (), format=Format.WEIGHT_ONLY)
    rounded = weight_rounding.round_weights(model, plan, batches, {"n"} if corrected else ())
    x = batches[0]["x"].astype(np.float64)
    centred = x - x.mean(axis=0) if corrected else x
    by = factor(centred.T @ centred, min(10, 0.01 + 2 / rows + 0.01 * (48 / rows) ** 2))
    steps = scale.astype(np.float32)[None]
    codes = round_with_feedback(w, by, steps, np.zeros_like(steps, np.int8), 48, Dtype.INT4)
    found = rounded.model.graph.initializers["w"].const_value
    assert found is not None
    assert np.mean(np.isclose(found.numpy(), codes.astype(np.float32) * steps, atol=1e-4)) > 0.99


def test_integer_types_of_every_width_up_to_eight(tmp_path: Path) -> None:
    model = model_of(PRODUCTS["Gemm"], weights="w")
    for dtype in (Dtype.INT2, Dtype.UINT2, Dtype.INT4, Dtype.UINT8, Dtype.FLOAT4E2M1):
        settings = [f"weights.dtype={dtype}", "weights.granularity.block_size=16"]
        result = qonnx.quantize(
            model, data(model), tmp_path / "q.onnx", recipe="w4", target="ort-cpu", settings=settings
        )
        assert result.plan.weights[0].rounding is Rounding.GPTQ
        assert sqnr(result) > {2: 3, 4: 14, 8: 30}[dtype.bits]
