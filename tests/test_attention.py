"""Attention in a graph: where its parts come from, what belongs together, and what only looks like it."""

import onnx_ir as ir
import pytest

from qonnx.attention import cut_edge, is_probability, projection, result, value_products, values_index
from tests.graphs import model_of

# Three projections' worth of features in one tensor, cut into parts that are moved and multiplied.
HEADER = "g (float[2,8,16] x, float[16,48] w, float[48] b, float[2,8,8] m, int64[4] heads) => (float[n] y, float[n] z) "


def graph_of(text: str) -> dict[str, ir.Node]:
    """Nodes by the name of their first output."""
    return {node.outputs[0].name or "": node for node in model_of(HEADER + text, weights="w b heads").graph}


CUT = {
    "a split": ("p, q, r = Split <axis = -1, num_outputs = 3> (x)", "q"),
    "a slice": ("q = Slice(x, heads, heads)", "q"),
    "a gather": ("q = Gather(x, heads)", "q"),
}


@pytest.mark.parametrize("name", CUT)
def test_an_operand_is_followed_to_where_it_was_cut(name: str) -> None:
    operator, value = CUT[name]
    nodes = graph_of(
        f"{{ {operator} c = Squeeze({value}) d = Reshape(c, heads) e = Transpose(d) f = Expand(e, heads) "
        "y = MatMul(f, m) }"
    )
    assert cut_edge(nodes["y"], 0) == (nodes["c"], 0)
    assert cut_edge(nodes["y"], 1) == (nodes["y"], 1)


NOT_CUT = {
    "nothing was cut": "{ e = Transpose(x) y = MatMul(e, m) }",
    "computed on the way": "{ q = Gather(x, heads) r = Relu(q) e = Transpose(r) y = MatMul(e, m) }",
    "read by others on the way": "{ q = Gather(x, heads) e = Transpose(q) z = Sigmoid(e) y = MatMul(e, m) }",
    "an output on the way": "{ q = Gather(x, heads) z = Transpose(q) y = MatMul(z, m) }",
    "cut by another domain": "{ q = com.example.Split(x) e = Transpose(q) y = MatMul(e, m) }",
    "an input": "{ y = MatMul(x, m) }",
}


@pytest.mark.parametrize("name", NOT_CUT)
def test_an_operand_that_cannot_be_rounded_earlier_stays_where_it_is(name: str) -> None:
    nodes = graph_of(NOT_CUT[name])
    assert cut_edge(nodes["y"], 0) == (nodes["y"], 0)


PROJECTED = {
    "bias first": "{ a = MatMul(x, w) c = Add(b, a) v = Gather(c, heads) }",
    "gemm": "{ a = Gemm(x, w, b) t = Transpose(a) u, v = Split <num_outputs = 2> (t) }",
    "nothing in between": "{ a = MatMul(x, w) v = Identity(a) }",
}


@pytest.mark.parametrize("name", PROJECTED)
def test_finds_the_projection_that_made_a_value(name: str) -> None:
    nodes = graph_of(PROJECTED[name])
    assert projection(list(nodes.values())[-1].outputs[-1]) is nodes["a"]


@pytest.mark.parametrize(
    "text",
    [
        "{ a = MatMul(x, w) v = Relu(a) }",
        "{ a = MatMul(x, w) c = MatMul(x, w) v = Add(a, c) }",
        "{ v = Transpose(x) }",
        "{ a = MatMul(x, w) v = com.example.Gather(a) }",
    ],
)
def test_other_values_have_no_projection(text: str) -> None:
    nodes = graph_of(text)
    assert projection(nodes["v"].outputs[0]) is None
    assert projection(None) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{ p = Softmax(x) }", True),
        ("{ s = Softmax(x) c = Cast <to = 1> (s) p = Transpose(c) }", True),
        ("{ s = Softmax(x) p = Slice(s, heads, heads) }", True),
        ("{ o = Constant <value = float {0.0}> () s = Softmax(x) n = IsNaN(s) p = Where(n, o, s) }", False),
        ("{ s = Softmax(x) p = Mul(s, s) }", False),
        ("{ s = Softmax(x) n = IsNaN(s) p = Where(n, x, s) }", False),
        ("{ p = LogSoftmax(x) }", False),
        ("{ p = com.example.Softmax(x) }", False),
    ],
)
def test_is_probability(text: str, expected: bool) -> None:
    nodes = graph_of(text)
    if "Constant" in text:  # what stands in for NaN has to be an initializer, as preparation makes it
        zero = nodes["p"].inputs[1]
        assert zero is not None
        zero.const_value = ir.tensor(0.0)
        expected = True
    assert is_probability(nodes["p"].outputs[0]) is expected


def test_the_two_products_of_each_attention_find_each_other() -> None:
    nodes = graph_of(
        "{ [one] a = MatMul(x, m) s = Softmax(a) [two] c = MatMul(s, x) [three] d = MatMul(x, s) "
        "[four] e = MatMul(x, m) r = Relu(e) t = Softmax(r) [five] f = MatMul(t, x) }"
    )
    assert value_products(nodes["a"]) == {"two", "three"}
    assert value_products(nodes["e"]) == frozenset()
    assert [values_index(nodes[name]) for name in "acdefs"] == [None, 1, 0, None, 1, None]


def test_a_weight_is_no_values() -> None:
    """A Softmax in front of a layer, as in a memory of learned slots, makes no attention."""
    text = (
        "g (float[4,8] x, float[8,4] m, float[4,6] w) => (float[4,6] y) "
        "{ a = MatMul(x, m) s = Softmax(a) [mix] y = MatMul(s, w) }"
    )
    for weights, values in (("", 1), ("w", None)):
        scores, _, mixed = model_of(text, weights=weights).graph
        assert values_index(mixed) == values
        assert value_products(scores) == (set() if weights else {"mix"})


def test_attention_with_a_sink_is_one() -> None:
    nodes = graph_of(
        "{ a = MatMul(x, m) k = Concat <axis = -1> (a, m) most = ReduceMax(k) s = Sub(k, most) t = Softmax(s) "
        "p = Slice(t, heads, heads) [mix] c = MatMul(p, x) }"
    )
    assert value_products(nodes["a"]) == {"mix"}
    assert values_index(nodes["c"]) == 1


def test_the_result_is_followed_to_what_reads_it() -> None:
    nodes = graph_of("{ a = MatMul(x, m) t = Transpose(a) r = Reshape(t, heads) c = Relu(r) d = MatMul(c, m) }")
    assert result(nodes["a"]) is nodes["r"].outputs[0]
    assert result(nodes["d"]) is None


def test_a_result_that_leaves_the_graph_is_taken_before_it_does() -> None:
    nodes = graph_of("{ a = MatMul(x, m) t = Transpose(a) z = Reshape(t, heads) y = MatMul(x, m) }")
    assert result(nodes["a"]) is nodes["t"].outputs[0]
    assert result(nodes["y"]) is None
