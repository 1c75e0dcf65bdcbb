"""InsertQDQ with every type of activation and weight that ONNX has and ONNX Runtime runs: exact fake quantization."""

import numpy as np
import onnx_ir as ir
import pytest

from qonnx.errors import DataError, ModelError
from qonnx.numerics import Dtype, Granularity, PerAxis, PerTensor
from qonnx.passes.allow_types import AllowTypes
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.passes.insert_qoperator import InsertQOperator
from qonnx.plan import QuantPlan
from tests.graphs import model_of
from tests.helpers import random_feeds
from tests.plans import (
    activation_plan,
    assert_outputs,
    inserted,
    outputs,
    quant_plan,
    rounded,
    tensor_plan,
    weight_plan,
    with_rounded_weights,
)
from tests.test_insert_weight_only import LAYERS, layer

WITH_KERNEL = [dtype for dtype in Dtype if dtype is not Dtype.FLOAT4E2M1]
OPERATORS = [name for name in LAYERS if name not in ("LSTM", "GRU")]
VERSIONS = {19: 9, 21: 10, 23: 11, 25: 13}


def pairs(model: ir.Model, plan: QuantPlan) -> ir.Model:
    copy = model.clone()
    AllowTypes(plan)(copy)
    return inserted(InsertQDQ(plan), copy)


@pytest.mark.parametrize("weight", [Dtype.INT8, None])
@pytest.mark.parametrize("dtype", WITH_KERNEL)
@pytest.mark.parametrize("name", OPERATORS)
def test_computes_with_the_rounded_operands(name: str, dtype: Dtype, weight: Dtype | None) -> None:
    """Activations of every type, with weights of int8 and of their own type."""
    case, feeds = LAYERS[name], random_feeds(layer(LAYERS[name]))
    data = "n:1" if name == "MatMul, weight first" else "y:0" if name == "Transpose, MatMul" else "n:0"
    model = layer(case)
    for node in model.graph:
        node.name = node.name or "y"
    kind = PerTensor() if name == "MatMul, weight first" else PerAxis(case.output_axis)
    weights = weight_plan(model, "w", case.edge, weight or dtype, kind)
    for symmetric in (True, False) if dtype.is_integer and name == "MatMul" else (True,):
        x = activation_plan("x", feeds["x"], data, dtype, symmetric)
        written = pairs(model, quant_plan(x, weights=(weights,)))
        expected = outputs(with_rounded_weights(model, weights), {"x": rounded(feeds["x"], x)})
        assert_outputs(written, feeds, expected)
        opset = max(dtype.opset, (weight or dtype).opset, 17)
        assert written.opset_imports[""] == opset
        assert written.ir_version == max(10, VERSIONS.get(max(dtype.opset, (weight or dtype).opset), 0))


@pytest.mark.parametrize("dtype", WITH_KERNEL)
@pytest.mark.parametrize("kind", [PerTensor(), PerAxis(0), PerAxis(1)])
def test_activations_with_a_scale_per_channel(dtype: Dtype, kind: Granularity) -> None:
    """ONNX Runtime computes them in float; TensorRT does not take them."""
    model = model_of("g (float[5,16] x) => (float[5,16] y) { [n] y = Abs(x) }")
    feeds = random_feeds(model)
    x = tensor_plan("x", feeds["x"], "n:0", dtype, kind)
    assert_outputs(pairs(model, quant_plan(x)), feeds, [np.abs(rounded(feeds["x"], x))], rtol=0)


def test_onnx_runtime_loads_a_first_operand_with_scales_per_row_and_cannot_run_it() -> None:
    """It makes a MatMulIntegerToFloat of it, which takes one zero point. InsertQOperator writes what it runs."""
    case, model = LAYERS["MatMul, weight first"], layer(LAYERS["MatMul, weight first"])
    feeds = random_feeds(model)
    x = activation_plan("x", feeds["x"], "n:1")
    plan = quant_plan(x, weights=(weight_plan(model, "w", case.edge, Dtype.INT8, PerAxis(0)),))
    with pytest.raises(DataError, match="MatMulIntegerToFloat"):
        outputs(pairs(model, plan), feeds, optimize=True)
    expected = outputs(with_rounded_weights(model, *plan.weights), {"x": rounded(feeds["x"], x)})
    assert_outputs(inserted(InsertQOperator(plan), model), feeds, expected)


def test_onnx_runtime_has_no_kernel_for_float4() -> None:
    model = layer(LAYERS["MatMul"])
    x = activation_plan("x", random_feeds(model)["x"], "n:0", Dtype.FLOAT4E2M1, symmetric=True)
    with pytest.raises(ModelError, match="Could not find an implementation for QuantizeLinear"):
        outputs(pairs(model, quant_plan(x)), random_feeds(model))
