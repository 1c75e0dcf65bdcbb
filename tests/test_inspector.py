"""What is read out of graphs: of ours, of other tools, of other formats; and the way back to a plan."""

from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

import qonnx
from qonnx.graph import FLOAT_REASON, load, save
from qonnx.inspector import inspect, read_back
from qonnx.inspector.table import inspection_tables
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.plan import QuantPlan, TensorPlan
from tests.graphs import model_of
from tests.helpers import random_feeds, run

NET = (
    "g (float[n,3,12,12] x, float[16,3,3,3] w, float[16] b, float[16,16,3,3] w2, float[2304,16] w3, float[16] b3)"
    "=> (float[n,16] y) {"
    "[first] c = Conv <pads = [1,1,1,1]> (x, w, b) r = Relu(c) [second] d = Conv <pads = [1,1,1,1]> (r, w2)"
    "s = Add(d, r) f = Flatten(s) [head] y = Gemm(f, w3, b3) }"
)


def data() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((8, 3, 12, 12)).astype(np.float32)} for _ in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("inspector")
    save(model_of(NET, weights="w b w2 w3 b3", scale=0.1), made / "model.onnx")
    return made


def quantized(folder: Path, recipe: str = "int8", target: str = "a800") -> tuple[ir.Model, QuantPlan]:
    result = qonnx.quantize(folder / "model.onnx", data(), folder / "q.onnx", recipe=recipe, target=target)
    return load(folder / "q.onnx"), result.plan


def comparable(tensors: tuple[TensorPlan, ...]) -> set[TensorPlan]:
    """As a graph holds it: scales in float32, and nothing of where the ranges come from."""
    return {
        msgspec.structs.replace(
            tensor,
            scale=tuple(np.array(tensor.scale, np.float32).tolist()),
            zero_point=tensor.zero_point if any(tensor.zero_point) else (),
            low=0.0,
            high=0.0,
            sqnr_db=None,
            source="",
        )
        for tensor in tensors
    }


@pytest.mark.parametrize("recipe", ["int8", "int8-minmax"])
def test_inserting_and_reading_back_gives_the_plan_again(folder: Path, recipe: str) -> None:
    model, plan = quantized(folder, recipe)
    back = read_back(model)
    assert not back.notes
    assert comparable(back.plan.activations) == comparable(plan.activations)
    assert comparable(back.plan.weights) == comparable(plan.weights)
    assert back.plan.quantized_layers == plan.quantized_layers
    assert (back.plan.target, back.plan.recipe) == (plan.target, plan.recipe)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in back.model.graph}


def test_what_was_read_back_makes_the_same_graph_again(folder: Path) -> None:
    model, _ = quantized(folder)
    back = read_back(model)
    again = back.model.clone()
    InsertQDQ(back.plan)(again)
    feeds = random_feeds(model, n=3)
    assert np.array_equal(run(again, feeds)["y"], run(model, feeds)["y"])
    assert comparable(read_back(again).plan.weights) == comparable(back.plan.weights)


def test_the_model_that_is_read_is_not_changed(folder: Path) -> None:
    model, _ = quantized(folder)
    before = ir.to_onnx_text(model)
    read_back(model)
    inspect(model)
    assert ir.to_onnx_text(model) == before


def test_a_graph_of_onnx_runtime_can_be_read_and_planned_again(folder: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(data())

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    quantize_static(
        str(folder / "model.onnx"),
        str(folder / "theirs.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"ActivationSymmetric": True},
    )
    model = load(folder / "theirs.onnx")
    back = read_back(model)
    assert len(back.plan.quantized_layers) == 3
    feeds = random_feeds(model, n=3)
    again = back.model.clone()
    InsertQDQ(back.plan)(again)
    expected, found = run(model, feeds)["y"], run(again, feeds)["y"]
    assert np.abs(expected - found).max() < 0.02 * np.abs(expected).max()
    assert {layer.weights for layer in inspect(model).layers} == {"int8 per axis 0", "int8 per axis 1"}


def test_a_float_graph_holds_no_plan(folder: Path) -> None:
    found = inspect(folder / "model.onnx")
    assert not found.quantized
    assert [(layer.node, layer.weights, layer.activations) for layer in found.layers] == [
        ("first", "float", "float"),
        ("second", "float", "float"),
        ("head", "float", "float"),
    ]
    assert found.layers[1].weight == (16, 16, 3, 3)
    assert {layer.reason for layer in found.layers} == {"nothing is quantized yet"}
    assert found.parameters == 16 * 27 + 16 + 16 * 16 * 9 + 2304 * 16 + 16
    assert found.bytes_by_type == {"float": 4 * found.parameters}
    assert found.operators["Conv"] == 2
    assert found.inputs == (inspector_port("x", ("n", 3, 12, 12)),)


def inspector_port(name: str, shape: tuple[int | str, ...]) -> object:
    from qonnx.inspector import Port

    return Port(name, "float", shape)


def test_a_quantized_graph_says_how(folder: Path) -> None:
    model, _ = quantized(folder)
    found = inspect(model)
    assert [(layer.weights, layer.activations, layer.quantized) for layer in found.layers] == [
        ("int8 per axis 0", "int8 per tensor", True),
        ("int8 per axis 0", "int8 per tensor", True),
        ("int8 per axis 1", "int8 per tensor", True),
    ]
    assert found.metadata["qonnx.target"] == "a800"
    assert found.recipe == "int8"
    lines = [line.plain for line in inspection_tables(found)]
    assert any(line.split() == ["recipe", "int8"] for line in lines)
    assert "3 of 3 layers are quantized" in lines
    assert {"    first", "    second", "    head"} <= set(lines)


def test_the_reason_that_the_file_holds_is_told(folder: Path) -> None:
    model = load(folder / "model.onnx")
    model.graph.node("second").metadata_props[FLOAT_REASON] = "because"
    found = inspect(model)
    assert [layer.reason for layer in found.layers] == [
        "nothing is quantized yet",
        "because",
        "nothing is quantized yet",
    ]
    (row,) = (line.plain for line in inspection_tables(found, each=True) if line.plain.startswith("Conv  16x16x3x3"))
    assert row.endswith("second: because")


@pytest.mark.parametrize(
    ("text", "weights", "described"),
    [
        (
            "g (float[n,32] x, int4[32,8] w, float[1,8] s) => (float[n,8] y)"
            "{ d = DequantizeLinear <axis = 0, block_size = 32> (w, s) y = MatMul(x, d) }",
            "s",
            ("int4 in blocks of 32 on axis 0", "float", True),
        ),
        (
            "g (float[n,32] x, int8[32,8] w) => (float[n,8] y)"
            "{ q, s, z = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, z) f = Cast <to = 1> (i) y = Mul(f, s) }",
            "",
            ("int8", "uint8", True),
        ),
        (
            "g (float[n,32] x, float s, int8 z, float[32,8] w) => (float[n,8] y)"
            "{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) t = Identity(d) y = MatMul(t, w) }",
            "s w",
            ("float", "int8 per tensor", True),
        ),
        (
            "g (float[5,n,32] x, int8[1,32,64] w, int8[1,16,64] r, float[1] s, int8[1] z) => (float[5,1,n,16] y)"
            "{ y = com.microsoft.DynamicQuantizeLSTM <hidden_size = 16> (x, w, r, , , , , , s, z, s, z) }",
            "s",
            ("int8", "uint8 per tensor, scale found at run time", True),
        ),
        (
            "g (float[n,32] x, int8[32,8] w, float s, int8 z) => (float[n,8] y)"
            "{ y = com.microsoft.DynamicQuantizeMatMul(x, w, s, z) }",
            "s",
            ("int8", "uint8 per tensor, scale found at run time", True),
        ),
    ],
)
def test_other_formats(text: str, weights: str, described: tuple[str, str, bool]) -> None:
    model = model_of(text, weights=weights)
    graph = model.graph
    for name in ("w", "z"):
        value = next((value for value in graph.inputs if value.name == name), None)
        if value is not None and value.dtype is not None and value.shape is not None:
            zeros = np.zeros(value.shape.numpy(), value.dtype.numpy())
            value.const_value = ir.Tensor(zeros, dtype=value.dtype, name=name)
            graph.inputs.remove(value)
            graph.register_initializer(value)
    (layer,) = inspect(model).layers
    assert (layer.weights, layer.activations, layer.quantized) == described


def test_what_is_looked_up_is_no_constant() -> None:
    text = """g (int64[n] i, int8[64,16] t, float[64] s, int8[16,16] w, float k) => (float[n,16] y) {
        d = DequantizeLinear <axis = 0> (t, s) x = Gather(d, i)
        q = QuantizeLinear(x, k) e = DequantizeLinear(q, k) f = DequantizeLinear(w, k) y = MatMul(e, f) }"""
    model = model_of(text, weights="t s w k")
    table, product = inspect(model).layers
    assert (table.op, table.weights, table.activations) == ("Gather", "int8 per axis 0", "")
    assert (product.weight, product.weights, product.activations) == ((16, 16), "int8 per tensor", "uint8 per tensor")


LEFT = {
    "computed scale": "s = ReduceMax <keepdims = 0> (x) q = QuantizeLinear(x, s) y = DequantizeLinear(q, s)",
    "codes are an input": "y2 = DequantizeLinear(c, k) y = Add(x, y2)",
    "an output": "q = QuantizeLinear(x, k) y = DequantizeLinear(q, k)",
    "moved codes": "q = QuantizeLinear(x, k) m = Transpose <perm = [1,0]> (q) d = DequantizeLinear(m, k) y = Relu(d)",
    "another scale": "q = QuantizeLinear(x, k) d = DequantizeLinear(q, k2) y = Relu(d)",
}


@pytest.mark.parametrize("body", LEFT.values(), ids=LEFT.keys())
def test_leaves_alone_what_a_plan_cannot_say(body: str) -> None:
    text = f"g (float[4,4] x, uint8[4,4] c, float k, float k2) => (float[4,4] y) {{ {body} }}"
    model = model_of(text, weights="k k2")
    back = read_back(model)
    assert len(back.notes) == 1
    assert not back.plan.activations
    assert [node.op_type for node in back.model.graph] == [node.op_type for node in model.graph]
