"""Quantized graphs declare no newer opset than they need, so that ONNX Runtime opens them with its default options."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import qonnx
from qonnx.graph import load
from qonnx.passes.lower_opset import LowerOpset
from tests.graphs import model_of
from tests.helpers import apply, leave_alone
from tests.test_placement import FUSED

LOWERED = {
    "moves": "g (float[2,4] x) => (float[4,2] y) { s = Shape(x) r = Reshape(x, s) y = Transpose(r) }",
    "types that only got more": "g (float[2,4] x) => (int64[2,4] y) { a = Relu(x) y = Cast <to = 7> (a) }",
    "pairs": (
        "g (float[2,4] x, float s, int8 z) => (float[2,4] y) "
        "{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
    ),
    "a body": (
        "g (bool c, float[2] x) => (float[2] y) { y = If <then_branch = t () => (float[2] a) { a = Identity(x) }, "
        "else_branch = e () => (float[2] b) { b = Neg(x) }> (c) }"
    ),
}
KEPT = {
    "older already": ("g (float[2] x) => (float[2] y) { y = Relu(x) }", 20),
    "an operator that did not exist": ("g (float[2] x) => (float[2] y) { y = Swish(x) }", 24),
    "another meaning": (
        "g (float[1,4,2] x, float[4] s, float[4] b) => (float[1,4,2] y) "
        "{ y = GroupNormalization <num_groups = 2> (x, s, b) }",
        21,
    ),
    "a newer type": ("g (float[2] x, float s, int4 z) => (int4[2] y) { y = QuantizeLinear(x, s, z) }", 21),
    "16 bits": ("g (float[2] x, float s, int16 z) => (int16[2] y) { y = QuantizeLinear(x, s, z) }", 21),
    "a newer attribute": (
        "g (float[4] x, float[2] s, int8[2] z) => (int8[4] y) "
        "{ y = QuantizeLinear <axis = 0, block_size = 2> (x, s, z) }",
        21,
    ),
    "in a body": (
        "g (bool c, float[2] x) => (float[2] y) { y = If <then_branch = t () => (float[2] a) { a = Swish(x) }, "
        "else_branch = e () => (float[2] b) { b = Neg(x) }> (c) }",
        24,
    ),
}


@pytest.mark.parametrize("opset", [21, 23, 25])
@pytest.mark.parametrize("name", LOWERED)
def test_declares_opset_20_where_nothing_needs_more(name: str, opset: int) -> None:
    model = model_of(LOWERED[name], opset=opset)
    apply(LowerOpset(), model)
    assert model.opset_imports[""] == 20


@pytest.mark.parametrize("name", KEPT)
def test_leaves_alone(name: str) -> None:
    text, opset = KEPT[name]
    leave_alone(LowerOpset(), model_of(text, opset=opset))


STATIC = (
    "g (float[4,3,32] x, float[32,64] w, float[64] b, float[64,32] w2) => (float[4,3,32] y) "
    "{ m = MatMul(x, w) a = Add(m, b) r = Relu(a) y = MatMul(r, w2) }"
)
DYNAMIC = FUSED.replace("float[1,32,64]", "float[n,32,64]").replace("{1, 32, ", "{0, 32, ")


@pytest.mark.parametrize("text", [STATIC, FUSED, DYNAMIC], ids=["static sizes", "fused QKV", "fused QKV, dynamic"])
@pytest.mark.parametrize("opset", [21, 23])
def test_onnxruntime_opens_int8_with_default_options(text: str, opset: int, tmp_path: Path) -> None:
    """At opset 21 it moves a pair past a Reshape, writes its output_dtype, and then makes uint8 of the int8."""
    model = model_of(text, weights="w w1 w2 b", opset=opset, scale=0.2)
    shape = (4, 3, 32) if text == STATIC else (1, 32, 64)
    rng = np.random.default_rng(0)
    batches = [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(6)]
    settings = ["activations.calibrator.kind=minmax"]
    result = qonnx.quantize(model, batches, tmp_path / "q.onnx", target="a800", settings=settings)
    assert result.plan.quantized_layers
    assert load(tmp_path / "q.onnx").opset_imports[""] == 20
    onnx.checker.check_model(str(tmp_path / "q.onnx"), full_check=True)
    assert ort.InferenceSession(str(tmp_path / "q.onnx")).run(None, batches[0])[0].shape == shape


def test_weights_of_4_bits_keep_the_opset_they_need(tmp_path: Path) -> None:
    model = model_of(STATIC, weights="w w2 b", opset=17)
    qonnx.quantize(model, None, tmp_path / "q.onnx", recipe="w4-block32")
    assert load(tmp_path / "q.onnx").opset_imports[""] == 21
    assert isinstance(ort.InferenceSession(str(tmp_path / "q.onnx")), ort.InferenceSession)
    assert ir.DataType.INT4 in {value.dtype for value in load(tmp_path / "q.onnx").graph.initializers.values()}
