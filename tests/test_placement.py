"""Where quantization goes, and why the rest stays in float."""

from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

import qonnx
from qonnx.engine import build_engine
from qonnx.engine.listing import int8_nodes
from qonnx.graph import save
from qonnx.numerics import PerTensor
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.passes.prepare import prepare
from qonnx.placement import Edge, Placement, candidates, place
from qonnx.recipe import Match, Recipe, Rule, load_recipe
from qonnx.targets import target
from tests.graphs import model_of
from tests.test_plan import planned

CONV = "g (float[1,16,8,8] x, float[16,16,3,3] w, float[16] b) => (float[1,16,8,8] y) "
RESIDUAL = (
    "g (float[1,16,8,8] x, float[16,16,1,1] w1, float[16,16,1,1] w2, float[16,16,1,1] w3) => (float[1,16,8,8] y) "
    "{ a = Conv(x, w1) r = Relu(a) c = Conv(r, w2) s = Conv(x, w3) y = Add(c, s) }"
)
ATTENTION = (
    "g (float[1,4,32,16] q, float[1,4,16,32] k, float[1,4,32,16] v, float[1,1,32,32] mask) => (float[1,4,32,16] y) "
    "{ a = MatMul(q, k) m = Add(a, mask) p = Softmax(m) y = MatMul(p, v) }"
)

# One projection makes queries, keys and values, as one Split or as one Gather each; four heads of 16.
SPLIT = "q, k, v = Split <axis = -1, num_outputs = 3> (a) "
HEADS = "heads = Constant <value = int64[4] {1, 32, 4, 16}> () flat = Constant <value = int64[3] {1, 32, 64}> () "
FUSED = (
    "g (float[1,32,64] x, float[64,192] w, float[192] b, float[64,64] w1) => (float[1,32,64] y) {"
    + HEADS
    + "[project] m = MatMul(x, w) a = Add(m, b) "
    + SPLIT
    + "[split_q] q4 = Reshape(q, heads) [split_k] k4 = Reshape(k, heads) [split_v] v4 = Reshape(v, heads) "
    "qt = Transpose <perm = [0,2,1,3]> (q4) kt = Transpose <perm = [0,2,3,1]> (k4) "
    "vt = Transpose <perm = [0,2,1,3]> (v4) [scores] s = MatMul(qt, kt) p = Softmax(s) [mix] c = MatMul(p, vt) "
    "ct = Transpose <perm = [0,2,1,3]> (c) r = Reshape(ct, flat) [out] y = MatMul(r, w1) }"
)


def attention(
    between: str = "p = Softmax(a)", head: int = 16, dtype: str = "float", end: str = "y = MatMul(p, v)"
) -> str:
    """Attention without projections, over 32 positions."""
    return (
        f"g ({dtype}[1,4,32,{head}] q, {dtype}[1,4,{head},32] k, {dtype}[1,4,32,{head}] v, bool[1,1,32,32] mask) "
        f"=> ({dtype}[1,4,32,{head}] y) {{ [scores] a = MatMul(q, k) {between} [mix] {end} }}"
    )


def placed(text: str, recipe: Recipe | None = None, name: str = "a800", opset: int = 21) -> Placement:
    model = model_of(text, weights="w w1 w2 w3 b", opset=opset)
    prepare(model)
    return place(model, recipe or Recipe(), target(name))


def axes(placement: Placement) -> dict[tuple[str, int], tuple[Edge, ...]]:
    """The edges of every quantized weight, by its name and channel axis."""
    return {(weight.value, weight.channel_axis): edges for weight, edges in placement.weights.items()}


def edges(placement: Placement, value: str) -> list[str]:
    """Operators (with input number) that read the quantized value."""
    return sorted(f"{edge.node}:{edge.input}" for edge in placement.activations.get(value, ()))


def reasons(placement: Placement) -> list[str]:
    return [layer.reason for layer in placement.layers]


def test_a_convolution_is_quantized_on_its_data_and_weight_and_not_on_its_bias_or_output() -> None:
    placement = placed(CONV + "{ [c] y = Conv <pads = [1,1,1,1]> (x, w, b) }")
    assert placement.activations == {"x": (Edge("c", 0),)}
    assert axes(placement) == {("w", 0): (Edge("c", 1),)}
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
    "few output channels": (
        "g (float[1,16,8,8] x, float[4,16,1,1] w) => (float[1,4,8,8] y) { r = Relu(x) y = Conv(r, w) }",
        "16 to 4 channels",
    ),
    "few input channels": (
        "g (float[1,8,8,8] x, float[16,8,1,1] w) => (float[1,16,8,8] y) { r = Relu(x) y = Conv(r, w) }",
        None,
    ),
    "filter bank": (
        "g (float[1,50,128] x, float[128,40] w) => (float[1,40,50] y) "
        "{ p = Mul(x, x) m = MatMul(p, w) t = Transpose <perm = [0,2,1]> (m) c = Add(t, t) y = Log(c) }",
        "logarithm",
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
    "experts": (
        "g (float[4,32] x, int64[4] i, float[8,32,32] w) => (float[4,4,32] y) "
        "{ e = Gather(w, i) t = Transpose <perm = [0, 2, 1]> (e) y = MatMul(x, t) }",
        "looked up at run time in a stack",
    ),
    "rows of a table": (
        "g (float[4,32] x, int64[32] i, float[8,32] w) => (float[4,32] y) { e = Gather(w, i) y = MatMul(x, e) }",
        "outside attention",
    ),
    "narrow heads": (
        "g (float[1,4,32,8] q, float[1,4,8,32] k, float[1,4,32,8] v) => (float[1,4,32,8] y) "
        "{ a = MatMul(q, k) p = Softmax(a) y = MatMul(p, v) }",
        "sums over 8 elements",
    ),
    "outside attention, though a Softmax reads it": (
        "g (float[4,32] x, float[32,32] z) => (float[4,32] y) { a = MatMul(x, z) y = Softmax(a) }",
        "outside attention",
    ),
    "probabilities that no product made": (
        "g (float[4,32] x, float[32,32] z) => (float[4,32] y) { p = Softmax(x) y = MatMul(p, z) }",
        "no product of queries and keys",
    ),
    "vector": ("g (float[8,32] x, float[32] w) => (float[8] y) { y = MatMul(x, w) }", "is a vector"),
    "computed weight": (
        "g (float[4,512] x, float[1,512] w) => (float[4,512] y) "
        "{ n = Constant <value = int64[2] {512, 512}> () s = Expand(w, n) y = MatMul(x, s) }",
        "computed in the graph",
    ),
    "computed kernel": (
        "g (float[1,512,8,8] x, float[1,512,1,1] w) => (float[1,512,8,8] y) "
        "{ n = Constant <value = int64[4] {512, 512, 1, 1}> () s = Expand(w, n) y = Conv(x, s) }",
        "computed in the graph",
    ),
    "no channels": (
        "g (float[1,16,8,8] x, float[0,16,1,1] w) => (float[1,0,8,8] y) { y = Conv(x, w) }",
        "its weight is empty",
    ),
    "transposed convolution": (
        "g (float[1,32,8,8] x, float[32,16,1,1] w) => (float[1,16,8,8] y) { y = ConvTranspose(x, w) }",
        "transposed convolutions",
    ),
    "weight from outside": (
        "g (float[1,16,8,8] x, float[16,16,1,1] z) => (float[1,16,8,8] y) { y = Conv(x, z) }",
        "not a constant",
    ),
    "double precision": (
        "g (double[4,32] x, double[32,32] k) => (double[4,32] y) { a = MatMul(x, k) p = Softmax(a) y = MatMul(p, k) }",
        "computes in double",
    ),
}


@pytest.mark.parametrize("name", LEFT_IN_FLOAT)
def test_leaves_alone_with_a_reason(name: str) -> None:
    text, expected = LEFT_IN_FLOAT[name]
    layer = placed(text).layers[0]
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


def test_the_parts_of_one_projection_are_rounded_where_they_are_cut() -> None:
    placement = placed(FUSED)
    assert reasons(placement) == [""] * 4
    assert set(placement.activations) == {"x", "q", "k", "v", "p", "r"}
    assert [edges(placement, value) for value in "qkv"] == [["split_q:0"], ["split_k:0"], ["split_v:0"]]


def test_for_a_cpu_they_are_rounded_where_they_are_multiplied() -> None:
    placement = placed(FUSED, name="ort-cpu")
    assert set(placement.activations) == {"x", "qt", "kt", "vt", "p", "r"}


def test_parts_that_something_else_reads_are_rounded_where_they_are_multiplied() -> None:
    placement = placed(FUSED.replace("(float[1,32,64] y)", "(float[1,32,64] y, float[1,4,32,16] vt)"))
    assert set(placement.activations) == {"x", "q", "k", "vt", "p", "r"}


def test_in_an_attention_in_float_the_values_are_rounded_so_that_the_projection_stays_whole() -> None:
    placement = placed(FUSED, Recipe(attention=False))
    assert set(placement.activations) == {"x", "v", "r"}
    assert set(placed(FUSED, Recipe(attention=False), name="ort-cpu").activations) == {"x", "r"}


def test_nothing_is_rounded_in_a_float_attention_behind_a_float_projection() -> None:
    skip = Rule(Match(name="project"), skip=True)
    assert set(placed(FUSED, Recipe(attention=False, rules=(skip,))).activations) == {"r"}


def test_the_result_of_an_attention_is_rounded_even_when_nothing_quantized_reads_it() -> None:
    skip = Recipe(rules=(Rule(Match(name="out"), skip=True),))
    assert edges(placed(FUSED, skip), "r") == ["out:0"]
    assert edges(placed(FUSED, skip, name="ort-cpu"), "r") == []


BETWEEN_THE_PRODUCTS = {
    "scale and mask": "d = Sqrt(a) e = Div(a, d) f = Where(mask, e, d) p = Softmax(f)",
    "soft cap": "t = Tanh(a) e = Mul(t, t) p = Softmax(e)",
    "casts": "s = Softmax(a) h = Cast <to = 10> (s) p = Cast <to = 1> (h)",
    "masked rows become zero": "o = Constant <value = float {0.0}> () s = Softmax(a) n = IsNaN(s) p = Where(n, o, s)",
}


@pytest.mark.parametrize("name", BETWEEN_THE_PRODUCTS)
def test_finds_both_products_whatever_stands_in_between(name: str) -> None:
    placement = placed(attention(BETWEEN_THE_PRODUCTS[name]))
    assert reasons(placement) == ["", ""]
    assert placement.probabilities == {"p"}


def test_values_may_come_first() -> None:
    placement = placed(
        "g (float[1,100,64] q, float[1,64,100] k, float[1,64,100] v) => (float[1,64,100] y) "
        "{ a = MatMul(q, k) s = Softmax(a) p = Transpose <perm = [0,2,1]> (s) y = MatMul(v, p) }"
    )
    assert reasons(placement) == ["", ""]
    assert set(placement.activations) == {"q", "k", "v", "p"}


def test_products_that_share_an_attention_stay_in_float_together() -> None:
    text = attention(end="y = MatMul(p, v) [other] z = MatMul(p, q)").replace("y) {", "y, float[1,4,32,16] z) {")
    placement = placed(text, Recipe(rules=(Rule(Match(name="other"), skip=True),)))
    assert reasons(placement) == [
        "the other product of its attention stays in float",
        "the other product of its attention stays in float",
        "rule 1 of the recipe",
    ]
    assert not placement.activations


@pytest.mark.parametrize(("head", "dtype", "quantized"), [(64, "float16", 2), (80, "float16", 0), (80, "float", 2)])
def test_half_precision_keeps_a_fused_attention_that_int8_lacks(head: int, dtype: str, quantized: int) -> None:
    text = attention(head=head, dtype=dtype)
    assert sum(not reason for reason in reasons(placed(text))) == quantized
    assert reasons(placed(text, name="ort-cpu")) == ["", ""]


def test_the_cache_that_a_concatenation_extends_is_not_rounded() -> None:
    placement = placed(
        "g (float[1,4,1,16] q, float[1,4,1,16] new, float[1,4,31,16] past) => (float[1,4,1,16] y, float[1,4,32,16] k) "
        "{ k = Concat <axis = 2> (past, new) t = Transpose <perm = [0,1,3,2]> (k) a = MatMul(q, t) p = Softmax(a) "
        "y = MatMul(p, k) }"
    )
    assert set(placement.activations) == {"q", "t", "p", "k"}


def test_a_concatenation_or_pool_that_something_else_reads_is_left_alone() -> None:
    joined = placed(
        "g (float[1,8,8,8] x, float[1,8,8,8] z, float[16,16,1,1] w) => (float[1,16,8,8] y, float[1,16,8,8] f) "
        "{ j = Concat <axis = 1> (x, z) y = Conv(j, w) f = Sigmoid(j) }"
    )
    pooled = placed(
        "g (float[1,16,8,8] x, float[16,16,1,1] w) => (float[1,16,7,7] y, int64[1,16,7,7] i) "
        "{ m, i = MaxPool <kernel_shape = [2,2]> (x) y = Conv(m, w) }"
    )
    assert set(joined.activations) == {"j"}
    assert set(pooled.activations) == {"m"}


SHARED = (
    "g (float[4,128] x, float[128,128] w) => (float[4,128] y) "
    "{ [t] tw = Transpose(w) [first] a = MatMul(x, tw) r = Relu(a) [second] y = MatMul(r, tw) }"
)


def test_layers_that_share_a_transposed_weight_are_quantized_on_one_edge() -> None:
    placement = placed(SHARED)
    assert reasons(placement) == ["", ""]
    assert axes(placement) == {("w", 0): (Edge("t", 0),)}


def test_a_weight_that_two_layers_read_the_same_way_is_quantized_once() -> None:
    placement = placed(
        "g (float[4,32] x, float[32,32] w) => (float[4,32] y) { [a] h = MatMul(x, w) [b] y = MatMul(h, w) }"
    )
    assert axes(placement) == {("w", 1): (Edge("a", 1), Edge("b", 1))}


@pytest.mark.parametrize(
    "text",
    [
        "g (float[32,20] x, float[32,32] w) => (float[32,20] y) { y = MatMul(w, x) }",
        "g (float[4,8,32] x, float[4,32,32] w) => (float[4,8,32] y) { y = MatMul(x, w) }",
    ],
    ids=["weight first", "stack of matrices"],
)
@pytest.mark.parametrize("kind", ["int8", "int8-qoperator", "int8-dynamic", "int8-per-token"])
def test_weights_that_have_no_scales_per_channel_get_one(text: str, kind: str, tmp_path: Path) -> None:
    model = model_of(text, weights="w", scale=0.2)
    sizes = model.graph.inputs[0].shape
    assert sizes is not None
    batches = [{"x": np.random.default_rng(i).standard_normal(sizes.numpy()).astype(np.float32)} for i in range(4)]
    result = qonnx.quantize(model, batches, tmp_path / "q.onnx", recipe=kind, target="ort-cpu")
    assert [tensor.granularity for tensor in result.plan.weights] == [PerTensor()]
    assert result.comparison.outputs[0].sqnr_db > 30


def test_integers_are_no_candidates() -> None:
    placement = placed("g (int32[4,32] x, int32[32,32] z) => (int32[4,32] y) { y = MatMul(x, z) }")
    assert reasons(placement) == ["computes in int32"]
    assert candidates(placement) == ()


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


COMPILED = {
    "attention behind one projection": (FUSED, (), 1),
    "its result read in float": (FUSED, (Rule(Match(name="out"), skip=True),), 1),
    "its products in float": (FUSED, (Rule(Match(name="scores"), skip=True),), 0),
    "layers that share a weight": (SHARED, (), 0),
}


@pytest.mark.rtx
@pytest.mark.parametrize("name", COMPILED)
def test_the_compiler_runs_on_int8_what_is_placed(name: str, tmp_path: Path) -> None:
    text, rules, fused = COMPILED[name]
    model = model_of(text, weights="w w1 b", scale=0.1)
    shape = model.graph.inputs[0].shape
    assert shape is not None
    batches = [{"x": np.random.default_rng(0).standard_normal(shape.numpy()).astype(np.float32)}]
    plan = planned(model, batches, msgspec.structs.replace(load_recipe("int8-average"), rules=rules))
    assert len(plan.quantized_layers) == len(plan.layers) - len(rules) * (1 if fused else 2)
    InsertQDQ(plan)(model)
    save(model, tmp_path / "quantized.onnx")
    layers = build_engine(tmp_path / "quantized.onnx", tmp_path / "model.plan").layers
    assert all(node.int8 for node in int8_nodes(layers, [layer.node for layer in plan.quantized_layers]))
    assert sum("_mha_" in layer.name for layer in layers) == fused
