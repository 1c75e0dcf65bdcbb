"""The linear view: which axis of the stored weight is which, whatever stands in between."""

from typing import Any

import onnx_ir as ir
import pytest

from qonnx.linear import linear_of, linears
from tests.graphs import model_of


def graph_of(text: str, weights: str = "w b") -> ir.Graph:
    return model_of(text, weights=weights).graph


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "conv": (
        "g (float[1,4,8,8] x, float[6,4,1,1] w, float[6] b) => (float[1,6,8,8] y) { y = Conv(x, w, b) }",
        dict(output_axis=0, input_axis=1, inputs=4, outputs=6, bias="b"),
    ),
    "grouped conv": (
        "g (float[1,4,8,8] x, float[6,2,3,3] w) => (float[1,6,8,8] y) { y = Conv <group = 2> (x, w) }",
        dict(output_axis=0, input_axis=1, inputs=4, outputs=6, groups=2, kernel=(3, 3)),
    ),
    "conv transpose": (
        "g (float[1,4,8,8] x, float[4,3,1,1] w) => (float[1,6,8,8] y) { y = ConvTranspose <group = 2> (x, w) }",
        dict(output_axis=1, input_axis=0, inputs=4, outputs=6, groups=2),
    ),
    "gemm": (
        "g (float[2,4] x, float[4,6] w, float[6] b) => (float[2,6] y) { y = Gemm(x, w, b) }",
        dict(output_axis=1, input_axis=0, inputs=4, outputs=6, bias="b"),
    ),
    "gemm transB": (
        "g (float[2,4] x, float[6,4] w) => (float[2,6] y) { y = Gemm <transB = 1> (x, w) }",
        dict(output_axis=0, input_axis=1, inputs=4, outputs=6),
    ),
    "matmul and add": (
        "g (float[2,3,4] x, float[4,6] w, float[6] b) => (float[2,3,6] y) { a = MatMul(x, w) y = Add(b, a) }",
        dict(output_axis=1, input_axis=0, inputs=4, outputs=6, bias="b", output="y"),
    ),
    "matmul, weight first": (
        "g (float[4,5] x, float[6,4] w) => (float[6,5] y) { y = MatMul(w, x) }",
        dict(output_axis=0, input_axis=1, inputs=4, outputs=6, data_index=1),
    ),
    "batched matmul": (
        "g (float[7,2,4] x, float[7,4,6] w) => (float[7,2,6] y) { y = MatMul(x, w) }",
        dict(output_axis=2, input_axis=1, inputs=4, outputs=6),
    ),
    "weight behind transpose": (
        "g (float[2,4] x, float[6,4] w) => (float[2,6] y) { t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t) }",
        dict(output_axis=0, input_axis=1, inputs=4, outputs=6, reader="Transpose"),
    ),
    "weight behind transpose without perm": (
        "g (float[2,4] x, float[6,4] w) => (float[2,6] y) { t = Transpose(w) y = MatMul(x, t) }",
        dict(output_axis=0, input_axis=1, inputs=4, outputs=6, reader="Transpose"),
    ),
    "weight behind cast and identity": (
        "g (float[2,4] x, float16[4,6] w) => (float[2,6] y) { c = Cast <to = 1> (w) i = Identity(c) y = MatMul(x, i) }",
        dict(output_axis=1, input_axis=0, inputs=4, outputs=6, reader="Cast"),
    ),
    "tied embedding": (
        "g (int64[2] ids, float[6,4] w) => (float[2,6] y) { x = Gather(w, ids) t = Transpose(w) y = MatMul(x, t) }",
        dict(output_axis=0, input_axis=1, inputs=4, outputs=6, reader="Transpose"),
    ),
    "layers that share a transposed weight": (
        "g (float[2,4] x, float[4,4] w) => (float[2,4] y) { t = Transpose(w) a = MatMul(x, t) y = MatMul(a, t) }",
        dict(output_axis=0, input_axis=1, inputs=4, outputs=4, reader="Transpose"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sees_the_stored_weight(name: str) -> None:
    text, expected = CASES[name]
    linear, *_ = linears(graph_of(text))
    found = dict(
        output_axis=linear.output_axis,
        input_axis=linear.input_axis,
        inputs=linear.input_channels,
        outputs=linear.output_channels,
        groups=linear.groups,
        kernel=linear.kernel,
        bias=None if linear.bias is None else linear.bias.name,
        output=linear.output.name,
        data_index=linear.data_index,
        reader=linear.weight_reader[0].op_type,
    )
    assert {key: found[key] for key in expected} == expected
    assert linear.weight.name == "w"


LEAVES_ALONE = {
    "two activations": "g (float[2,4] x, float[4,6] z) => (float[2,6] y) { y = MatMul(x, z) }",
    "two constants": "g (float[1] x, float[2,4] b, float[4,6] w) => (float[2,6] y) { y = MatMul(b, w) }",
    "weight is a graph input": "g (float[2,4] x, float[4,6] z) => (float[2,6] y) { y = Gemm(x, z) }",
    "integer weight": "g (int32[2,4] x, int32[4,6] w) => (int32[2,6] y) { y = MatMul(x, w) }",
    "float64 weight": "g (double[2,4] x, double[4,6] w) => (double[2,6] y) { y = MatMul(x, w) }",
    "weight is computed": "g (float[2,4] x, float[4,6] w) => (float[2,6] y) { r = Relu(w) y = MatMul(x, r) }",
    "vector weight": "g (float[2,4] x, float[4] w) => (float[2] y) { y = MatMul(x, w) }",
    "another domain": "g (float[2,4] x, float[4,6] w) => (float[2,6] y) { y = com.example.MatMul(x, w) }",
    "its layers use it in different ways": "g (float[4,4] x, float[4,4] w) => (float[4,4] y, float[4,4] z) "
    "{ t = Transpose(w) y = Gemm(x, t) z = Gemm <transB = 1> (x, t) }",
    "weight and activation": "g (float[4,4] x, float[4,4] w) => (float[4,4] y, float[4,4] z) "
    "{ t = Transpose(w) y = MatMul(x, t) z = MatMul(t, x) }",
    "a subgraph reads the transposed weight": "g (bool c, float[4,4] x, float[4,4] w) => (float[4,4] y, float[4,4] z) "
    "{ t = Transpose(w) y = MatMul(x, t) z = If (c) <then_branch = a () => (float[4,4] i) { i = MatMul(x, t) }, "
    "else_branch = b () => (float[4,4] j) { j = Identity(x) }> }",
    "others read the transposed weight": "g (float[2,4] x, float[6,4] w) => (float[2,6] y, float[4,6] t) "
    "{ t = Transpose(w) y = MatMul(x, t) }",
}


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str) -> None:
    assert [linear_of(node) for node in graph_of(LEAVES_ALONE[name])] == [None] * len(graph_of(LEAVES_ALONE[name]))


def test_an_add_that_is_no_bias_is_not_taken_for_one() -> None:
    graph = graph_of(
        "g (float[2,3,4] x, float[2,3,6] r, float[4,6] w) => (float[2,3,6] y) { a = MatMul(x, w) y = Add(a, r) }"
    )
    (linear,) = linears(graph)
    assert linear.bias is None
    assert linear.output.name == "a"


def test_a_vector_added_behind_a_weight_that_comes_first_is_no_bias() -> None:
    graph = graph_of("g (float[4,4] x, float[4,4] w, float[4] b) => (float[4,4] y) { a = MatMul(w, x) y = Add(a, b) }")
    (linear,) = linears(graph)
    assert linear.bias is None
