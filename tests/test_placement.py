"""Where quantization goes, and why the rest stays in float."""

import onnx_ir as ir
import pytest

from qonnx.passes.prepare import prepare
from qonnx.placement import Edge, Placement, candidates, place
from qonnx.recipe import Match, Recipe, Rule
from qonnx.targets import target
from tests.graphs import model_of

CONV = "g (float[1,16,8,8] x, float[16,16,3,3] w, float[16] b) => (float[1,16,8,8] y) "
RESIDUAL = (
    "g (float[1,16,8,8] x, float[16,16,1,1] w1, float[16,16,1,1] w2, float[16,16,1,1] w3) => (float[1,16,8,8] y) "
    "{ a = Conv(x, w1) r = Relu(a) c = Conv(r, w2) s = Conv(x, w3) y = Add(c, s) }"
)
ATTENTION = (
    "g (float[1,4,32,16] q, float[1,4,16,32] k, float[1,4,32,16] v, float[1,1,32,32] mask) => (float[1,4,32,16] y) "
    "{ a = MatMul(q, k) m = Add(a, mask) p = Softmax(m) y = MatMul(p, v) }"
)


def placed(text: str, recipe: Recipe | None = None, name: str = "a800", opset: int = 21) -> Placement:
    model = model_of(text, weights="w w1 w2 w3 b", opset=opset)
    prepare(model)
    return place(model, recipe or Recipe(), target(name))


def edges(placement: Placement, value: str) -> list[str]:
    """Operators (with input number) that read the quantized value."""
    return sorted(f"{edge.node}:{edge.input}" for edge in placement.activations.get(value, ()))


def reasons(placement: Placement) -> list[str]:
    return [layer.reason for layer in placement.layers]


def test_a_convolution_is_quantized_on_its_data_and_weight_and_not_on_its_bias_or_output() -> None:
    placement = placed(CONV + "{ [c] y = Conv <pads = [1,1,1,1]> (x, w, b) }")
    assert placement.activations == {"x": (Edge("c", 0),)}
    assert placement.weights == {("w", 0): (Edge("c", 1),)}
    assert reasons(placement) == [""]


def test_quantization_goes_behind_the_activation_function() -> None:
    placement = placed(
        CONV + "{ a = Conv <pads = [1,1,1,1]> (x, w, b) r = Relu(a) y = Conv <pads = [1,1,1,1]> (r, w, b) }"
    )
    assert set(placement.activations) == {"x", "r"}


def test_a_tensor_with_several_readers_is_quantized_once() -> None:
    placement = placed(
        "g (float[4,32] x, float[32,32] w1, float[32,32] w2) => (float[4,32] y, float[4,32] z) "
        "{ [a] y = MatMul(x, w1) [b] z = MatMul(x, w2) }"
    )
    assert edges(placement, "x") == ["a:0", "b:0"]


def test_the_skip_input_of_a_residual_add_is_quantized_and_the_fused_convolution_is_not() -> None:
    placement = placed(RESIDUAL)
    assert "c" in placement.activations or "s" in placement.activations
    assert not {"c", "s"} <= set(placement.activations)


def test_the_skip_that_the_block_itself_reads_shares_its_scale() -> None:
    placement = placed(CONV + "{ [c] a = Conv <pads = [1,1,1,1]> (x, w, b) [add] y = Add(a, x) }")
    assert edges(placement, "x") == ["add:1", "c:0"]


def test_both_products_of_attention_are_quantized() -> None:
    placement = placed(ATTENTION)
    assert set(placement.activations) == {"q", "k", "p", "v"}
    assert placement.probabilities == {"p"}


def test_attention_can_be_left_in_float() -> None:
    placement = placed(ATTENTION, Recipe(attention=False))
    assert not placement.activations
    assert reasons(placement) == ["the recipe leaves attention products in float"] * 2
    assert set(candidates(placement)) == {"q", "k", "p", "v"}


def test_max_pool_stays_on_integers_between_quantized_operators() -> None:
    placement = placed(
        CONV + "{ r = Relu(x) [p] m = MaxPool <kernel_shape = [1,1]> (r) y = Conv <pads = [1,1,1,1]> (m, w, b) }"
    )
    assert edges(placement, "r") == ["p:0"]
    assert placement.ties["r"] == placement.ties["m"]


def test_everything_that_a_concatenation_joins_shares_one_scale() -> None:
    placement = placed(
        "g (float[1,8,8,8] x, float[1,8,8,8] z, float[16,16,1,1] w) => (float[1,16,8,8] y) "
        "{ a = Relu(x) b2 = Sigmoid(z) j = Concat <axis = 1> (a, b2) y = Conv(j, w) }"
    )
    assert {"a", "b2", "j"} <= set(placement.activations)
    assert len({placement.ties[value] for value in ("a", "b2", "j")}) == 1


LEFT_IN_FLOAT = {
    "thin matrix": ("g (float[4,8] x, float[8,32] w) => (float[4,32] y) { y = MatMul(x, w) }", "8 x 32 weight"),
    "one output": ("g (float[4,32] x, float[32,1] w) => (float[4,1] y) { y = Gemm(x, w) }", "32 x 1 weight"),
    "few channels": (
        "g (float[1,16,8,8] x, float[4,16,1,1] w) => (float[1,4,8,8] y) { r = Relu(x) y = Conv(r, w) }",
        None,
    ),
    "narrow channels": (
        "g (float[1,12,8,8] x, float[12,12,1,1] w) => (float[1,12,8,8] y) { r = Relu(x) y = Conv(r, w) }",
        "12 to 12 channels",
    ),
    "odd groups": (
        "g (float[1,18,8,8] x, float[18,1,3,3] w) => (float[1,18,6,6] y) { y = Conv <group = 18> (x, w) }",
        "not a multiple of 8",
    ),
    "squeeze and excitation": (
        "g (float[1,64,8,8] x, float[32,64,1,1] w) => (float[1,32,1,1] y) { m = GlobalAveragePool(x) y = Conv(m, w) }",
        "one pixel",
    ),
    "activations outside attention": (
        "g (float[4,32] x, float[32,32] z) => (float[4,32] y) { y = MatMul(x, z) }",
        "outside attention",
    ),
    "narrow heads": (
        "g (float[1,4,32,8] q, float[1,4,8,32] k) => (float[1,4,32,32] y) { a = MatMul(q, k) y = Softmax(a) }",
        "sums over 8 elements",
    ),
    "weight from outside": (
        "g (float[1,16,8,8] x, float[16,16,1,1] z) => (float[1,16,8,8] y) { y = Conv(x, z) }",
        "not a constant",
    ),
    "double precision": (
        "g (double[4,32] x, double[32,32] k) => (double[4,32] y) { a = MatMul(x, k) y = Softmax(a) }",
        "computes in double",
    ),
}


@pytest.mark.parametrize("name", LEFT_IN_FLOAT)
def test_leaves_alone_with_a_reason(name: str) -> None:
    text, expected = LEFT_IN_FLOAT[name]
    (layer,) = placed(text).layers
    if expected is None:
        assert not layer.reason
    else:
        assert expected in layer.reason


def test_shape_arithmetic_masks_heads_and_norms_stay_in_float_each_with_a_reason() -> None:
    placement = placed(
        "g (float[n,32] x, float[32,32] w, float[32] b) => (float[n,32] y, int64[2] z) "
        "{ a = MatMul(x, w) n = LayerNormalization(a, b, b) s = Sigmoid(n) y = Mul(s, x) z = Shape(x) }"
    )
    assert set(placement.activations) == {"x"}
    assert set(placement.float_operators) == {"LayerNormalization", "Sigmoid", "Mul", "Shape"}
    assert all(reason for _, reason in placement.float_operators.values())


def test_bodies_of_control_flow_are_left_in_float() -> None:
    placement = placed(
        "g (bool c, float[4,32] x, float[32,32] w) => (float[4,32] y) "
        "{ y = If (c) <then_branch = t () => (float[4,32] a) { a = MatMul(x, w) },"
        " else_branch = e () => (float[4,32] b2) { b2 = Identity(x) }> }"
    )
    assert not placement.activations
    assert "If" in placement.float_operators


@pytest.mark.parametrize(
    "match", [Match(op="Conv"), Match(name="c*"), Match(op="C*", name="c")], ids=["op", "name", "both"]
)
def test_rules_leave_nodes_in_float(match: Match) -> None:
    text = CONV + "{ [c] y = Conv <pads = [1,1,1,1]> (x, w, b) }"
    placement = placed(text, Recipe(rules=(Rule(match, skip=True),)))
    assert reasons(placement) == ["rule 1 of the recipe"]
    assert not placement.activations


def test_a_later_rule_wins() -> None:
    text = CONV + "{ [c] y = Conv <pads = [1,1,1,1]> (x, w, b) }"
    rules = (Rule(Match(op="*"), skip=True), Rule(Match(name="c"), skip=False))
    assert reasons(placed(text, Recipe(rules=rules))) == [""]


def test_onnx_runtime_wants_the_outputs_of_convolutions_quantized() -> None:
    placement = placed(RESIDUAL, name="ort-cpu")
    assert {"x", "r", "c", "s"} <= set(placement.activations)


def test_every_name_in_a_placement_is_in_the_graph() -> None:
    model = model_of(RESIDUAL, weights="w1 w2 w3")
    prepare(model)
    placement = place(model, Recipe(), target("a800"))
    nodes: dict[str | None, ir.Node] = {node.name: node for node in model.graph}
    for value, where in placement.activations.items():
        for edge in where:
            read = nodes[edge.node].inputs[edge.input]
            assert read is not None
            assert read.name == value
