"""ChainScales: scales in two levels, and not a value changed."""

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

from qonnx.block_scales import integer_scales, power_of_two_scale
from qonnx.numerics import Blocked, Dtype, PerAxis, absmax, scale_shape
from qonnx.passes.chain_scales import ChainScales
from qonnx.passes.insert_weight_only import InsertWeightOnly
from qonnx.plan import TensorPlan
from tests.graphs import model_of
from tests.helpers import apply, leave_alone, random_feeds
from tests.plans import assert_outputs, inserted, outputs, quant_plan, stored, weight_plan, with_rounded_weights

GRAPHS = {
    "MatMul": ("g (float[5,32] x, float[32,24] w) => (float[5,24] y) { [n] y = MatMul(x, w) }", Blocked(0, 16), 1),
    "Gemm": (
        "g (float[5,32] x, float[24,32] w) => (float[5,24] y) { [n] y = Gemm <transB = 1> (x, w) }",
        Blocked(1, 16),
        0,
    ),
    "Conv": (
        "g (float[1,32,5,5] x, float[6,32,3,3] w) => (float[1,6,3,3] y) { [n] y = Conv(x, w) }",
        Blocked(1, 16),
        0,
    ),
}


def two_levels(model: ir.Model, kind: Blocked, channels: int, bits: int = 8) -> TensorPlan:
    plan = weight_plan(model, "w", "n:1", Dtype.INT4, kind)
    scale = np.array(plan.scale, np.float32).reshape(scale_shape(stored(model, "w").shape, kind))
    codes, step = integer_scales(scale, channels, bits)
    product = codes * step.reshape(-1, *[1] * (scale.ndim - channels - 1))
    return msgspec.structs.replace(plan, scale=tuple(float(value) for value in product.ravel()))


@pytest.mark.parametrize("name", GRAPHS)
def test_scales_are_integers_under_one_float_a_channel(name: str) -> None:
    text, kind, channels = GRAPHS[name]
    model = model_of(text, weights="w")
    plan = two_levels(model, kind, channels)
    written = inserted(InsertWeightOnly(quant_plan(weights=(plan,))), model)
    assert apply(ChainScales(), written, rtol=0).count("DequantizeLinear") == 2
    feeds = random_feeds(model)
    assert_outputs(written, feeds, outputs(with_rounded_weights(model, plan), feeds))
    held = {value.dtype: value for value in written.graph.initializers.values()}
    assert held[ir.DataType.UINT8].shape == scale_shape(stored(model, "w").shape, kind)
    assert held[ir.DataType.FLOAT].shape == (stored(model, "w").shape[channels],)


def test_fewer_bits() -> None:
    text, kind, channels = GRAPHS["MatMul"]
    model = model_of(text, weights="w")
    plan = two_levels(model, kind, channels, bits=4)
    written = inserted(InsertWeightOnly(quant_plan(weights=(plan,))), model)
    leave_alone(ChainScales(), written.clone())
    apply(ChainScales(4), written, rtol=0)


def test_blocks_with_powers_of_two_are_left_alone_and_run() -> None:
    """MXINT8: int8 in blocks of 32."""
    text, _, _ = GRAPHS["MatMul"]
    model = model_of(text, weights="w")
    scale = power_of_two_scale(absmax(stored(model, "w"), Blocked(0, 32)), Dtype.INT8)
    plan = weight_plan(model, "w", "n:1", Dtype.INT8, Blocked(0, 32))
    plan = msgspec.structs.replace(plan, scale=tuple(float(value) for value in scale.ravel()))
    written, feeds = inserted(InsertWeightOnly(quant_plan(weights=(plan,))), model), random_feeds(model)
    assert_outputs(written, feeds, outputs(with_rounded_weights(model, plan), feeds))


@pytest.mark.parametrize("kind", [PerAxis(1), Blocked(0, 16)])
def test_other_scales_are_left_alone(kind: PerAxis | Blocked) -> None:
    model = model_of(GRAPHS["MatMul"][0], weights="w")
    plan = weight_plan(model, "w", "n:1", Dtype.INT4, kind)
    leave_alone(ChainScales(), inserted(InsertWeightOnly(quant_plan(weights=(plan,))), model))
