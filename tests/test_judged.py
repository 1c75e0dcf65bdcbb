from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

import qonnx
from qonnx.judged import judged_model, picked_outputs
from qonnx.tables import result_tables
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


_BEST = "s = Sigmoid(x) b = Relu(x) two = Constant<value = int64[1] {2}>() t, i = TopK(s, two) "
_KEPT = "s = Sigmoid(x) b = Relu(x) z = Constant<value = float {0.5}>() "


@pytest.mark.parametrize(
    ("nodes", "outputs", "expected"),
    [
        (_BEST + "y = GatherElements<axis=1>(b, i)", "float[n,2] y", ["b", "s"]),
        (_BEST + "y = GatherElements<axis=1>(b, i)", "float[n,2] y, float[n,2] t", ["t", "b", "s"]),
        (_BEST + "y = GatherElements<axis=1>(b, i)", "float[n,2] y, float[n,8] b", ["b", "s"]),
        (_BEST + "g = GatherElements<axis=1>(b, i) y = Concat<axis=1>(g, t)", "float[n,4] y", ["t", "b", "s"]),
        (_BEST + "c = Cast<to=1>(i) g = Mul(c, two_f) y = Exp(g)", "float[n,2] y", ["s"]),
        (_KEPT + "m = Greater(s, two_f) i = NonZero(m) j = Transpose(i) y = GatherND(b, j)", "float[k] y", ["b", "s"]),
        # Picked twice: judged by what is in front of the first time.
        (
            _BEST + "g = GatherElements<axis=1>(b, i) v, j = TopK(g, two) y = GatherElements<axis=1>(g, j)",
            "float[n,2] y",
            ["b", "s"],
        ),
    ],
)
def test_what_is_picked_is_judged_by_what_it_is_picked_from(nodes: str, outputs: str, expected: list[str]) -> None:
    model = model_of(f"g (float[n,8] x, float[1] two_f) => ({outputs}) {{ {nodes} }}", weights="two_f")
    ShapeInferencePass()(model)
    before = ir.to_onnx_text(model)
    assert [value.name for value in judged_model(model).graph.outputs] == expected
    assert ir.to_onnx_text(model) == before
    assert list(picked_outputs(model)) == ["y"]


@pytest.mark.parametrize(
    "nodes",
    [
        _BEST + "y = Identity(t)",  # in order of size: as continuous as what was sorted
        "two = Constant<value = int64[1] {2}>() y = Gather<axis=1>(x, two)",
        "a = Relu(x) s = Shape(a) one = Constant<value = int64 {1}>() n = Gather(s, one) y = Cast<to=1>(n)",
        "i = ArgMax<axis=0, keepdims=0>(x) a = Relu(x) y = Gather(a, i)",  # what was fed does not change
        _BEST + "g = GatherElements<axis=1>(b, i) w = Transpose(g) y = MatMul(g, w)",  # what layers make of it counts
        _KEPT + "m = Greater(x, z) y = Where(m, b, s)",  # may well be continuous
    ],
)
def test_leaves_alone_what_is_not_picked_by_results(nodes: str) -> None:
    model = model_of(f"g (float[n,8] x) => (float[k,m] y) {{ {nodes} }}")
    ShapeInferencePass()(model)
    assert picked_outputs(model) == {}
    assert judged_model(model) is model


def test_the_order_of_picked_boxes_leaves_no_layer_in_float(tmp_path: Path) -> None:
    """Scores that hardly differ, as those of background do: whatever is rounded, TopK picks in another order."""
    text = """
    g (float[n,64] x, float[64,64] w, float[64,32] wb, float[64,32] ws) => (float[n,8,1] boxes, float[n,8] scores) {
        k = Constant<value = int64[1] {8}>() s = Constant<value = int64[3] {0, -1, 1}>()
        h = MatMul(x, w) r = Relu(h) b = MatMul(r, wb) b3 = Reshape(b, s)
        low = Constant<value = float {0.01}>() l = MatMul(r, ws) q = Mul(l, low) p = Sigmoid(q)
        scores, i = TopK(p, k) i3 = Reshape(i, s) boxes = GatherElements<axis=1>(b3, i3)
    }"""
    model = model_of(text, weights="w wb ws", scale=0.1)
    batches = [{"x": np.random.default_rng(k).standard_normal((16, 64)).astype(np.float32)} for k in range(6)]
    result = qonnx.quantize(model, batches, tmp_path / "q.onnx")
    boxes, scores = result.comparison.outputs
    assert boxes.sqnr_db < 16 < min(scores.sqnr_db, result.picked["boxes"])
    assert (result.warnings, result.plan.float_layers) == ((), ())
    report = "\n".join(line.plain for line in result_tables(result))
    assert "q.onnx: ready" in report
    assert "boxes: other elements picked" in report
    assert [value.name for value in ir.load(tmp_path / "q.onnx").graph.outputs] == ["boxes", "scores"]


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
