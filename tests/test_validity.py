"""Files that are no models are refused in one line, wherever they are read; whatever a runtime accepts is not."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qonnx
from qonnx.errors import ModelError
from qonnx.graph import load
from qonnx.runtime import session
from qonnx.validity import check_graph, check_operators

HEADER = '<ir_version: 10, opset_import: ["" : 18, "com.acme" : 1]>'
SIGNATURE = "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}, int64[1] zero = {0}>"


def quantize_weights(path: Path) -> None:
    qonnx.quantize(path, None, path.parent / "q.onnx", recipe="w8")


def written(body: str, folder: Path, signature: str = SIGNATURE) -> Path:
    onnx.save(onnx.parser.parse_model(f"{HEADER} {signature} {{ {body} }}"), folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[add] y = Add(x, q)", "node add (Add) reads 'q', which no input, initializer or node defines"),
        ("z = Add(x, w)", "nothing makes the output 'y'"),
        ("z = Add(x, y) y = Neg(z)", "its nodes depend on each other in a cycle"),
        ("y = Add(x)", "node node_of_y (Add) needs 2 inputs and has 1"),
        (
            "c = Greater(x, w) t = ReduceMax <keepdims = 0> (x) l = Cast <to = 9> (t) "
            "y = If (l) <then_branch = a () => (float[2] o) { [in] o = Neg(q) }, else_branch = b () => (float[2] p) "
            "{ p = Neg(x) }>",
            "node in (Neg) reads 'q'",
        ),
    ],
)
def test_what_is_no_model_is_refused_by_every_command(body: str, message: str, tmp_path: Path) -> None:
    path = written(body, tmp_path)
    for read in (load, qonnx.lint, qonnx.inspect, quantize_weights):
        with pytest.raises(ModelError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: {message}")
        assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[mean] y = GlobalAveragePool(x, w)", "node mean (GlobalAveragePool) is not valid in opset 18 ("),
        ("y = Transpose <axis = 1> (x)", "node node_of_y (Transpose) is not valid in opset 18 ("),
    ],
)
def test_operators_with_what_they_do_not_have_are_refused_before_they_are_quantized(
    body: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        quantize_weights(written(body, tmp_path))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        "z = com.acme.Wobble() y = Add(x, z)",
        "z = Wobble(x) y = Add(x, z)",
        "z = Clip(x, , w) y = Neg(z)",
        "c = Constant <value_float = 1.0> () y = Mul(x, c)",
        "t = ReduceMax <keepdims = 0> (x) l = Cast <to = 9> (t) h = Neg(x) y = If (l) <then_branch = a () => "
        "(float[2] o) { o = Add(h, w) }, else_branch = b () => (float[2] p) { p = Neg(x) }>",
    ],
)
def test_leaves_alone(body: str, tmp_path: Path) -> None:
    path = written(body, tmp_path)
    model = load(path)
    check_operators(model)
    assert [node.op_type for node in model.graph] == [node.op_type for node in onnx.load(path).graph.node]


def test_nodes_in_any_order_are_sorted(tmp_path: Path) -> None:
    path = written("y = Neg(z) z = Add(x, w)", tmp_path)
    model = load(path)
    assert [node.op_type for node in model.graph] == ["Add", "Neg"]
    assert session(model).run({"x": np.ones(2, np.float32)})["y"].tolist() == [-2, -3]
    unsorted = ir.serde.deserialize_model(onnx.load(path))
    with pytest.raises(ModelError, match=r"node node_of_y \(Neg\) stands before what it reads: sort the graph"):
        check_graph(unsorted, "model")


def test_a_body_counts_as_what_it_reads(tmp_path: Path) -> None:
    branches = "then_branch = a () => (float[2] o) { o = Neg(h) }, else_branch = b () => (float[2] p) { p = Neg(x) }"
    body = f"t = ReduceMax <keepdims = 0> (x) l = Cast <to = 9> (t) y = If (l) <{branches}> h = Neg(x)"
    model = load(written(body, tmp_path))
    assert [node.op_type for node in model.graph][-1] == "If"
    assert session(model).run({"x": np.ones(2, np.float32)})["y"].tolist() == [1, 1]


def test_a_weight_that_is_cut_short_is_named(tmp_path: Path) -> None:
    path = written("y = Add(x, w)", tmp_path)
    proto = onnx.load(path)
    (stored,) = (tensor for tensor in proto.graph.initializer if tensor.name == "w")
    stored.ClearField("float_data")
    stored.raw_data = bytes(4)
    onnx.save(proto, path)
    with pytest.raises(ModelError, match=r"weight 'w' cannot be read \(.*\); export the model again"):
        quantize_weights(path)
