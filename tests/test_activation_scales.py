"""Activations with a scale for each channel or block, against exact fake quantization."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qonnx
from qonnx.activation_scales import channel_axes, channel_ends
from qonnx.errors import DataError, TargetError
from qonnx.graph import load
from qonnx.numerics import Dtype, PerAxis, fake_quantize
from qonnx.runtime import Optimization, session
from qonnx.statistics import from_batch
from tests.graphs import model_of
from tests.helpers import run

MATMUL = "g (float[n,s,32] x, float[32,64] w) => (float[n,s,64] y) { [fc] y = MatMul(x, w) }"
CONV = (
    "g (float[n,16,8,8] x, float[16,16,3,3] w, float[16] b, float[16,16,1,1] w2) => (float[n,16,6,6] y) "
    "{ [c1] c = Conv(x, w, b) r = Relu(c) [c2] z = Conv(r, w2) y = Sigmoid(z) }"
)
FIXED = [
    "activations.calibrator.kind=minmax",
    "goal_sqnr_db=0",
    "minimum_sqnr_db=-99",
    "correct_biases=false",
    "smooth.kind=none",
]
PER_CHANNEL = "activations.granularity.kind=per_channel"
BLOCKED = "activations.granularity={kind: blocked, block_size: 8}"


def data(*shape: int, spread: int = 4) -> list[dict[str, np.ndarray]]:
    """Channels of very different sizes, along axis 1 of four, else along the last."""
    rng = np.random.default_rng(0)
    factor = np.exp(np.linspace(-spread, spread, shape[0 if len(shape) == 3 else -1])).astype(np.float32)
    factor = factor[:, None, None] if len(shape) == 3 else factor
    return [{"x": (rng.standard_normal((8, *shape)) * factor).astype(np.float32)} for _ in range(6)]


def quantized(text: str, batches: Any, tmp_path: Path, *settings: str, target: str = "onnx") -> qonnx.Result:
    model = model_of(text, weights="w b w2", scale=0.2)
    return qonnx.quantize(model, batches, tmp_path / "q.onnx", target=target, settings=[*FIXED, *settings])


@pytest.mark.parametrize("dtype", [Dtype.UINT8, Dtype.INT8])
@pytest.mark.parametrize("size", [1, 8, 24])
def test_the_graph_computes_exactly_what_the_scales_say(size: int, dtype: Dtype, tmp_path: Path) -> None:
    """An independent reference: ranges by numpy over the channels of a block, codes by the specification."""
    batches = data(5, 32)
    line = PER_CHANNEL if size == 1 else f"activations.granularity={{kind: blocked, block_size: {size}}}"
    result = quantized(MATMUL, batches, tmp_path, line, f"activations.dtype={dtype}")
    (plan,) = result.plan.activations
    assert plan.granularity == PerAxis(2)
    seen = np.concatenate([batch["x"] for index, batch in enumerate(batches) if index % 4 != 1]).reshape(-1, 32)
    for start in range(0, 32, size):
        block = seen[:, start : start + size]
        low, high = min(block.min(), 0), max(block.max(), 0)
        np.testing.assert_allclose(plan.scale[start : start + size], (high - low) / 255, rtol=1e-5)
    zeros = np.array(plan.zero_point, dtype.numpy)
    x = fake_quantize(batches[1]["x"], np.array(plan.scale, np.float32), zeros, dtype, PerAxis(2))
    (weight,) = result.plan.weights
    stored = model_of(MATMUL, weights="w", scale=0.2).graph.initializers["w"].const_value
    assert stored is not None
    w = fake_quantize(stored.numpy(), np.array(weight.scale, np.float32), None, weight.dtype, weight.granularity)
    written = load(tmp_path / "q.onnx")
    for given in (run(written, batches[1])["y"], session(tmp_path / "q.onnx").run(batches[1])["y"]):
        np.testing.assert_allclose(given, x @ w, rtol=1e-4, atol=1e-4 * np.abs(x @ w).max())


@pytest.mark.parametrize("line", [PER_CHANNEL, BLOCKED])
def test_channels_of_convolutions(line: str, tmp_path: Path) -> None:
    batches = data(16, 8, 8)
    result = quantized(CONV, batches, tmp_path, line)
    assert {plan.value: plan.granularity for plan in result.plan.activations} == dict.fromkeys(("x", "r"), PerAxis(1))
    written = load(tmp_path / "q.onnx")
    axes = [node.attributes.get_int("axis") for node in written.graph if node.op_type == "QuantizeLinear"]
    assert axes == [1, 1]
    plain, opened = run(written, batches[1])["y"], session(written)
    assert opened.optimization is Optimization.NONE
    np.testing.assert_allclose(plain, opened.run(batches[1])["y"], atol=1e-6)
    per_tensor = quantized(CONV, batches, tmp_path)
    assert result.comparison.outputs[0].sqnr_db > per_tensor.comparison.outputs[0].sqnr_db


@pytest.mark.parametrize(
    ("target", "settings", "words"),
    [
        (
            "a800",
            [PER_CHANNEL],
            "do not run on integers on a800: its layers then run in float; use granularity per_ten",
        ),
        ("h100", [BLOCKED], "do not run on integers on h100"),
        ("ort-cpu", [PER_CHANNEL], "do not run on integers on ort-cpu: its kernels fail on them"),
        ("ort-cpu", [PER_CHANNEL, "format=qoperator"], "format qoperator has one scale per activation"),
        ("onnx", [PER_CHANNEL, "activations.calibrator.kind=mse"], "set activations.calibrator.kind=minmax"),
    ],
)
def test_what_no_kernel_runs_is_refused(target: str, settings: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=words) as caught:
        quantized(MATMUL, data(5, 32), tmp_path, *settings, target=target)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_statistics_without_channels_are_refused(tmp_path: Path) -> None:
    model = model_of(MATMUL, weights="w", scale=0.2)
    statistics = qonnx.calibrate(model, data(5, 32), target="onnx")
    with pytest.raises(DataError, match="the extremes of the channels of 'x' were not measured"):
        qonnx.quantize(
            model, data(5, 32), tmp_path / "q", target="onnx", settings=[*FIXED, PER_CHANNEL], statistics=statistics
        )


def test_where_channels_are() -> None:
    text = (
        "g (float[n,4,8,8] x, float[n,2,s,16] q, float[n,s,k] u, float[4,4,1,1] w) => (float[n,4,8,8] y) "
        "{ c = Conv(x, w) r = Relu(c) y = Sigmoid(r) }"
    )
    model = model_of(text, weights="w")
    for value in (*model.graph.node(0).outputs, *model.graph.node(1).outputs):
        value.shape = ir.Shape(["n", 4, 8, 8])
    assert channel_axes(model.graph, ["x", "c", "r", "q", "u", "none"]) == {"x": 1, "c": 1, "r": 1, "q": 3}


def test_no_channels_were_measured() -> None:
    with pytest.raises(DataError, match="'x' were not measured"):
        channel_ends("x", from_batch(1, 0, 1, 1.0))
