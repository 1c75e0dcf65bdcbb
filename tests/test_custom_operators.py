"""Operators that ONNX Runtime does not have: the rest of the graph is quantized, and they come back as they were."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qonnx
from qonnx.custom_operators import attach, left_alone, runnable
from qonnx.errors import ModelError
from qonnx.graph import all_graphs, load, save
from tests.graphs import model_of
from tests.helpers import assert_same_function, operators, random_feeds

HEADER = "g (float[n,16] x, float[16] f, float[16,16] w, float[16,16] u) => (float[n,16] y)"
TWICE = """<ir_version: 10, opset_import: ["" : 21, "com.example" : 1]> g (float[n] x) => (float[n] y) { y = Neg(x) }
    <domain: "com.example", opset_import: ["" : 21]> Twice (a) => (b) { b = Add(a, a) }"""
BRANCH = "y = If (c) <then_branch = t1 () => (float[n,16] o) {{ {} }}, else_branch = t2 () => (float[n,16] p) {{ {} }}>"

# Graphs with an operator that no runtime has, and what of them can be run: its operators and outputs.
CUT: dict[str, tuple[str, list[str], list[str]]] = {
    "last": ("a = MatMul(x, w) y = com.example.Twice(a)", ["MatMul"], ["a"]),
    "default domain": ("a = MatMul(x, w) y = Twice(a)", ["MatMul"], ["a"]),
    "in the middle": (
        "a = MatMul(x, w) b = com.example.Twice(a) c = Relu(a) d = MatMul(b, u) y = Add(c, d)",
        ["MatMul", "Relu"],
        ["a", "c"],
    ),
    "of an input": ("a = MatMul(x, w) b = com.example.Twice(f) y = Add(a, b)", ["MatMul"], ["a"]),
    "of a constant": (
        "k = Constant <value_float = 0.5> () a = MatMul(x, w) b = com.example.Twice(k) y = Mul(a, b)",
        ["MatMul"],
        ["a"],
    ),
    "of a weight that others read": ("a = MatMul(x, w) b = com.example.Twice(w) y = MatMul(a, b)", ["MatMul"], ["a"]),
    "in a body": (
        "a = MatMul(x, w) m = ReduceMax <keepdims = 0> (a) c = Cast <to = 9> (m) r = Relu(a) "
        + BRANCH.format("i = com.example.Twice(r) o = MatMul(i, u)", "p = Neg(a)"),
        ["MatMul", "ReduceMax", "Cast", "Relu"],
        ["c", "r", "a"],
    ),
    "read in a body": (
        "a = MatMul(x, w) i = com.example.Twice(a) m = ReduceMax <keepdims = 0> (a) c = Cast <to = 9> (m) "
        + BRANCH.format("o = MatMul(i, u)", "p = Neg(i)"),
        ["MatMul", "ReduceMax", "Cast"],
        ["a", "c"],
    ),
}


def model(nodes: str, header: str = HEADER, opset: int = 21) -> ir.Model:
    return model_of(f"{header} {{ {nodes} }}", weights="w u", opset=opset, scale=0.25)


def computed(whole: ir.Model) -> ir.Model:
    """The same where a function says what the operator does."""
    copy = whole.clone()
    for graph in all_graphs(copy):
        for node in graph:
            if node.op_type == "Twice":
                node.domain = "com.example"
    copy.opset_imports["com.example"] = 1
    copy.functions.update(ir.from_onnx_text(TWICE).functions)
    return copy


@pytest.mark.parametrize(("nodes", "kept", "outputs"), CUT.values(), ids=CUT)
def test_what_can_be_run_is_cut_off_and_put_back(nodes: str, kept: list[str], outputs: list[str]) -> None:
    whole = model(nodes)
    before = ir.to_onnx_text(whole)
    part = runnable(whole)
    assert operators(part) == kept
    assert sorted(value.name or "" for value in part.graph.outputs) == sorted(outputs)
    assert set(part.graph.initializers) == {"w"}
    assert [value.name for value in part.graph.inputs] == ["x", "f"]
    assert runnable(part) is part
    attach(part, whole)
    assert ir.to_onnx_text(whole) == before
    assert [value.name for value in part.graph.outputs] == ["y"]
    assert_same_function(computed(whole), computed(part))


@pytest.mark.parametrize(
    "nodes",
    [
        "a = MatMul(x, w) y = Relu(a)",
        "a = MatMul(x, w) y = com.microsoft.BiasGelu(a, f)",
        "a = MatMul(x, w) y = HardSwish(a)",  # a function of ONNX, without a kernel
        "a = MatMul(x, w) y = SimplifiedLayerNormalization(a, f)",  # not in ONNX
    ],
)
def test_leaves_alone_what_the_runtime_has(nodes: str) -> None:
    whole = model(nodes)
    assert runnable(whole) is whole
    assert left_alone(whole) == ((), ())


def test_leaves_alone_what_a_function_of_the_model_says() -> None:
    whole = computed(model("a = MatMul(x, w) y = com.example.Twice(a)"))
    assert runnable(whole) is whole


def test_a_function_that_calls_such_an_operator_is_cut_off() -> None:
    whole = computed(model("a = MatMul(x, w) y = com.example.Twice(a)"))
    (function,) = whole.functions.values()
    function[0].domain = "com.other"
    part = runnable(whole)
    assert operators(part) == ["MatMul"]
    assert left_alone(whole)[0][0].startswith("Add: not in ONNX Runtime")
    attach(part, whole)
    assert [(node.domain, node.op_type) for node in part.graph] == [("", "MatMul"), ("com.other", "Add")]


def test_an_output_that_the_operator_reads_too() -> None:
    whole = model("a = MatMul(x, w) y = com.example.Twice(a)", HEADER.replace("y)", "y, float[n,16] a)"))
    part = runnable(whole)
    assert [value.name for value in part.graph.outputs] == ["a"]
    attach(part, whole)
    assert [value.name for value in part.graph.outputs] == ["y", "a"]
    assert_same_function(computed(whole), computed(part))


def test_a_changed_weight_of_the_part_is_not_that_of_the_rest() -> None:
    whole = model("a = MatMul(x, w) b = com.example.Twice(w) y = MatMul(a, b)")
    part = runnable(whole)
    weight = part.graph.initializers["w"]
    assert weight.const_value is not None
    weight.const_value = ir.tensor(2 * weight.const_value.numpy(), name="w")
    attach(part, whole)
    halved = model("h = Add(w, w) a = MatMul(x, h) b = com.example.Twice(w) y = MatMul(a, b)")
    assert_same_function(computed(halved), computed(part))


def test_names_that_the_part_has_taken_since_are_not_used_twice() -> None:
    whole = model("a = MatMul(x, w) b = com.example.Twice(a) y = Neg(b)")
    part = runnable(whole)
    value = part.graph.node(0).outputs[0]
    twin = ir.node("Identity", [value], name="n")
    twin.outputs[0].name = "b"
    part.graph.append(twin)
    attach(part, whole)
    names = [value.name for node in part.graph for value in node.outputs]
    assert len(names) == len(set(names)) == 4
    assert_same_function(computed(whole), computed(part))


@pytest.mark.parametrize("domain", ["com.example.", ""])
@pytest.mark.parametrize(("old", "new"), [(11, 13), (11, 21), (13, 11)])
def test_the_rest_is_brought_to_the_opset_of_the_part(old: int, new: int, domain: str) -> None:
    """Axes of Unsqueeze became an input in 13."""
    squeezed = {
        11: "s = Unsqueeze <axes = [0]> (b) y = Squeeze <axes = [0]> (s)",
        13: "k = Constant <value_ints = [0]> () s = Unsqueeze(b, k) y = Squeeze(s, k)",
    }
    whole = model(f"a = MatMul(x, w) b = {domain}Twice(a) {squeezed[old]}", opset=old)
    part = runnable(model(f"a = MatMul(x, w) b = {domain}Twice(a) {squeezed[min(new, 13)]}", opset=new))
    attach(part, whole)
    assert part.opset_imports[""] == max(old, new)
    assert {node.domain for node in part.graph} == {"", domain.rstrip(".")}
    assert set(part.opset_imports) == {"", "com.example"}
    assert_same_function(computed(whole), computed(part))


PLUGIN = """g (float[n,3,16,16] x, float[16,3,3,3] w, float[20,16,1,1] u, float[16,5] v)
    => (int32[n,1] number, float[n,10,4] boxes, float[n,5] z)
    { a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w) r = Relu(a) c = Conv(r, u)
      shape = Constant <value_ints = [0, 20, -1]> () q = Reshape(c, shape) t = Transpose <perm = [0, 2, 1]> (q)
      s1, s2 = Split <axis = 2, num_outputs = 2> (t) scores = Sigmoid(s2) p = GlobalAveragePool(r) e = Flatten(p)
      number, boxes = EfficientNMS_TRT <max_output_boxes = 10> (s1, scores)
      m = ReduceMean <keepdims = 0> (boxes) z0 = MatMul(e, v) z = Add(z0, m) }"""


@pytest.mark.parametrize("target", ["a800", "ort-cpu"])
def test_a_detector_with_a_plugin_at_its_end(tmp_path: Path, target: str) -> None:
    whole = model_of(PLUGIN, weights="w u v", scale=0.3)
    save(whole, tmp_path / "m.onnx")
    x = np.random.default_rng(0).standard_normal((40, 3, 16, 16)).astype(np.float32)
    result = qonnx.quantize(tmp_path / "m.onnx", {"x": x}, tmp_path / "q.onnx", target=target)
    assert {output.name for output in result.comparison.outputs} == {"s1", "scores", "z0"}
    assert all(output.sqnr_db > 20 for output in result.comparison.outputs)
    assert [layer.op for layer in result.plan.quantized_layers] == ["Conv", "Conv"]
    assert any(note.startswith("EfficientNMS_TRT: not in ONNX Runtime") for note in result.notes)
    assert not any("cannot be measured" in warning for warning in result.warnings)
    written = load(tmp_path / "q.onnx")
    assert [value.name for value in written.graph.outputs] == ["number", "boxes", "z"]
    (plugin,) = [node for node in written.graph if node.op_type == "EfficientNMS_TRT"]
    assert plugin.attributes.get_int("max_output_boxes") == 10
    again = qonnx.compare(tmp_path / "m.onnx", tmp_path / "q.onnx", {"x": x})
    assert {output.name: output.sqnr_db > 20 for output in again.outputs} == dict.fromkeys(("s1", "scores", "z0"), True)
    statistics = qonnx.calibrate(tmp_path / "m.onnx", {"x": x}, target=target)
    assert set(statistics.tensors) >= {"x", "r"}


def test_layers_behind_it_are_named_in_a_warning(tmp_path: Path) -> None:
    whole = model("a = MatMul(x, w) b = com.example.Twice(a) c = MatMul(b, u) d = Relu(c) y = MatMul(d, w)")
    feeds = {"x": np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32), "f": np.ones(16, np.float32)}
    batches = [{"x": x, "f": feeds["f"]} for x in np.split(feeds["x"], 8)]
    result = qonnx.quantize(whole, batches, tmp_path / "q.onnx")
    assert [layer.op for layer in result.plan.layers] == ["MatMul"]
    assert "2 layers behind Twice cannot be measured, as ONNX Runtime lacks it: left in float" in result.warnings
    written = load(tmp_path / "q.onnx")
    assert_same_function(computed(whole), computed(written), random_feeds(whole, n=4), rtol=0.1)


def test_nothing_is_left_to_run(tmp_path: Path) -> None:
    whole = model("b = com.example.Twice(x) y = MatMul(b, w)")
    with pytest.raises(ModelError, match="everything needs the result of Twice, which ONNX Runtime does not have"):
        qonnx.quantize(whole, [{"x": np.ones((2, 16), np.float32), "f": np.ones(16, np.float32)}], tmp_path / "q.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "nodes", ["k = Exp(u) y = com.example.Twice(a, k)", "s = Shape(x) y = com.example.Twice(a, s)"]
)
def test_what_it_reads_may_be_constant_once_prepared(tmp_path: Path, nodes: str) -> None:
    whole = model(f"a = MatMul(x, w) {nodes}", HEADER.replace("n,", "8,"))
    batches = [{"x": x, "f": np.ones(16, np.float32)} for x in np.random.default_rng(0).normal(size=(8, 8, 16))]
    result = qonnx.quantize(whole, batches, tmp_path / "q.onnx")
    assert [output.name for output in result.comparison.outputs] == ["a"]
    assert load(tmp_path / "q.onnx").graph.outputs[0].name == "y"
