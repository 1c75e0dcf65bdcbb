"""QuantizeBiases: what ONNX Runtime needs to run convolutions on integers, at no more than a rounding of the bias."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qonnx.numerics import Blocked, Dtype, PerAxis, PerTensor
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.passes.quantize_biases import QuantizeBiases
from qonnx.plan import QuantPlan
from qonnx.runtime import DISABLED_OPTIMIZERS, session, with_outputs
from tests.graphs import model_of
from tests.helpers import leave_alone, operators, random_feeds
from tests.plans import activation_plan, inserted, outputs, quant_plan, weight_plan

CONV = (
    "g (float[1,4,7,7] x, float[8,4,3,3] w, float[8] b) => (float[1,8,5,5] y) "
    "{ [n] c = Conv(x, w, b) r = Relu(c) [e] y = Identity(r) }"
)
GEMM = "g (float[5,16] x, float[8,16] w, float[8] b) => (float[5,8] y) { [n] y = Gemm <transB = 1> (x, w, b) }"


def planned(model: ir.Model, data: Dtype = Dtype.UINT8, per_channel: bool = True) -> QuantPlan:
    feeds, symmetric = random_feeds(model), data is Dtype.INT8
    plans = [activation_plan("x", feeds["x"], "n:0", data, symmetric)]
    for node in model.graph:
        if node.name == "e" and (value := node.inputs[0]) is not None and value.name:
            result = session(with_outputs(model, [value.name]), optimize=False).run(feeds)[value.name]
            plans.append(activation_plan(value.name, result, "e:0", data, symmetric))
    kind = PerAxis(0) if per_channel else PerTensor()
    return quant_plan(*plans, weights=(weight_plan(model, "w", "n:1", Dtype.INT8, kind),))


def with_pairs(text: str, data: Dtype = Dtype.UINT8, per_channel: bool = True) -> ir.Model:
    model = model_of(text, weights="w b", scale=0.3)
    return inserted(InsertQDQ(planned(model, data, per_channel)), model)


def optimized(model: ir.Model, folder: Path) -> list[str]:
    """The operators that ONNX Runtime runs in the end."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    data = ir.to_proto(model).SerializeToString()
    ort.InferenceSession(
        data, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(DISABLED_OPTIMIZERS)
    )
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    ("text", "data", "fused"),
    [
        (CONV, Dtype.UINT8, "QLinearConv"),
        (CONV.replace("r = Relu(c)", "").replace("(r)", "(c)"), Dtype.INT8, "QLinearConv"),
        (GEMM, Dtype.UINT8, "QGemm"),
        (GEMM, Dtype.INT8, "QGemm"),
    ],
)
def test_onnx_runtime_runs_the_layer_on_integers(
    text: str, data: Dtype, fused: str, per_channel: bool, tmp_path: Path
) -> None:
    before = with_pairs(text, data, per_channel)
    after = inserted(QuantizeBiases(), before)
    assert fused not in optimized(before, tmp_path)
    assert fused in optimized(after, tmp_path)
    assert [value.dtype for value in after.graph.initializers.values()].count(ir.DataType.INT32) == 1
    feeds = random_feeds(before)
    (expected,) = outputs(before, feeds)
    for optimize in (False, True):
        (found,) = outputs(after, feeds, optimize)
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.01 * np.abs(expected).max())


def test_a_second_run_changes_nothing() -> None:
    after = inserted(QuantizeBiases(), with_pairs(CONV))
    leave_alone(QuantizeBiases(), after)


def test_the_float_bias_stays_for_its_other_readers() -> None:
    text = CONV.replace("y)", "y, float[8] z)").replace("}", " z = Abs(b) }")
    after = inserted(QuantizeBiases(), with_pairs(text))
    assert "b" in after.graph.initializers


KEPT = {
    "no bias": CONV.replace(", float[8] b", "").replace(", b)", ")"),
    "a result that stays float": CONV.replace(" r = Relu(c) [e] y = Identity(r)", " y = Sigmoid(c)"),
    "a bias that is computed": CONV.replace("[n]", "k = Abs(b) [n]").replace("(x, w, b)", "(x, w, k)"),
    "a bias that can be fed": CONV.replace("float[8] b", "float[8] k").replace("(x, w, b)", "(x, w, k)"),
    "factors": GEMM.replace("transB = 1", "transB = 1, beta = 2.0"),
    "a bias of another shape": GEMM.replace("float[8] b", "float[1,8] b"),
}


@pytest.mark.parametrize("name", KEPT)
def test_leaves_alone(name: str) -> None:
    model = model_of(KEPT[name], weights="w b", scale=0.3)
    InsertQDQ(planned(model))(model)
    leave_alone(QuantizeBiases(), model)


def test_leaves_float_layers_alone() -> None:
    leave_alone(QuantizeBiases(), model_of(CONV, weights="w b"))


def test_leaves_blocked_weights_alone() -> None:
    model = model_of(GEMM, weights="w b")
    weight = weight_plan(model, "w", "n:1", Dtype.INT8, Blocked(1, 8))
    InsertQDQ(quant_plan(activation_plan("x", random_feeds(model)["x"], "n:0"), weights=(weight,)))(model)
    leave_alone(QuantizeBiases(), model)


def with_steps(share: float, channels: int = 1) -> ir.Model:
    """A graph in which some biases would be rounded to this share of a step of the result, others to a tenth of it."""
    model = model_of(CONV, weights="w b", scale=0.3)
    weight = model.graph.initializers["w"]
    assert weight.const_value is not None
    w = weight.const_value.numpy() / np.abs(weight.const_value.numpy()).max((1, 2, 3), keepdims=True)
    w[channels:] /= 10
    weight.const_value = ir.tensor(w, name="w")
    plan = planned(model)
    coarsest = plan.activations[0].scale[0] * max(plan.weights[0].scale)
    result = activation_plan("r", np.array([0, 255 * coarsest / share], np.float32), "e:0")
    return inserted(InsertQDQ(quant_plan(plan.activations[0], result, weights=plan.weights)), model)


@pytest.mark.parametrize("share", [0.65, 2])
def test_leaves_steps_alone_that_are_coarse_beside_those_of_the_result(share: float) -> None:
    """A bias that is far larger than the result, as where it cancels a constant input."""
    leave_alone(QuantizeBiases(), with_steps(share))


def test_leaves_steps_alone_that_are_coarse_on_average() -> None:
    leave_alone(QuantizeBiases(), with_steps(0.3, channels=8))


@pytest.mark.parametrize("share", [0.01, 0.2, 0.55])
def test_codes_of_the_result_move_by_one_at_most(share: float) -> None:
    before = with_steps(share)
    after = inserted(QuantizeBiases(), before)
    assert operators(after).count("DequantizeLinear") == operators(before).count("DequantizeLinear") + 1
    feeds = random_feeds(before)
    codes = [
        session(with_outputs(model, ["r_quantized"]), optimize=False).run(feeds)["r_quantized"].astype(int)
        for model in (before, after)
    ]
    assert np.ptp(codes[0]) > 20
    assert np.abs(codes[0] - codes[1]).max() <= 1
    assert np.mean(codes[0] != codes[1]) < 0.1
