from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

import qonnx
from qonnx.judged import judged_model
from tests.graphs import model_of
from tests.test_pipeline import data, spoiled_model


@pytest.mark.parametrize(
    ("nodes", "outputs", "expected"),
    [
        ("y = Relu(x)", "float[n,8] y", []),
        ("s = Relu(x) y = ArgMax(s)", "int64[k,8] y", ["s"]),
        ("s = Relu(x) t = Softmax(s) y = ArgMax(t)", "int64[k,8] y", ["t"]),
        ("s = Relu(x) y = ArgMax(s)", "int64[k,8] y, float[n,8] s", []),
        ("s = Relu(x) z = Neg(s) y = ArgMax(s)", "int64[k,8] y, float[n,8] z", ["s"]),
        ("s = Relu(x) t = Sin(x) c = Less(s, t) y = Not(c)", "bool[n,8] y", ["s", "t"]),
        ("s = Relu(x) a = ArgMax(s) y = Cast<to=6>(a)", "int32[k,8] y", ["s"]),
        ("s = Relu(x) y = Shape(s)", "int64[2] y", []),
        ("y = ArgMax(x)", "int64[k,8] y", []),
    ],
)
def test_what_integers_are_made_from(nodes: str, outputs: str, expected: list[str]) -> None:
    model = model_of(f"g (float[n,8] x) => ({outputs}) {{ {nodes} }}")
    ShapeInferencePass()(model)
    before = ir.to_onnx_text(model)
    known = len(model.graph.outputs)
    judged = judged_model(model)
    assert [value.name for value in judged.graph.outputs][known:] == expected
    assert ir.to_onnx_text(model) == before


def classes(model: ir.Model) -> ir.Model:
    """The same network, which returns the index of its largest result only."""
    scores = model.graph.outputs.pop()
    node = ir.node("ArgMax", [scores], {"axis": 1, "keepdims": 0}, name="classify")
    node.outputs[0].name, node.outputs[0].type = "class", ir.TensorType(ir.DataType.INT64)
    node.outputs[0].shape = ir.Shape(["n"])
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])
    return model


def test_a_model_that_returns_classes_is_judged_by_their_scores(tmp_path: Path) -> None:
    """The layer to blame is found as it is where the scores are returned, and more classes stay what they were."""
    result = qonnx.quantize(classes(spoiled_model()), data(), tmp_path / "q.onnx")
    assert [layer.node for layer in result.plan.float_layers] == ["bad"]
    assert [output.name for output in result.comparison.outputs] == ["class"]
    assert result.costs[0].node == "bad"
    blind = ["goal_sqnr_db=0", "minimum_sqnr_db=-100"]
    silent = qonnx.quantize(classes(spoiled_model()), data(), tmp_path / "blind.onnx", settings=blind)
    assert silent.comparison.outputs[0].agreement < 0.7 < 0.8 < result.comparison.outputs[0].agreement
    (output,) = ir.load(tmp_path / "q.onnx").graph.outputs
    assert output.name == "class"


def test_auto_chooses_by_the_scores_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    text = (
        "g (float[n,32] x, float[32,32] w, float[32,32] w2) => (float[n,32] y) { h = MatMul(x, w) y = MatMul(h, w2) }"
    )
    batches = [{"x": rng.standard_t(2, (16, 32)).astype(np.float32)} for _ in range(8)]
    plans = [
        qonnx.quantize(change(model_of(text, weights="w w2")), batches, tmp_path / "q.onnx").plan.activations
        for change in (lambda model: model, classes)
    ]
    assert plans[0] == plans[1]
