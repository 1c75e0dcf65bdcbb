"""InsertWeightOnly: every type, granularity and operator against float arithmetic with the rounded weights."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import pytest

from qonnx.engine import build_engine
from qonnx.errors import RecipeError, TargetError
from qonnx.numerics import Blocked, Dtype, Granularity, PerAxis, PerTensor
from qonnx.passes.insert_weight_only import InsertWeightOnly
from qonnx.passes.matmul_nbits import WriteMatMulNBits
from qonnx.plan import QuantPlan
from qonnx.recipe import Operators
from tests.graphs import model_of
from tests.helpers import operators, random_feeds
from tests.plans import (
    FLOAT8,
    INTEGERS,
    activation_plan,
    assert_outputs,
    inserted,
    outputs,
    quant_plan,
    weight_plan,
    with_rounded_weights,
)


class Case(NamedTuple):
    """A graph whose weight `w` is read by input `edge`, and its axes."""

    text: str
    edge: str
    output_axis: int
    input_axis: int


LAYERS = {
    "MatMul": Case("g (float[5,40] x, float[40,24] w) => (float[5,24] y) { [n] y = MatMul(x, w) }", "n:1", 1, 0),
    "MatMul, weight first": Case(
        "g (float[40,5] x, float[24,40] w) => (float[24,5] y) { [n] y = MatMul(w, x) }", "n:0", 0, 1
    ),
    "MatMul, three axes": Case(
        "g (float[b,5,40] x, float[40,24] w) => (float[b,5,24] y) { [n] y = MatMul(x, w) }", "n:1", 1, 0
    ),
    "Transpose, MatMul": Case(
        "g (float[5,40] x, float[24,40] w) => (float[5,24] y) { [t] v = Transpose(w) y = MatMul(x, v) }", "t:0", 0, 1
    ),
    "Gemm": Case(
        "g (float[5,40] x, float[40,24] w, float[24] c) => (float[5,24] y) { [n] y = Gemm(x, w, c) }", "n:1", 1, 0
    ),
    "Gemm, both transposed": Case(
        "g (float[40,5] x, float[24,40] w, float[24] c) => (float[5,24] y) "
        "{ [n] y = Gemm <transA = 1, transB = 1, alpha = 0.5, beta = 2.0> (x, w, c) }",
        "n:1",
        0,
        1,
    ),
    "Conv 1-D": Case("g (float[2,40,9] x, float[8,40,3] w) => (float[2,8,7] y) { [n] y = Conv(x, w) }", "n:1", 0, 1),
    "Conv 2-D, groups": Case(
        "g (float[1,80,6,6] x, float[8,40,3,3] w) => (float[1,8,4,4] y) { [n] y = Conv <group = 2> (x, w) }",
        "n:1",
        0,
        1,
    ),
    "Conv 3-D": Case(
        "g (float[1,40,3,3,3] x, float[8,40,2,2,2] w) => (float[1,8,2,2,2] y) { [n] y = Conv(x, w) }", "n:1", 0, 1
    ),
    "ConvTranspose": Case(
        "g (float[1,40,3,3] x, float[40,8,2,2] w) => (float[1,8,4,4] y) { [n] y = ConvTranspose(x, w) }", "n:1", 1, 0
    ),
    "LSTM": Case(
        "g (float[3,2,40] x, float[1,32,40] w, float[1,32,8] r) => (float[3,1,2,8] y) "
        "{ [n] y = LSTM <hidden_size = 8> (x, w, r) }",
        "n:1",
        1,
        2,
    ),
    "GRU": Case(
        "g (float[3,2,40] x, float[1,24,40] w, float[1,24,8] r) => (float[3,1,2,8] y) "
        "{ [n] y = GRU <hidden_size = 8> (x, w, r) }",
        "n:1",
        1,
        2,
    ),
}

GRANULARITIES = ("tensor", "channel", "block", "short last block")


def granularity(name: str, case: Case) -> Granularity:
    match name:
        case "tensor":
            return PerTensor()
        case "channel":
            return PerAxis(case.output_axis)
        case "block":
            return Blocked(case.input_axis, 8)
    return Blocked(case.input_axis, 16)


def layer(case: Case) -> ir.Model:
    return model_of(case.text, weights="w c r", opset=17)


def weight_only(
    case: Case, dtype: Dtype, kind: Granularity, symmetric: bool = True, target: str = "ort-cpu"
) -> QuantPlan:
    return quant_plan(weights=(weight_plan(layer(case), "w", case.edge, dtype, kind, symmetric),), target=target)


@pytest.mark.parametrize("kind", GRANULARITIES)
@pytest.mark.parametrize("dtype", INTEGERS + FLOAT8)
@pytest.mark.parametrize("name", LAYERS)
def test_computes_with_the_rounded_weight(name: str, dtype: Dtype, kind: str) -> None:
    case = LAYERS[name]
    model, feeds = layer(case), random_feeds(layer(case))
    for symmetric in (True, False) if dtype.is_integer and name == "MatMul" else (False,):
        plan = weight_only(case, dtype, granularity(kind, case), symmetric)
        expected = outputs(with_rounded_weights(model, *plan.weights), feeds)
        assert_outputs(inserted(InsertWeightOnly(plan), model), feeds, expected)


@pytest.mark.parametrize("dtype", [dtype for dtype in INTEGERS if dtype.bits <= 8])
@pytest.mark.parametrize("kind", [PerTensor(), PerAxis(1), Blocked(0, 16), Blocked(0, 32), Blocked(0, 64)])
@pytest.mark.parametrize("name", ["MatMul", "MatMul, three axes", "Transpose, MatMul", "Gemm", "Gemm, transposed"])
def test_matmul_nbits_computes_what_the_fused_standard_form_does(name: str, kind: Granularity, dtype: Dtype) -> None:
    """To the last bit, where ONNX Runtime makes a MatMulNBits of that: not of transposed or per-tensor weights."""
    case = LAYERS.get(name) or LAYERS["Gemm"]._replace(
        text="g (float[5,40] x, float[24,40] w, float[24] c) => (float[5,24] y) { [n] y = Gemm <transB = 1> (x, w, c) }"
    )
    turned = name in ("Transpose, MatMul", "Gemm, transposed")
    if turned and not isinstance(kind, PerTensor):
        kind = PerAxis(0) if isinstance(kind, PerAxis) else Blocked(1, kind.block_size)
    model, feeds = layer(case), random_feeds(layer(case))
    for symmetric in (True, False) if dtype is Dtype.INT4 else (dtype.signed,):
        plan = weight_only(case, dtype, kind, symmetric)
        packed = inserted(InsertWeightOnly(plan, Operators.MICROSOFT), model)
        assert [op for op in operators(packed) if op != "Transpose"] == ["MatMulNBits"]
        assert_outputs(packed, feeds, outputs(with_rounded_weights(model, *plan.weights), feeds))
        if not turned and isinstance(kind, Blocked):
            (fused,) = outputs(inserted(InsertWeightOnly(plan), model), feeds, optimize=True)
            (found,) = outputs(packed, feeds, optimize=True)
            np.testing.assert_array_equal(found, fused)


def test_the_file_says_how_exactly_matmul_nbits_computes() -> None:
    case = LAYERS["MatMul"]
    plan = weight_only(case, Dtype.INT4, Blocked(0, 32))
    model, feeds = layer(case), random_feeds(layer(case))
    (expected,) = outputs(with_rounded_weights(model, *plan.weights), feeds)
    error = {}
    for level in (1, 4):
        (found,) = outputs(inserted(InsertWeightOnly(plan, Operators.MICROSOFT, level), model), feeds)
        error[level] = np.abs(found - expected).max() / np.abs(expected).max()
    assert error[1] < 1e-6
    assert 1e-4 < error[4] < 0.02


NOT_PACKED: dict[str, Granularity] = {
    "MatMul, weight first": PerAxis(0),
    "Gemm, both transposed": Blocked(1, 16),
    "MatMul": Blocked(1, 16),
    "ConvTranspose": PerAxis(1),
    "Gemm, one bias for all": Blocked(0, 16),
}


@pytest.mark.parametrize("name", NOT_PACKED)
def test_matmul_nbits_leaves_other_products_in_the_standard_form(name: str) -> None:
    case = LAYERS.get(name) or LAYERS["Gemm"]._replace(text=LAYERS["Gemm"].text.replace("float[24] c", "float[1] c"))
    plan = weight_only(case, Dtype.INT4, NOT_PACKED[name])
    written = inserted(InsertWeightOnly(plan, Operators.MICROSOFT), layer(case))
    assert "MatMulNBits" not in operators(written)
    assert "DequantizeLinear" in operators(written)


TABLES = {
    "plain": "g (int64[2,3] ids, float[20,16] w) => (float[2,3,16] y) { [n] y = Gather(w, ids) }",
    "one id": "g (int64[1] ids, float[20,16] w) => (float[1,16] y) { [n] y = Gather(w, ids) }",
    "int32 ids": "g (int32[m] ids, float[20,16] w) => (float[m,16] y) { [n] y = Gather(w, ids) }",
}


def table(name: str, text: str = "") -> ir.Model:
    return model_of(text or TABLES[name], weights="w")


@pytest.mark.parametrize("kind", [PerTensor(), PerAxis(0), PerAxis(1), Blocked(1, 8), Blocked(1, 5)])
@pytest.mark.parametrize("dtype", [dtype for dtype in INTEGERS if dtype.bits <= 16])
@pytest.mark.parametrize("name", TABLES)
def test_tables_are_looked_up_before_they_are_dequantized(name: str, dtype: Dtype, kind: Granularity) -> None:
    model = table(name)
    feeds = {"ids": random_feeds(model)["ids"] * 20 - 1}  # the last row, counted from both ends
    for symmetric in (True, False) if dtype is Dtype.INT4 else (False,):
        plan = quant_plan(weights=(weight_plan(model, "w", "n:0", dtype, kind, symmetric),))
        written = inserted(InsertWeightOnly(plan), model)
        assert operators(written)[-1] == "DequantizeLinear"
        expected = outputs(with_rounded_weights(model, *plan.weights), feeds)
        assert_outputs(written, feeds, expected, rtol=0)
        codes = [value.const_value for value in written.graph.initializers.values()]
        largest = max(tensor.nbytes for tensor in codes if tensor is not None)
        assert largest == max(20 * 16 * dtype.bits // 8, 256 * 8 // dtype.bits if dtype.bits < 8 else 0)


KEPT_TABLES: dict[str, tuple[str, Dtype, Granularity]] = {
    "columns are looked up": (
        "g (int64[3] ids, float[20,16] w) => (float[20,3] y) { [n] y = Gather <axis = 1> (w, ids) }",
        Dtype.INT8,
        PerAxis(0),
    ),
    "three axes": (
        "g (int64[3] ids, float[20,4,4] w) => (float[3,4,4] y) { [n] y = Gather(w, ids) }",
        Dtype.INT8,
        PerTensor(),
    ),
    "one row, not a list of rows": (
        "g (int64 ids, float[20,16] w) => (float[16] y) { [n] y = Gather(w, ids) }",
        Dtype.INT8,
        PerAxis(0),
    ),
    "rows share blocks": (TABLES["plain"], Dtype.INT8, Blocked(0, 5)),
    "float codes": (TABLES["plain"], Dtype.FLOAT8E4M3FN, PerTensor()),
    "rows that do not fill bytes": (
        "g (int64[3] ids, float[20,15] w) => (float[3,15] y) { [n] y = Gather(w, ids) }",
        Dtype.INT4,
        PerAxis(0),
    ),
}


@pytest.mark.parametrize("name", KEPT_TABLES)
def test_other_tables_are_dequantized_first(name: str) -> None:
    text, dtype, kind = KEPT_TABLES[name]
    model = table("", text)
    plan = quant_plan(weights=(weight_plan(model, "w", "n:0", dtype, kind),))
    written = inserted(InsertWeightOnly(plan), model)
    assert operators(written) == ["DequantizeLinear", "Gather"]
    feeds = random_feeds(model)
    assert_outputs(written, feeds, outputs(with_rounded_weights(model, *plan.weights), feeds), rtol=0)


def test_tensorrt_gets_dequantized_tables() -> None:
    model = table("plain")
    plan = quant_plan(weights=(weight_plan(model, "w", "n:0", Dtype.INT8, PerAxis(1)),), target="a800")
    assert operators(inserted(InsertWeightOnly(plan), model)) == ["DequantizeLinear", "Gather"]


def test_a_table_that_is_also_a_weight_is_stored_once() -> None:
    model = model_of(
        "g (int64[4] ids, float[32,16] w) => (float[4,32] y) "
        "{ [n] x = Gather(w, ids) [t] v = Transpose(w) y = MatMul(x, v) }",
        weights="w",
    )
    plan = quant_plan(weights=(weight_plan(model, "w", "n:0 t:0", Dtype.INT8, PerAxis(0)),))
    written, feeds = inserted(InsertWeightOnly(plan), model), random_feeds(model)
    stored = [value.const_value for value in written.graph.initializers.values()]
    assert sum(tensor is not None and tensor.size == 32 * 16 for tensor in stored) == 1
    assert_outputs(written, feeds, outputs(with_rounded_weights(model, *plan.weights), feeds))


@pytest.mark.parametrize(
    ("dtype", "kind", "opset", "version"),
    [
        (Dtype.INT8, PerTensor(), 17, 8),
        (Dtype.INT8, PerAxis(1), 17, 8),
        (Dtype.INT8, Blocked(0, 8), 21, 8),
        (Dtype.FLOAT8E4M3FN, PerAxis(1), 19, 9),
        (Dtype.INT4, PerAxis(1), 21, 10),
        (Dtype.UINT16, PerTensor(), 21, 10),
        (Dtype.INT2, Blocked(0, 8), 25, 13),
    ],
)
def test_the_opset_is_what_type_and_granularity_need(dtype: Dtype, kind: Granularity, opset: int, version: int) -> None:
    model = layer(LAYERS["MatMul"])
    model.ir_version = 8
    written = inserted(InsertWeightOnly(weight_only(LAYERS["MatMul"], dtype, kind)), model)
    assert (written.opset_imports[""], written.ir_version) == (opset, version)


def test_a_float16_graph_stays_float16() -> None:
    model = model_of(
        "g (float16[5,32] x, float16[32,24] w) => (float16[5,24] y) { [n] y = MatMul(x, w) }", weights="w", opset=17
    )
    plan = quant_plan(weights=(weight_plan(model, "w", "n:1", Dtype.INT8, PerAxis(1)),))
    written = inserted(InsertWeightOnly(plan), model)
    assert written.opset_imports[""] == 19
    feeds = random_feeds(model)
    assert_outputs(written, feeds, outputs(with_rounded_weights(model, *plan.weights), feeds), rtol=2e-3)


REFUSED: dict[str, tuple[Dtype, Granularity, bool, str, Operators, str]] = {
    "float4 in ONNX Runtime": (Dtype.FLOAT4E2M1, PerTensor(), True, "ort-cpu", Operators.ONNX, "use format codebook"),
    "uint4 in TensorRT": (Dtype.UINT4, PerAxis(1), False, "a800", Operators.ONNX, "use int4 or int8"),
    "int2 in TensorRT": (Dtype.INT2, PerAxis(1), True, "a800", Operators.ONNX, "use int4 or int8"),
    "float8 on sm_80": (Dtype.FLOAT8E4M3FN, PerAxis(1), True, "a800", Operators.ONNX, "needs a newer device"),
    "float4 on sm_80": (Dtype.FLOAT4E2M1, PerAxis(1), True, "a800", Operators.ONNX, "needs a newer device"),
    "zero points in TensorRT": (Dtype.INT4, PerAxis(1), False, "a800", Operators.ONNX, "symmetrically"),
    "short block in TensorRT": (Dtype.INT4, Blocked(0, 16), True, "a800", Operators.ONNX, "block_size that divides"),
    "MatMulNBits in TensorRT": (
        Dtype.INT4,
        Blocked(0, 8),
        True,
        "a800",
        Operators.MICROSOFT,
        "MatMulNBits cannot be imported on",
    ),
    "blocks of 8 in MatMulNBits": (Dtype.INT4, Blocked(0, 8), True, "ort-cpu", Operators.MICROSOFT, "16, 32, 64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_the_target_cannot_run(name: str) -> None:
    dtype, kind, symmetric, target, chosen, message = REFUSED[name]
    plan = weight_only(LAYERS["MatMul"], dtype, kind, symmetric, target)
    with pytest.raises(TargetError, match=message) as caught:
        InsertWeightOnly(plan, chosen)(layer(LAYERS["MatMul"]))
    assert "\n" not in str(caught.value)


def test_refuses_a_plan_with_activations() -> None:
    model = layer(LAYERS["MatMul"])
    plan = quant_plan(activation_plan("x", np.ones((5, 40)), "n:0"))
    with pytest.raises(RecipeError, match="quantizes activation 'x'; use format qdq"):
        InsertWeightOnly(plan)(model)


@pytest.mark.parametrize("kind", [PerTensor(), PerAxis(1), Blocked(0, 8)])
@pytest.mark.parametrize("dtype", [Dtype.INT4, Dtype.INT8])
def test_tensorrt_takes_symmetric_signed_weights(dtype: Dtype, kind: Granularity) -> None:
    plan = weight_only(LAYERS["MatMul"], dtype, kind, target="a800")
    assert operators(inserted(InsertWeightOnly(plan), layer(LAYERS["MatMul"]))) == ["DequantizeLinear", "MatMul"]


def test_nothing_to_pack() -> None:
    assert not WriteMatMulNBits()(layer(LAYERS["MatMul"])).modified


@pytest.mark.rtx
@pytest.mark.parametrize("dtype", [Dtype.INT4, Dtype.INT8])
def test_engines_keep_tables_and_weights_small(dtype: Dtype, tmp_path: Path) -> None:
    """Although a table is dequantized before it is looked up: the compiler moves the lookup inside."""
    model = model_of(
        "g (int64[4,8] ids, float[1024,64] t, float[64,96] w) => (float[4,8,96] y) "
        "{ [e] x = Gather(t, ids) [n] y = MatMul(x, w) }",
        weights="t w",
    )
    weights = (
        weight_plan(model, "t", "e:0", dtype, Blocked(1, 32)),
        weight_plan(model, "w", "n:1", dtype, Blocked(0, 32)),
    )
    ir.save(inserted(InsertWeightOnly(quant_plan(weights=weights, target="a800")), model), tmp_path / "m.onnx")
    report = build_engine(tmp_path / "m.onnx", tmp_path / "m.plan")
    constants = [kind for each in report.layers for kind in each.constants]
    assert constants.count(dtype.onnx) == 2
