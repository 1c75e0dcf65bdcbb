"""One path for every format: recipe, plan, passes, comparison; and what targets refuse."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qonnx
from qonnx.errors import DataError, TargetError
from qonnx.graph import load
from qonnx.linter import lint
from qonnx.numerics import Blocked, Dtype, PerAxis, PerTensor
from qonnx.plan import QuantPlan
from qonnx.recipe import RECIPES, Format, Rounding
from qonnx.runtime import session
from tests.graphs import model_of
from tests.helpers import operators

NETWORK = (
    "g (int64[n,4] ids, float[n,4,16] v, float[20,32] t, float[32,32] w, float[32] b, float[32,64] w2, float[64,16] w3)"
    " => (float[n,16] y) { [embed] x = Gather(t, ids) [fc1] m = MatMul(x, w) a = Add(m, b) r = Relu(a) "
    "[fc2] h = MatMul(r, w2) axes = Constant <value = int64[1] {1}> () "
    "s = ReduceMean <keepdims = 0> (h, axes) [out] y = Gemm(s, w3) }"
)
TYPED = "g (float[n,32] x, float[32,64] w, float[64,32] w2) => (float[n,32] y) { a = MatMul(x, w) y = MatMul(a, w2) }"


def network() -> ir.Model:
    text = NETWORK.replace("float[n,4,16] v, ", "")
    return model_of(text, weights="t w b w2 w3", scale=0.2)


def data(count: int = 8) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"ids": rng.integers(0, 20, (16, 4))} for _ in range(count)]


EXPECTED = {
    "int8": {"QuantizeLinear", "DequantizeLinear", "MatMul"},
    "int8-qoperator": {"QuantizeLinear", "MatMulInteger"},
    "int8-dynamic": {"DynamicQuantizeLinear", "MatMulInteger"},
    "int8-per-token": {"ReduceMax", "MatMulInteger"},
    "w8": {"DequantizeLinear", "MatMul"},
    "w4": {"DequantizeLinear", "MatMul"},
    "w4-nbits": {"MatMulNBits"},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_format_is_one_recipe_away(name: str, tmp_path: Path) -> None:
    result = qonnx.quantize(network(), data(), tmp_path / "q.onnx", recipe=name, target="ort-cpu")
    onnx.checker.check_model(str(tmp_path / "q.onnx"), full_check=True)
    assert EXPECTED[name] <= set(operators(load(tmp_path / "q.onnx")))
    assert {"fc1", "fc2", "out"} <= {layer.node for layer in result.plan.quantized_layers}
    assert result.comparison.outputs[0].sqnr_db > (10 if name.startswith("w4") else 30)
    assert result.quantized_bytes < result.float_bytes


@pytest.mark.parametrize("name", [recipe.name for recipe in RECIPES if not recipe.format.calibrated])
def test_formats_that_measure_nothing_beforehand_need_no_data(name: str, tmp_path: Path) -> None:
    blind = qonnx.quantize(network(), None, tmp_path / "blind.onnx", recipe=name, target="ort-cpu")
    assert (blind.comparison.batches, blind.comparison.outputs, blind.held_out) == (0, (), 0)
    assert any("no data" in warning for warning in blind.warnings)
    seen = qonnx.quantize(network(), data(), tmp_path / "seen.onnx", recipe=name, target="ort-cpu")
    by_data = any(tensor.rounding is Rounding.GPTQ for tensor in seen.plan.weights)
    assert by_data == name.startswith("w4")
    learned = name != "int8-dynamic"
    assert bool(seen.plan.biases) == learned
    assert not blind.plan.biases
    assert seen.comparison.batches == seen.held_out == (2 if learned else 8)
    assert ((tmp_path / "blind.onnx").read_bytes() == (tmp_path / "seen.onnx").read_bytes()) is not learned


@pytest.mark.parametrize("name", ["int8", "int8-qoperator", "fp8"])
def test_formats_that_are_calibrated_ask_for_data(name: str, tmp_path: Path) -> None:
    target = "h100" if name == "fp8" else "ort-cpu"
    with pytest.raises(DataError, match="needs calibration data; give some, or take one that needs none: int8-dynamic"):
        qonnx.quantize(network(), None, tmp_path / "q.onnx", recipe=name, target=target)
    assert not list(tmp_path.iterdir())


def test_statistics_are_refused_where_nothing_is_calibrated(tmp_path: Path) -> None:
    statistics = qonnx.calibrate(network(), data(), target="ort-cpu")
    with pytest.raises(DataError, match="measures activations when the model runs"):
        qonnx.quantize(
            network(), data(), tmp_path / "q.onnx", recipe="int8-dynamic", target="ort-cpu", statistics=statistics
        )


@pytest.mark.parametrize("name", EXPECTED)
def test_a_plan_that_is_fed_back_gives_the_same_graph(name: str, tmp_path: Path) -> None:
    first = qonnx.quantize(network(), data(), tmp_path / "one.onnx", recipe=name, target="ort-cpu")
    first.plan.save(tmp_path / "plan.json")
    assert QuantPlan.load(tmp_path / "plan.json") == first.plan
    qonnx.quantize(network(), data(), tmp_path / "two.onnx", target="ort-cpu", plan=tmp_path / "plan.json")
    graphs = [load(tmp_path / f"{name}.onnx").graph for name in ("one", "two")]
    assert ir.to_onnx_text(ir.Model(graphs[0], ir_version=10)) == ir.to_onnx_text(ir.Model(graphs[1], ir_version=10))


def test_what_each_plan_holds(tmp_path: Path) -> None:
    def plan(name: str) -> QuantPlan:
        return qonnx.quantize(network(), None, tmp_path / "q.onnx", recipe=name, target="ort-cpu").plan

    dynamic, rows, w8, w4 = (plan(name) for name in ("int8-dynamic", "int8-per-token", "w8", "w4-block32"))
    assert {(t.dtype, t.granularity, t.scale) for t in dynamic.activations} == {(Dtype.UINT8, PerTensor(), ())}
    assert {t.dtype for t in rows.activations} == {Dtype.INT8}
    assert all(isinstance(t.granularity, Blocked) and t.granularity.axis == -1 for t in rows.activations)
    assert not w8.activations
    assert {t.value: t.granularity for t in w8.weights} == {
        "t": PerAxis(0), "w": PerAxis(1), "w2": PerAxis(1), "w3": PerAxis(1),
    }  # fmt: skip
    assert {t.value: t.granularity for t in w4.weights} == {
        "t": PerAxis(0), "w": Blocked(0, 32), "w2": Blocked(0, 32), "w3": Blocked(0, 32),
    }  # fmt: skip


WEIGHT_TYPES = {
    "ort-cpu": list(Dtype),
    "a800": [Dtype.INT4, Dtype.INT8],
    "h100": [Dtype.INT4, Dtype.INT8, Dtype.FLOAT8E4M3FN],
}


@pytest.mark.parametrize("kind", ["per_tensor", "per_channel", "{kind: blocked, block_size: 16}"])
@pytest.mark.parametrize(("target", "dtype"), [(name, dtype) for name in WEIGHT_TYPES for dtype in WEIGHT_TYPES[name]])
def test_weights_alone_in_every_type_and_granularity(target: str, dtype: Dtype, kind: str, tmp_path: Path) -> None:
    granularity = f"weights.granularity={kind}" if "{" in kind else f"weights.granularity.kind={kind}"
    settings = [f"weights.dtype={dtype}", granularity, "weights.clip=mse"]
    rng = np.random.default_rng(0)
    batches = [{"x": rng.standard_normal((8, 32)).astype(np.float32)} for _ in range(2)]
    model = model_of(TYPED, weights="w w2", opset=17, scale=0.2)
    result = qonnx.quantize(model, batches, tmp_path / "q.onnx", recipe="w8", target=target, settings=settings)
    assert len(result.plan.weights) == 2
    least = 20 if dtype is Dtype.FLOAT8E5M2 else {2: 1, 4: 11, 8: 25, 16: 60}[dtype.bits]
    least -= (kind == "per_tensor") * dtype.bits // 4
    assert result.comparison.outputs[0].sqnr_db > least


@pytest.mark.parametrize(
    ("target", "recipe", "settings", "message"),
    [
        ("a800", "fp8", [], "FP8 needs sm_89; a800 is sm_80: use int8 or target h100"),
        ("a800", "w8", ["weights.dtype=float8e4m3fn"], "FP8 needs sm_89; a800 is sm_80: use int8 or target h100"),
        ("a800", "int8-dynamic", [], "which a800 does not import; use format qdq, or target ort-cpu"),
        ("a800", "int8-per-token", [], "which a800 does not import; use format qdq, or target ort-cpu"),
        ("a800", "int8-qoperator", [], "which a800 does not import; use format qdq, or target ort-cpu"),
        ("a800", "w4-nbits", [], "com.microsoft are not imported by a800; use operators onnx, or target ort-cpu"),
        ("a800", "w8", ["weights.dtype=uint4"], "use int4 or int8"),
        ("t4", "w4", [], "quantize activations too"),
        ("a800", "int8", ["weights.granularity.kind=blocked"], "use granularity per_channel, or format weight_only"),
        ("ort-cpu", "int8-dynamic", ["activations.dtype=int8"], "makes uint8 activations, not int8"),
        ("ort-cpu", "int8-per-token", ["activations.dtype=uint8"], "makes int8 activations, not uint8"),
        ("ort-cpu", "fp8", [], "do not run on ort-cpu; use uint8 or int8"),
    ],
)
def test_what_a_target_cannot_run_is_refused_before_anything_is_read(
    target: str, recipe: str, settings: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TargetError) as caught:
        qonnx.quantize(tmp_path / "no.onnx", None, tmp_path / "q.onnx", recipe=recipe, target=target, settings=settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_float8_for_targets_that_have_it(tmp_path: Path) -> None:
    """A Relu before a QuantizeLinear to float8 is one of the things that ONNX Runtime's optimizer gets wrong."""
    result = qonnx.quantize(network(), data(), tmp_path / "q.onnx", recipe="fp8", target="h100")
    assert {tensor.dtype for tensor in result.plan.activations} == {Dtype.FLOAT8E4M3FN}
    assert result.comparison.outputs[0].sqnr_db > 22


def test_int32_biases_for_onnx_runtime_and_float_ones_for_tensorrt(tmp_path: Path) -> None:
    text = (
        "g (float[n,16,8,8] x, float[16,16,3,3] w, float[16] b, float[16,16,3,3] w2, float[16] b2) "
        "=> (float[n,16,4,4] y) { [c] c = Conv(x, w, b) r = Relu(c) [d] y = Conv(r, w2, b2) }"
    )
    rng = np.random.default_rng(0)
    batches = [{"x": rng.standard_normal((2, 16, 8, 8)).astype(np.float32)} for _ in range(6)]
    for target, kinds in (("ort-cpu", {ir.DataType.INT32}), ("a800", {ir.DataType.FLOAT})):
        qonnx.quantize(model_of(text, weights="w b w2 b2", scale=0.2), batches, tmp_path / "q.onnx", target=target)
        node = next(node for node in load(tmp_path / "q.onnx").graph if node.name == "c")
        bias = node.inputs[2]
        assert bias is not None
        producer = bias.producer()
        stored = bias if producer is None else producer.inputs[0]
        assert stored is not None
        assert {stored.dtype} == kinds


def test_attention_products_at_run_time(tmp_path: Path) -> None:
    """Probabilities have a fixed scale; keys are summed over their last axis but one, and so are values."""
    text = (
        "g (float[b,4,32,16] q, float[b,4,16,32] k, float[b,4,32,16] v) => (float[b,4,32,16] y) "
        "{ [scores] a = MatMul(q, k) p = Softmax(a) [mix] y = MatMul(p, v) }"
    )
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 4, 32, 16), "k": (2, 4, 16, 32), "v": (2, 4, 32, 16)}
    batches = [{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}]
    for name, expected in (
        ("int8-dynamic", {"q": PerTensor(), "k": PerTensor(), "p": PerTensor(), "v": PerTensor()}),
        ("int8-per-token", {"q": -1, "k": -2, "p": -1, "v": -2}),
    ):
        result = qonnx.quantize(
            model_of(text), batches, tmp_path / "q.onnx", recipe=name, target="ort-cpu", settings=["attention=true"]
        )
        found = {t.value: getattr(t.granularity, "axis", t.granularity) for t in result.plan.activations}
        assert found == expected
        assert result.comparison.outputs[0].sqnr_db > 30
        assert operators(load(tmp_path / "q.onnx")).count("MatMulInteger") == 2
        fixed = [tensor.scale[0] for tensor in result.plan.activations if tensor.scale]
        assert fixed == pytest.approx([1 / 255] if name == "int8-dynamic" else [])


def test_convolutions_stay_in_float_where_every_token_has_a_scale(tmp_path: Path) -> None:
    model = model_of("g (float[n,16,8,8] x, float[16,16,3,3] w) => (float[n,16,6,6] y) { y = Conv(x, w) }", weights="w")
    plan = qonnx.quantize(model, None, tmp_path / "q.onnx", recipe="int8-per-token", target="ort-cpu").plan
    assert "format dynamic has one" in plan.layers[0].reason
    plan = qonnx.quantize(model, None, tmp_path / "q.onnx", recipe="int8-dynamic", target="ort-cpu").plan
    assert plan.layers[0].quantized
    assert "ConvInteger" in operators(load(tmp_path / "q.onnx"))


LEFT = {
    "a convolution": ("a800", "float[16,16,3,3] w", "float[n,16,8,8] x", "y = Conv(x, w)", "reads float weights"),
    "blocks that do not fit": ("a800", "float[48,16] w", "float[n,48] x", "y = MatMul(x, w)", "leave a short one"),
    "thin": ("ort-cpu", "float[8,16] w", "float[n,8] x", "y = MatMul(x, w)", "sums over 8 elements only"),
    "two activations": ("a800", "float[1] w", "float[16,16] x", "z = Mul(x, w) y = MatMul(x, z)", "has no weight"),
    "experts": (
        "a800",
        "float[16,16,16] w",
        "float[16,16] x",
        "i = ArgMax <axis = 1, keepdims = 1> (x) e = GatherND(w, i) y = MatMul(x, e)",
        "looked up at run time in a stack",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_weights_that_stay_in_float_say_why(name: str, tmp_path: Path) -> None:
    target, weight, x, body, reason = LEFT[name]
    model = model_of(f"g ({x}, {weight}) => (float[] y) {{ {body} }}", weights="w")
    model.graph.outputs[0].shape = None
    plan = qonnx.quantize(model, None, tmp_path / "q.onnx", recipe="w4-block32", target=target).plan
    (layer,) = plan.layers
    assert reason in layer.reason
    assert session(tmp_path / "q.onnx")


@pytest.mark.parametrize("target", ["a800", "onnx", "ort-cpu"])
@pytest.mark.parametrize("recipe", ["w4", "w4-nbits"])
@pytest.mark.parametrize("length", [16, 40, 64, 100, 128])
def test_an_axis_shorter_than_a_block_gets_smaller_ones(length: int, recipe: str, target: str, tmp_path: Path) -> None:
    """One block holds the same numbers as one scale per output channel; TensorRT gets two, which it reads faster."""
    if recipe == "w4-nbits" and target != "ort-cpu":
        pytest.skip("operators of ONNX Runtime")
    text = f"g (float[n,{length}] x, float[{length},32] w) => (float[n,32] y) {{ y = MatMul(x, w) }}"
    batches = [{"x": np.random.default_rng(0).standard_normal((8, length)).astype(np.float32)}]
    changed = ["weights.granularity.block_size=128"]
    result = qonnx.quantize(
        model_of(text, weights="w"), batches, tmp_path / "q.onnx", recipe=recipe, target=target, settings=changed
    )
    (layer,) = result.plan.layers
    if length in (40, 100) and target != "ort-cpu":
        assert "leave a short one" in layer.reason
        return
    held = {16: 16, 40: 64, 64: 64, 100: 128, 128: 128}[length]
    if target == "a800":
        assert [tensor.granularity for tensor in result.plan.weights] == [Blocked(0, max(held // 2, 16))]
        assert not lint(tmp_path / "q.onnx", target=target)
        return
    assert [tensor.granularity for tensor in result.plan.weights] == [Blocked(0, held)]
    whole = ["weights.granularity.kind=per_channel"]
    qonnx.quantize(
        model_of(text, weights="w"), batches, tmp_path / "c.onnx", recipe="w4", target="ort-cpu", settings=whole
    )
    found, expected = (session(tmp_path / name).run(batches[0])["y"] for name in ("q.onnx", "c.onnx"))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_codebooks_beside_matmul_nbits(tmp_path: Path) -> None:
    """One layer in float4e2m1 takes nothing away from the others."""
    settings = ["rules=[{match: {name: fc1}, weights: {dtype: float4e2m1}}]"]
    qonnx.quantize(network(), data(), tmp_path / "q.onnx", recipe="w4-nbits", target="ort-cpu", settings=settings)
    found = [node.op_type for node in load(tmp_path / "q.onnx").graph]
    assert found.count("MatMulNBits") == 2
    assert "Cast" in found
    assert session(tmp_path / "q.onnx").run(data()[0])["y"].shape == (16, 16)


def test_formats_know_whether_they_are_calibrated() -> None:
    assert [kind for kind in Format if kind.calibrated] == [Format.QDQ, Format.QOPERATOR]


FIVE = ("int8-unsmoothed", "int8-qoperator", "int8-dynamic", "int8-per-token", "w8")


@pytest.mark.parametrize(
    ("target", "recipe", "shared"),
    [
        *(("ort-cpu", recipe, "UINT8") for recipe in FIVE),
        *((target, recipe, "INT8") for target in ("a800", "onnx") for recipe in ("int8-unsmoothed", "w8")),
    ],
)
def test_weights_of_several_layers_are_unsigned_for_onnx_runtime(
    target: str, recipe: str, shared: str, tmp_path: Path
) -> None:
    model = model_of(
        "g (float[n,32] x, float[32,32] w, float[32,32] w2, float[32,32] w3) => (float[n,32] y) "
        "{ a = MatMul(x, w) b = MatMul(a, w) c = MatMul(b, w2) "
        "t = Transpose <perm = [1,0]> (w3) d = MatMul(c, t) y = MatMul(d, t) }",
        weights="w w2 w3",
        scale=0.2,
    )
    batches = [{"x": np.random.default_rng(seed).standard_normal((64, 32)).astype(np.float32)} for seed in range(3)]
    file = tmp_path / "q.onnx"
    qonnx.quantize(model, batches, file, recipe=recipe, target=target)
    stored = {
        tensor.name: tensor.data_type for tensor in onnx.load(file).graph.initializer if np.prod(tensor.dims) > 99
    }
    types = {name.removesuffix("_quantized"): onnx.TensorProto.DataType.Name(kind) for name, kind in stored.items()}
    assert types == {"w": shared, "w2": "INT8", "t": shared}
