"""InsertCodebook: float4e2m1 weights through operators that every runtime has."""

import numpy as np
import onnx_ir as ir
import pytest

from qonnx.errors import TargetError
from qonnx.numerics import Blocked, Dtype, Granularity, PerAxis, PerTensor
from qonnx.passes.insert_codebook import FLOAT4E2M1, InsertCodebook
from tests.graphs import model_of
from tests.helpers import operators, random_feeds
from tests.plans import (
    activation_plan,
    assert_outputs,
    inserted,
    outputs,
    quant_plan,
    rounded,
    weight_plan,
    with_rounded_weights,
)
from tests.test_insert_weight_only import LAYERS, TABLES, layer


@pytest.mark.parametrize("kind", ["tensor", "channel", "input", "block", "block along the output"])
@pytest.mark.parametrize("name", LAYERS)
def test_computes_with_the_rounded_weight(name: str, kind: str) -> None:
    case = LAYERS[name]
    granularity: Granularity
    match kind:
        case "tensor":
            granularity = PerTensor()
        case "channel":
            granularity = PerAxis(case.output_axis)
        case "input":
            granularity = PerAxis(case.input_axis)
        case "block":
            granularity = Blocked(case.input_axis, 8)
        case _:
            granularity = Blocked(case.output_axis, 4)
    model, feeds = layer(case), random_feeds(layer(case))
    weight = weight_plan(model, "w", case.edge, Dtype.FLOAT4E2M1, granularity)
    written = inserted(InsertCodebook(quant_plan(weights=(weight,))), model)
    assert_outputs(written, feeds, outputs(with_rounded_weights(model, weight), feeds))
    assert "DequantizeLinear" not in operators(written)
    assert (written.opset_imports[""], written.ir_version) == (21, 10)
    kinds = [value.dtype for value in written.graph.initializers.values()]
    assert kinds.count(ir.DataType.UINT4) == 1
    assert ir.DataType.FLOAT4E2M1 not in kinds


def test_the_values_are_those_of_the_type() -> None:
    codes = np.arange(16, dtype=np.uint8).view(Dtype.FLOAT4E2M1.numpy)
    np.testing.assert_array_equal(np.array(FLOAT4E2M1, np.float32), codes.astype(np.float32))
    assert sorted({abs(value) for value in FLOAT4E2M1}) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_tables() -> None:
    model = model_of(TABLES["plain"], weights="w")
    weight = weight_plan(model, "w", "n:0", Dtype.FLOAT4E2M1, Blocked(1, 8))
    feeds = random_feeds(model)
    written = inserted(InsertCodebook(quant_plan(weights=(weight,))), model)
    assert_outputs(written, feeds, outputs(with_rounded_weights(model, weight), feeds), rtol=0)


def test_other_tensors_are_as_in_a_qdq_graph() -> None:
    model = model_of(
        "g (float[5,16] x, float[16,8] w, float[8,4] v) => (float[5,4] y) "
        "{ [a] h = MatMul(x, w) [b] y = MatMul(h, v) }",
        weights="w v",
    )
    feeds = random_feeds(model)
    weights = (
        weight_plan(model, "w", "a:1", Dtype.FLOAT4E2M1, PerAxis(1)),
        weight_plan(model, "v", "b:1", Dtype.INT8, PerAxis(1)),
    )
    x = activation_plan("x", feeds["x"], "a:0", Dtype.INT8, symmetric=True)
    written = inserted(InsertCodebook(quant_plan(x, weights=weights)), model)
    assert operators(written).count("DequantizeLinear") == 2
    assert_outputs(written, feeds, outputs(with_rounded_weights(model, *weights), {"x": rounded(feeds["x"], x)}))


def test_a_float16_graph_stays_float16() -> None:
    model = model_of("g (float16[5,32] x, float16[32,24] w) => (float16[5,24] y) { [n] y = MatMul(x, w) }", weights="w")
    weight = weight_plan(model, "w", "n:1", Dtype.FLOAT4E2M1, Blocked(0, 16))
    written, feeds = inserted(InsertCodebook(quant_plan(weights=(weight,))), model), random_feeds(model)
    assert_outputs(written, feeds, outputs(with_rounded_weights(model, weight), feeds), rtol=3e-3)


def test_nothing_is_computed_before_the_file_is_written() -> None:
    case = LAYERS["MatMul"]
    weight = weight_plan(layer(case), "w", case.edge, Dtype.FLOAT4E2M1, PerAxis(1))
    written = inserted(InsertCodebook(quant_plan(weights=(weight,))), layer(case))
    indices = [value.const_value for value in written.graph.initializers.values() if value.dtype == ir.DataType.UINT4]
    assert [type(tensor) for tensor in indices] == [ir.LazyTensor]


def test_refuses_short_blocks() -> None:
    case = LAYERS["MatMul"]
    weight = weight_plan(layer(case), "w", case.edge, Dtype.FLOAT4E2M1, Blocked(0, 16))
    with pytest.raises(TargetError, match="blocks of 16 leave a short one in an axis of 40; use a block_size that"):
        InsertCodebook(quant_plan(weights=(weight,)))(layer(case))


def test_refuses_float4_activations() -> None:
    case = LAYERS["MatMul"]
    x = activation_plan("x", random_feeds(layer(case))["x"], "n:0", Dtype.FLOAT4E2M1, symmetric=True)
    with pytest.raises(TargetError, match="activation 'x': only weights can be looked up in a codebook; use int4"):
        InsertCodebook(quant_plan(x))(layer(case))


def test_tensorrt_does_not_take_uint4() -> None:
    case = LAYERS["MatMul"]
    weight = weight_plan(layer(case), "w", case.edge, Dtype.FLOAT4E2M1, PerAxis(1))
    with pytest.raises(TargetError, match="uint4 weights cannot be imported on target a800"):
        InsertCodebook(quant_plan(weights=(weight,), target="a800"))(layer(case))
