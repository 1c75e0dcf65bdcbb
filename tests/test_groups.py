"""Groups are found along edges, whatever stands between a producer and its linear layers; refusals say why."""

import re

import numpy as np
import onnx_ir as ir
import pytest

from qonnx.groups import Residual, SmoothGroup, find_groups
from qonnx.producers import Kind
from tests.graphs import model_of
from tests.smoothing import layers, prepared, rescale_everything

OPSETS = (17, 20, 21, 23, 24)
WEIGHTS = "w wq wk wv wo wu wg w1 w2 w3 g b bq bv bo b1 b2 slope"


def rms(opset: int, source: str, result: str) -> str:
    """RMSNormalization, spelled out below the opset that has it."""
    if opset >= 23:
        return f"{result} = RMSNormalization <axis = -1, epsilon = 0.00001> ({source}, g)"
    axes = "<axes = [-1], keepdims = 1> (sq)" if opset < 18 else "<keepdims = 1> (sq, last)"
    return (
        f"sq = Mul({source}, {source}) ms = ReduceMean {axes} me = Add(ms, eps) root = Sqrt(me) "
        f"un = Div({source}, root) {result} = Mul(g, un)"
    )


CONSTANTS = "float eps = {0.00001}, int64[1] last = {-1}"
HEADS = "int64[4] heads = {0, 0, 3, 4}, int64[3] whole = {0, 0, 12}"

# What every opset has: text -> (kind, weights of the linear layers, whether offsets pass) of each group.
FORMS: dict[str, tuple[str, list[tuple[Kind, list[str], bool]]]] = {
    "layer norm, three layers": (
        "g (float[2,N,8] x, float[8] g, float[8] b, float[8,6] wq, float[6] bq, float[8,4] wk, float[8,6] wv)"
        "=> (float[2,N,6] q, float[2,N,4] k, float[2,N,6] v)"
        "{ n = LayerNormalization(x, g, b) m = MatMul(n, wq) q = Add(bq, m) k = MatMul(n, wk) v = MatMul(n, wv) }",
        [(Kind.NORM, ["wq", "wk", "wv"], True)],
    ),
    "layer norm without bias, gemm": (
        "g (float[N,8] x, float[8] g, float[6,8] w1) => (float[N,6] y)"
        "{ n = LayerNormalization(x, g) y = Gemm <transB = 1, alpha = 0.5> (n, w1) }",
        [(Kind.NORM, ["w1"], True)],
    ),
    "layer norm through reshape, identity and dropout": (
        "g (float[2,N,8] x, float[8] g, float[8] b, float[8,6] w1) => (float[M,6] y) <int64[2] flat = {-1, 8}>"
        "{ n = LayerNormalization(x, g, b) i = Identity(n) d = Dropout(i) r = Reshape(d, flat) y = Gemm(r, w1) }",
        [(Kind.NORM, ["w1"], True)],
    ),
    "batch norm, relu, conv": (
        "g (float[2,4,6,6] x, float[4] g, float[4] b, float[4] b1, float[5,4,1,1] w1) => (float[2,5,6,6] y)"
        "<float[4] var = {1, 2, 0.5, 3}>"
        "{ n = BatchNormalization(x, g, b, b1, var) r = Relu(n) y = Conv(r, w1) }",
        [(Kind.NORM, ["w1"], True)],
    ),
    "instance norm, transposed to channels last": (
        "g (float[2,4,9] x, float[4] g, float[4] b, float[4,5] w1) => (float[2,9,5] y)"
        "{ n = InstanceNormalization(x, g, b) t = Transpose <perm = [0, 2, 1]> (n) y = MatMul(t, w1) }",
        [(Kind.NORM, ["w1"], True)],
    ),
    "scale and shift of its own": (
        "g (float[2,N,8] x, float[1,1,8] g, float b, float[8,6] w1) => (float[2,N,6] y)"
        "{ t = Tanh(x) m = Mul(g, t) a = Add(b, m) y = MatMul(a, w1) }",
        [(Kind.SCALING, ["w1"], True)],
    ),
    "scale of its own along the channels of an image": (
        "g (float[2,4,5,5] x, float[4,1,1] g, float[3,4,3,3] w1) => (float[2,3,3,3] y)"
        "{ t = Tanh(x) m = Mul(t, g) y = Conv(m, w1) }",
        [(Kind.SCALING, ["w1"], False)],
    ),
    "relu between gemms": (
        "g (float[N,8] x, float[8,6] w1, float[6] b1, float[4,6] w2, float[1,4] b2) => (float[N,4] y)"
        "{ h = Gemm <beta = 2.0> (x, w1, b1) r = Relu(h) y = Gemm <transB = 1, alpha = 2.0, beta = 0.5> (r, w2, b2) }",
        [(Kind.LINEAR, ["w2"], True)],
    ),
    "leaky relu and prelu": (
        "g (float[N,8] x, float[8,6] w1, float[6] slope, float[6,4] w2, float[4] b2, float[4,3] w3) => (float[N,3] y)"
        "{ h = MatMul(x, w1) p = PRelu(h, slope) m = MatMul(p, w2) a = Add(m, b2) l = LeakyRelu(a)"
        " y = MatMul(l, w3) }",
        [(Kind.LINEAR, ["w2"], False), (Kind.LINEAR, ["w3"], False)],
    ),
    "layer between two groups": (
        "g (float[2,N,8] x, float[8] g, float[8] b, float[8,6] w1, float[6] b1, float[6,4] w2, float[4,3] w3)"
        "=> (float[2,N,3] y)"
        "{ n = LayerNormalization(x, g, b) m = MatMul(n, w1) a = Add(m, b1) h = MatMul(a, w2) y = MatMul(h, w3) }",
        [(Kind.NORM, ["w1"], True), (Kind.LINEAR, ["w2"], True), (Kind.LINEAR, ["w3"], True)],
    ),
    "depthwise separable": (
        "g (float[2,3,8,8] x, float[6,3,1,1] w1, float[6] b1, float[6,1,3,3] w2, float[6] b2, float[4,6,1,1] w3)"
        "=> (float[2,4,6,6] y)"
        "{ c = Conv(x, w1, b1) r = Relu(c) d = Conv <group = 6> (r, w2, b2) s = Relu(d) y = Conv(s, w3) }",
        [(Kind.LINEAR, ["w2"], True), (Kind.LINEAR, ["w3"], True)],
    ),
    "grouped convolutions": (
        "g (float[2,4,8] x, float[6,2,3] w1, float[4,3,3] w2, float[4,3,2] w3) => (float[2,6,5] y)"
        "{ c = Conv <group = 2> (x, w1) d = Conv <group = 2> (c, w2) y = ConvTranspose <group = 2> (d, w3) }",
        [(Kind.LINEAR, ["w2"], True), (Kind.LINEAR, ["w3"], False)],
    ),
    "transposed convolution makes the channels": (
        "g (float[2,4,5] x, float[4,3,2] w1, float[6] b1, float[5,6,1] w2) => (float[2,5,6] y)"
        "{ c = ConvTranspose <group = 2> (x, w1, b1) y = Conv(c, w2) }",
        [(Kind.LINEAR, ["w2"], True)],
    ),
    "pooled and flattened": (
        "g (float[2,3,8,8] x, float[5,3,3,3] w1, float[5] b1, float[20,4] w2) => (float[2,4] y)"
        "{ c = Conv(x, w1, b1) p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)"
        "  q = AveragePool <kernel_shape = [2, 2]> (p) f = Flatten(q) y = Gemm(f, w2) }",
        [(Kind.LINEAR, ["w2"], True)],
    ),
    "one pixel": (
        "g (float[2,3,8,8] x, float[5,3,3,3] w1, float[5,4] w2) => (float[2,4] y)"
        "{ c = Conv(x, w1) p = GlobalAveragePool(c) f = Flatten(p) y = Gemm(f, w2) }",
        [(Kind.LINEAR, ["w2"], True)],
    ),
    "channels of two convolutions side by side": (
        "g (float[2,3,5] x, float[4,3,1] w1, float[6,3,1] w2, float[5,10,1] w3) => (float[2,5,5] y)"
        "{ a = Conv(x, w1) b = Conv(x, w2) c = Concat <axis = 1> (a, b) y = Conv(c, w3) }",
        [(Kind.LINEAR, ["w3"], True), (Kind.LINEAR, ["w3"], True)],
    ),
    "first token": (
        "g (float[2,5,8] x, float[8] g, float[8] b, float[8,6] w1) => (float[2,6] y)"
        "{ n = LayerNormalization(x, g, b) i = Constant <value_int = 0> () t = Gather <axis = 1> (n, i)"
        " y = Gemm(t, w1) }",
        [(Kind.NORM, ["w1"], True)],
    ),
    "some of the channels, some of them twice": (
        "g (float[3,8] x, float[8] g, float[8] b, float[4,6] w1, float[3,6] w2) => (float[3,6] y, float[3,6] z)"
        "<int64[1] start = {2}, int64[1] end = {9999}, int64[1] axis = {-1}, int64[1] two = {2},"
        " int64[4] four = {0, 2, 4, 4}, int64[3] three = {7, 1, 1}>"
        "{ n = LayerNormalization(x, g, b) c = Slice(n, start, end, axis, two) c2 = Concat <axis = 1> (c, c)"
        "  i = Gather <axis = 1> (c2, four) y = MatMul(i, w1) p = Gather <axis = 1> (n, three) z = MatMul(p, w2) }",
        [(Kind.NORM, ["w1", "w2"], True)],
    ),
    "gated": (
        "g (float[2,N,8] x, float[8,6] wg, float[8,6] wu, float[6,8] w2) => (float[2,N,8] y)"
        "{ a = MatMul(x, wg) s = Sigmoid(a) h = Mul(a, s) u = MatMul(x, wu) p = Mul(h, u) y = MatMul(p, w2) }",
        [(Kind.LINEAR, ["w2"], False)],
    ),
    "values through attention": (
        "g (float[2,N,8] x, float[8,12] wq, float[8,12] wk, float[8,12] wv, float[12] bv, float[12,8] wo)"
        f"=> (float[2,N,8] y) <{HEADS}>"
        "{ q = MatMul(x, wq) q1 = Reshape(q, heads) q2 = Transpose <perm = [0, 2, 1, 3]> (q1)"
        "  k = MatMul(x, wk) k1 = Reshape(k, heads) k2 = Transpose <perm = [0, 2, 3, 1]> (k1)"
        "  v = MatMul(x, wv) v0 = Add(v, bv) v1 = Reshape(v0, heads) v2 = Transpose <perm = [0, 2, 1, 3]> (v1)"
        "  s = MatMul(q2, k2) p = Softmax <axis = -1> (s) o = MatMul(p, v2)"
        "  o1 = Transpose <perm = [0, 2, 1, 3]> (o) o2 = Reshape(o1, whole) y = MatMul(o2, wo) }",
        [(Kind.LINEAR, ["wo"], True)],
    ),
    "values in one product with queries and keys": (
        "g (float[2,N,8] x, float[8,36] w1, float[36] b1, float[12,8] wo)"
        f"=> (float[2,N,8] y) <{HEADS}, int64[3] parts = {{12, 12, 12}}>"
        "{ m = MatMul(x, w1) a = Add(m, b1) q, k, v = Split <axis = -1> (a, parts)"
        "  q1 = Reshape(q, heads) q2 = Transpose <perm = [0, 2, 1, 3]> (q1)"
        "  k1 = Reshape(k, heads) k2 = Transpose <perm = [0, 2, 3, 1]> (k1)"
        "  v1 = Reshape(v, heads) v2 = Transpose <perm = [0, 2, 1, 3]> (v1)"
        "  s = MatMul(q2, k2) p = Softmax <axis = -1> (s) o = MatMul(p, v2)"
        "  o1 = Transpose <perm = [0, 2, 1, 3]> (o) o2 = Reshape(o1, whole) y = MatMul(o2, wo) }",
        [(Kind.LINEAR, ["wo"], True)],
    ),
    "values of shared heads": (
        "g (float[2,N,8] x, float[2,6,N,N] s, float[8,12] wv, float[24,8] wo) => (float[2,N,8] y)"
        "<int64[4] heads = {0, 0, 3, 4}, int64[1] two = {2}, int64[5] times = {1, 1, 2, 1, 1},"
        " int64[4] six = {0, 6, -1, 4}, int64[3] whole = {0, 0, 24}>"
        "{ v = MatMul(x, wv) v1 = Reshape(v, heads) v2 = Transpose <perm = [0, 2, 1, 3]> (v1)"
        "  v3 = Unsqueeze(v2, two) v4 = Expand(v3, times) v5 = Reshape(v4, six)"
        "  p = Softmax(s) o = MatMul(p, v5) o1 = Transpose <perm = [0, 2, 1, 3]> (o) o2 = Reshape(o1, whole)"
        "  y = MatMul(o2, wo) }",
        [(Kind.LINEAR, ["wo"], True)],
    ),
    "tokens mixed by a weight": (
        "g (float[2,5,8] x, float[8] g, float[8] b, float[7,5] w1, float[8,3] w2) => (float[2,7,3] y)"
        "{ n = LayerNormalization(x, g, b) t = MatMul(w1, n) y = MatMul(t, w2) }",
        [(Kind.NORM, ["w2"], False)],
    ),
    "weights on the left": (
        "g (float[2,5,8] x, float[7,5] w1, float[3,7] w2) => (float[2,3,8] y){ t = MatMul(w1, x) y = MatMul(w2, t) }",
        [(Kind.LINEAR, ["w2"], False)],
    ),
    "a weight per batch": (
        "g (float[2,5,8] x, float[2,8,6] w1, float[2,6,4] w2) => (float[2,5,4] y)"
        "{ t = MatMul(x, w1) y = MatMul(t, w2) }",
        [(Kind.LINEAR, ["w2"], False)],
    ),
    "average over tokens": (
        "g (float[2,5,8] x, float[8] g, float[8] b, float[8,6] w1) => (float[2,6] y)"
        "{ n = LayerNormalization(x, g, b) t = Transpose <perm = [0, 2, 1]> (n) a = GlobalAveragePool(t)"
        "  f = Flatten(a) y = Gemm(f, w1) }",
        [(Kind.NORM, ["w1"], True)],
    ),
    "resized, padded by reflection": (
        "g (float[1,3,4,4] x, float[5,3,1,1] w1, float[4,5,3,3] w2) => (float[1,4,8,8] y)"
        "<float[4] scales = {1, 1, 2, 2}, int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}>"
        '{ c = Conv(x, w1) r = Resize <mode = "linear"> (c, , scales) p = Pad <mode = "reflect"> (r, pads)'
        "  y = Conv(p, w2) }",
        [(Kind.LINEAR, ["w2"], True)],
    ),
}


def unnamed(reason: str) -> str:
    """A reason without the names of nodes."""
    return re.sub(r" '[^']*'", "", reason)


def summary(groups: tuple[SmoothGroup, ...]) -> list[tuple[Kind, list[str], bool]]:
    return [(group.producer.kind, layers(group), not group.no_shift) for group in groups if not group.reason]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("form", FORMS)
def test_form(form: str, opset: int) -> None:
    text, expected = FORMS[form]
    model = prepared(text, WEIGHTS, opset)
    assert summary(rescale_everything(model)) == expected


@pytest.mark.parametrize("opset", OPSETS)
def test_rms_norm_takes_factors_only(opset: int) -> None:
    text = (
        "g (float[2,N,8] x, float[8] g, float[8,6] w1, float[8,6] w2) => (float[2,N,6] y, float[2,N,6] z)"
        f"<{CONSTANTS}> {{ {rms(opset, 'x', 'n')} y = MatMul(n, w1) z = MatMul(n, w2) }}"
    )
    assert summary(rescale_everything(prepared(text, WEIGHTS, opset))) == [(Kind.NORM, ["w1", "w2"], False)]


def test_spelled_out_layer_norm_below_opset_17() -> None:
    text = (
        "g (float[2,N,8] x, float[8] g, float[8] b, float[8,6] w1) => (float[2,N,6] y) <float eps = {0.00001}>"
        "{ mean = ReduceMean <axes = [-1]> (x) c = Sub(x, mean) sq = Mul(c, c) var = ReduceMean <axes = [-1]> (sq)"
        "  e = Add(var, eps) root = Sqrt(e) d = Div(c, root) m = Mul(d, g) n = Add(m, b) y = MatMul(n, w1) }"
    )
    assert summary(rescale_everything(prepared(text, WEIGHTS, 13))) == [(Kind.NORM, ["w1"], True)]


MICROSOFT = {
    "simplified": ("n = SimplifiedLayerNormalization <axis = -1, epsilon = 0.00001> (x, g)", False),
    "skip": ("n, p, q, s = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> (x, x, g, b)", True),
    "skip without bias": ("n = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> (x, x, g)", True),
    "skip simplified": ("n = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.00001> (x, x, g)", False),
}


@pytest.mark.parametrize("norm", MICROSOFT)
def test_norms_of_onnx_runtime(norm: str) -> None:
    node, shifts = MICROSOFT[norm]
    text = (
        f"g (float[2,3,8] x, float[8] g, float[8] b, float[8,6] w1) => (float[2,3,6] y) {{ {node} y = MatMul(n, w1) }}"
    )
    model = model_of(text, weights=WEIGHTS)
    model.opset_imports["com.microsoft"] = 1
    normalised = model.graph[0].outputs[0]
    normalised.type, normalised.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2, 3, 8])
    assert summary(rescale_everything(model, check=False)) == [(Kind.NORM, ["w1"], shifts)]


ATTENTIONS = {
    "three axes, shared heads": (
        "g (float[2,5,8] x, float[2,5,24] q, float[2,5,12] k, float[8,12] wv, float[12] bv, float[24,8] wo)"
        "=> (float[2,5,8] y)"
        "{ m = MatMul(x, wv) v = Add(m, bv) a = Attention <q_num_heads = 6, kv_num_heads = 3> (q, k, v)"
        "  y = MatMul(a, wo) }"
    ),
    "four axes, shared heads": (
        f"g (float[2,5,8] x, float[2,6,5,4] q, float[2,3,5,4] k, float[8,12] wv, float[24,8] wo) => (float[2,5,8] y)"
        f"<{HEADS}, int64[3] joined = {{0, 0, 24}}>"
        "{ m = MatMul(x, wv) r = Reshape(m, heads) v = Transpose <perm = [0, 2, 1, 3]> (r) a = Attention(q, k, v)"
        "  t = Transpose <perm = [0, 2, 1, 3]> (a) j = Reshape(t, joined) y = MatMul(j, wo) }"
    ),
    "four axes, a head each": (
        f"g (float[2,5,8] x, float[2,3,5,4] q, float[2,3,5,4] k, float[8,12] wv, float[12,8] wo) => (float[2,5,8] y)"
        f"<{HEADS}>"
        "{ m = MatMul(x, wv) r = Reshape(m, heads) v = Transpose <perm = [0, 2, 1, 3]> (r) a = Attention(q, k, v)"
        "  t = Transpose <perm = [0, 2, 1, 3]> (a) j = Reshape(t, whole) y = MatMul(j, wo) }"
    ),
}


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("form", ATTENTIONS)
def test_values_through_the_attention_operator(form: str, opset: int) -> None:
    model = prepared(ATTENTIONS[form], WEIGHTS, opset)
    assert summary(rescale_everything(model)) == [(Kind.LINEAR, ["wo"], True)]


EXPLICIT = (
    "q1 = Reshape(q, heads) q2 = Transpose <perm = [0, 2, 1, 3]> (q1)"
    " k1 = Reshape(k, heads) k2 = Transpose <perm = [0, 2, 3, 1]> (k1)"
    " v1 = Reshape(v, heads) v2 = Transpose <perm = [0, 2, 1, 3]> (v1)"
    " s = MatMul(q2, k2) p = Softmax <axis = -1> (s) o = MatMul(p, v2)"
    " o1 = Transpose <perm = [0, 2, 1, 3]> (o) a = Reshape(o1, whole)"
)
OPERATOR = "a = Attention <q_num_heads = 3, kv_num_heads = 3, is_causal = 1> (q, k, v)"
ATTENTION = [*((opset, EXPLICIT) for opset in OPSETS), (23, OPERATOR), (24, OPERATOR)]
BLOCK_INPUTS = (
    "float[2,5,8] x, float[8] g, float[8] b, float[8,12] wq, float[8,12] wk, float[8,12] wv, float[12] bv,"
    "float[8,36] w1, float[36] b1, float[12,8] wo"
)


@pytest.mark.parametrize(("opset", "attention"), ATTENTION)
@pytest.mark.parametrize("rms_norm", [False, True], ids=["layer norm", "rms norm"])
def test_a_norm_and_the_values_behind_it(opset: int, attention: str, rms_norm: bool) -> None:
    norm = rms(opset, "x", "n") if rms_norm else "n = LayerNormalization(x, g, b)"
    text = (
        f"g ({BLOCK_INPUTS}) => (float[2,5,8] z) <{HEADS}, {CONSTANTS}>"
        f"{{ {norm} q = MatMul(n, wq) k = MatMul(n, wk) m = MatMul(n, wv) v = Add(m, bv) {attention}"
        "  y = MatMul(a, wo) z = Add(x, y) }"
    )
    assert summary(rescale_everything(prepared(text, WEIGHTS, opset))) == [
        (Kind.NORM, ["wq", "wk", "wv"], not rms_norm),
        (Kind.LINEAR, ["wo"], True),
    ]


@pytest.mark.parametrize(("opset", "attention"), ATTENTION)
def test_only_the_values_of_a_common_product_are_free(opset: int, attention: str) -> None:
    text = (
        f"g ({BLOCK_INPUTS}) => (float[2,5,8] y) <{HEADS}, int64[3] parts = {{12, 12, 12}}>"
        "{ m = MatMul(x, w1) c = Add(m, b1) q, k, v = Split <axis = -1> (c, parts)"
        f" {attention} y = MatMul(a, wo) }}"
    )
    (group,) = [group for group in rescale_everything(prepared(text, WEIGHTS, opset)) if not group.reason]
    assert group.free.tolist() == [False] * 24 + [True] * 12
    np.testing.assert_array_equal(group.consumers[0].index, np.arange(24, 36))


# Where the Attention operator reads a tensor, and why that tensor has no factors then.
HEADS_OF_TWO = "Attention <q_num_heads = 2, kv_num_heads = 2>"
NO_VALUES = {
    "queries": (f"a = {HEADS_OF_TWO} (n, x, x)", "sums over its channels against an activation"),
    "mask": (f"a = {HEADS_OF_TWO} (x, x, x, n)", "is not linear in every channel"),
    "kept for later": (f"a, nk, nv = {HEADS_OF_TWO} (x, x, n)", "keeps it in a cache"),
    "behind what was kept": (f"a = {HEADS_OF_TWO} (x, x, n, , k, v)", "keeps it in a cache"),
    "unknown heads": ("a = Attention <q_num_heads = 2> (x, x, n)", "has an unknown number of heads"),
}


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("case", NO_VALUES)
def test_refused_by_the_attention_operator(case: str, opset: int) -> None:
    attention, reason = NO_VALUES[case]
    text = (
        "g (float[2,8,8] x, float[2,2,8,4] k, float[2,2,8,4] v, float[8] g, float[8] b, float[8,6] w1)"
        f"=> (float[2,8,6] y, float[2,8,8] a{', float[2,2,8,4] nv' * ('nv' in attention)})"
        f"{{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) [attend] {attention} }}"
    )
    (group,) = find_groups(prepared(text, WEIGHTS, opset))
    assert group.reason == f"Attention 'attend' {reason}"


def test_which_input_of_a_layer_each_value_is() -> None:
    (group,) = find_groups(prepared(FORMS["values in one product with queries and keys"][0], WEIGHTS))[-1:]
    assert group.inputs["o2"][0] == 2
    np.testing.assert_array_equal(group.inputs["o2"][1], np.arange(24, 36))


def test_heads_that_serve_several_queries_share_a_factor() -> None:
    (group,) = [g for g in find_groups(prepared(FORMS["values of shared heads"][0], WEIGHTS)) if not g.reason]
    heads = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(group.consumers[0].index, np.repeat(heads, 2, axis=0).reshape(-1))


# Of everything that cannot be followed: a graph, and what its first group says.
NORM = "float[2,3,8] x, float[8] g, float[8] b, float[8,6] w1"
REFUSED: dict[str, tuple[str, str]] = {
    "residual": (
        f"g ({NORM}) => (float[2,3,6] y, float[2,3,8] z)"
        "{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) z = Add(x, n) }",
        "Add adds something else to it",
    ),
    "two residuals": (
        f"g ({NORM}) => (float[2,3,6] y, float[2,3,8] z, float[2,3,8] t)"
        "{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) z = Sub(x, n) t = Tanh(n) }",
        "Sub adds something else to it, and 1 more",
    ),
    "output of the model": (
        f"g ({NORM}) => (float[2,3,6] y, float[2,3,8] n) {{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) }}",
        "n is an output of the model",
    ),
    "behind a Gelu": (
        "g (float[3,8] x, float[8,6] w1, float[6,4] w2) => (float[3,4] y)"
        "{ h = MatMul(x, w1) e = Gelu(h) y = MatMul(e, w2) }",
        "is made by Gelu, which cannot absorb factors",
    ),
    "an input of the model": (
        "g (float[3,8] x, float[8,6] w1) => (float[3,6] y) { y = MatMul(x, w1) }",
        "x is an input of the model, which cannot absorb factors",
    ),
    "times itself": (
        "g (float[3,8] x, float[8,6] w1, float[6,4] w2) => (float[3,4] y, float[3,4] z)"
        "{ h = MatMul(x, w1) s = Mul(h, h) y = MatMul(s, w2) z = MatMul(h, w2) }",
        "Mul combines it with itself",
    ),
    "times itself on two ways": (
        "g (float[3,8] x, float[8,6] w1, float[6,4] w2) => (float[3,4] y, float[3,4] z)"
        "{ h = MatMul(x, w1) r = Relu(h) s = Mul(h, r) y = MatMul(s, w2) z = MatMul(h, w2) }",
        "Mul combines it with itself",
    ),
    "divisor": (
        f"g ({NORM}) => (float[2,3,6] y, float[2,3,8] z)"
        "{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) z = Div(x, n) }",
        "Div divides by it",
    ),
    "scores": (
        f"g ({NORM}, float[2,8,3] k) => (float[2,3,6] y, float[2,3,3] z)"
        "{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) z = MatMul(n, k) }",
        "MatMul sums over its channels against an activation",
    ),
    "inside a body": (
        f"g ({NORM}, bool c) => (float[2,3,6] y, float[2,3,8] z)"
        "{ n = LayerNormalization(x, g, b) y = MatMul(n, w1)"
        "  z = If (c) <then_branch = t () => (float[2,3,8] p) { p = Tanh(n) },"
        "           else_branch = e () => (float[2,3,8] q) { q = Identity(x) }> }",
        "reads it inside a body",
    ),
    "integers": (
        f"g ({NORM}) => (float[2,3,6] y, int32[2,3,8] z)"
        "{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) z = Cast <to = 6> (n) }",
        "Cast makes integers of it",
    ),
    "channels merged with tokens": (
        f"g ({NORM}) => (float[2,3,6] y, float[6,8] z) <int64[2] s = {{-1, 8}}, int64[2] t = {{8, 6}}>"
        "{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) r = Transpose <perm = [0, 2, 1]> (n) k = Reshape(r, t)"
        "  q = Transpose(k) z = Softmax(q) }",
        "Softmax normalises it",
    ),
    "sum over tokens against a weight": (
        "g (float[2,8,8] x, float[8] g, float[8] b, float[8,8] w1, float[8,8] w2) => (float[2,8,8] y, float[2,8,8] z)"
        "{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) t = Transpose <perm = [0, 2, 1]> (n) u = MatMul(t, w2)"
        "  z = Exp(u) }",
        "Exp is not linear in every channel",
    ),
    "reduced over channels": (
        f"g ({NORM}) => (float[2,3,6] y, float[2,3] z)"
        "{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) z = ReduceMax <axes = [-1], keepdims = 0> (n) }",
        "ReduceMax reduces over channels",
    ),
    "picked at run time": (
        f"g ({NORM}, int64[2] i) => (float[2,3,6] y, float[2,3,2] z)"
        "{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) z = Gather <axis = -1> (n, i) }",
        "Gather picks channels that are not constant",
    ),
    "cut at run time": (
        f"g ({NORM}, int64[1] i, int64[1] a) => (float[2,3,6] y, float[2,3,K] z)"
        "{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) z = Slice(n, i, i, a) }",
        "Slice cuts along an axis that is not constant",
    ),
    "padded channels": (
        f"g ({NORM}) => (float[2,3,6] y, float[2,3,9] z) <int64[6] p = {{0, 0, 0, 0, 0, 1}}>"
        "{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) z = Pad(n, p) }",
        "Pad pads the channels",
    ),
    "another domain": (
        f"g ({NORM}) => (float[2,3,6] y, float[2,3,8] z)"
        "{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) z = com.example.Strange(n) }",
        "Strange is an operator of com.example",
    ),
    "a weight that is computed": (
        f"g ({NORM}, float[8,6] v) => (float[2,3,6] y, float[2,3,6] z)"
        "{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) z = MatMul(n, v) }",
        "MatMul sums over its channels against an activation",
    ),
    "scale of one element": (
        "g (float[2,3,8] x, float[1] g, float[8,6] w1) => (float[2,3,6] y)"
        "{ n = LayerNormalization(x, g) y = MatMul(n, w1) }",
        "n is made by LayerNormalization, which cannot absorb factors",
    ),
    "scale that a caller may override": (
        "g (float[2,3,8] x, float[8] f, float[8,6] w1) => (float[2,3,6] y)"
        "{ n = LayerNormalization(x, f) y = MatMul(n, w1) }",
        "n is made by LayerNormalization, which cannot absorb factors",
    ),
    "bias that is computed": (
        "g (float[2,3,8] x, float[8] g, float[8] f, float[8,6] w1) => (float[2,3,6] y)"
        "{ n = LayerNormalization(x, g, f) y = MatMul(n, w1) }",
        "n is made by LayerNormalization, which cannot absorb factors",
    ),
    "gemm with a bias per row": (
        "g (float[3,8] x, float[8,6] w1, float[3,1] b, float[6,4] w2) => (float[3,4] y)"
        "{ h = Gemm(x, w1, b) y = MatMul(h, w2) }",
        "h is made by Gemm, which cannot absorb factors",
    ),
    "scalar factor": (
        "g (float[3,8] x, float g, float[8,4] w2) => (float[3,4] y) { t = Tanh(x) h = Mul(t, g) y = MatMul(h, w2) }",
        "h is made by Mul, which cannot absorb factors",
    ),
    "factor along two axes": (
        "g (float[2,3,8] x, float[3,8] g, float[8,4] w2) => (float[2,3,4] y)"
        "{ t = Tanh(x) h = Mul(t, g) y = MatMul(h, w2) }",
        "h is made by Mul, which cannot absorb factors",
    ),
    "layer norm over two axes": (
        "g (float[2,3,8] x, float[3,8] g, float[8,4] w2) => (float[2,3,4] y)"
        "{ h = LayerNormalization <axis = 1> (x, g) y = MatMul(h, w2) }",
        "h is made by LayerNormalization, which cannot absorb factors",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_its_reason(case: str) -> None:
    text, reason = REFUSED[case]
    model = prepared(text, WEIGHTS)
    before = ir.to_onnx_text(model)
    reasons = [unnamed(group.reason) for group in find_groups(model)]
    assert any(reason in found for found in reasons), reasons
    assert all(reasons[:1])
    assert ir.to_onnx_text(model) == before


# Groups that take factors and no offsets: a graph, and why.
SCALE_ONLY: dict[str, tuple[str, str]] = {
    "convolution that pads": (
        "g (float[2,3,6] x, float[5,3,1] w1, float[4,5,3] w2) => (float[2,4,6] y)"
        "{ c = Conv(x, w1) y = Conv <pads = [1, 1]> (c, w2) }",
        "Conv pads with zeros",
    ),
    "convolution that pads by itself": (
        "g (float[2,3,6] x, float[5,3,1] w1, float[4,5,3] w2) => (float[2,4,6] y)"
        '{ c = Conv(x, w1) y = Conv <auto_pad = "SAME_UPPER"> (c, w2) }',
        "Conv pads with zeros",
    ),
    "average that counts padding": (
        "g (float[2,3,6] x, float[5,3,1] w1, float[4,5,3] w2) => (float[2,4,5] y)"
        "{ c = Conv(x, w1) d = AveragePool <kernel_shape = [2], pads = [1, 1], count_include_pad = 1> (c)"
        "  y = Conv(d, w2) }",
        "AveragePool averages zeros of the padding too",
    ),
    "transposed convolution": (
        "g (float[2,3,6] x, float[5,3,1] w1, float[5,4,3] w2) => (float[2,4,8] y)"
        "{ c = Conv(x, w1) y = ConvTranspose(c, w2) }",
        "ConvTranspose adds up fewer terms at the border",
    ),
    "bias that is computed": (
        "g (float[3,8] x, float[8,6] w1, float[6,4] w2, float[4] f) => (float[3,4] y)"
        "{ h = MatMul(x, w1) y = Gemm(h, w2, f) }",
        "Gemm has a bias that is not constant",
    ),
    "no softmax": (
        "g (float[2,3,8] x, float[2,3,3] p, float[8,6] w1, float[6,4] w2) => (float[2,3,4] y)"
        "{ h = MatMul(x, w1) o = MatMul(p, h) y = MatMul(o, w2) }",
        "MatMul sums up offsets",
    ),
    "softmax along another axis": (
        "g (float[2,3,8] x, float[2,3,3] s, float[8,6] w1, float[6,4] w2) => (float[2,3,4] y)"
        "{ h = MatMul(x, w1) p = Softmax <axis = 1> (s) o = MatMul(p, h) y = MatMul(o, w2) }",
        "MatMul sums up offsets",
    ),
    "gate beside a pooled branch": (
        "g (float[2,3,4,4] x, float[5,3,1,1] w1, float[5,5,1,1] w2, float[4,5,1,1] w3) => (float[2,4,4,4] y)"
        "{ c = Conv(x, w1) p = GlobalAveragePool(c) q = Conv(p, w2) s = Sigmoid(q) m = Mul(c, s) y = Conv(m, w3) }",
        "Mul multiplies it by something else",
    ),
    "sum over tokens": (
        "g (float[2,5,8] x, float[8] g, float[8,6] w1) => (float[2,6] y) <int64[1] one = {1}>"
        "{ n = LayerNormalization(x, g) s = ReduceSum <keepdims = 0> (n, one) y = Gemm(s, w1) }",
        "ReduceSum sums up offsets",
    ),
}


@pytest.mark.parametrize("case", SCALE_ONLY)
def test_factors_without_offsets(case: str) -> None:
    text, reason = SCALE_ONLY[case]
    groups = [group for group in rescale_everything(prepared(text, WEIGHTS)) if not group.reason]
    assert reason in [unnamed(group.no_shift) for group in groups]


def test_offsets_without_factors_behind_a_clip() -> None:
    text = (
        "g (float[2,3,6] x, float[5,3,1] w1, float[4,5,3] w2) => (float[2,4,4] y) <float low = {0}, float high = {1}>"
        "{ c = Conv(x, w1) d = Clip(c, low, high) y = Conv(d, w2) }"
    )
    group = rescale_everything(prepared(text, WEIGHTS))[-1]
    assert (unnamed(group.no_scale), group.no_shift) == ("Clip has one bound for all channels", "")
    assert [node.op_type for node, _ in group.clips] == ["Clip"]


def test_one_sided_clip_and_relu_in_a_row() -> None:
    text = (
        "g (float[2,3,6] x, float[5,3,1] w1, float[4,5,3] w2) => (float[2,4,4] y) <float high = {1}>"
        "{ c = Conv(x, w1) d = Clip(c, , high) r = Relu(d) y = Conv(r, w2) }"
    )
    group = rescale_everything(prepared(text, WEIGHTS))[-1]
    assert len(group.clips) == 2


def test_bounds_that_are_computed() -> None:
    text = (
        "g (float[2,3,6] x, float high, float[5,3,1] w1, float[4,5,3] w2) => (float[2,4,4] y)"
        "{ c = Conv(x, w1) d = Clip(c, , high) y = Conv(d, w2) }"
    )
    for bounds in (False, True):
        group = find_groups(prepared(text, WEIGHTS), bounds=bounds)[-1]
        assert [unnamed(group.reason), unnamed(group.no_shift)] == ["Clip has bounds that are not constant"] * 2


def test_the_nearer_of_two_producers() -> None:
    text = (
        "g (float[3,8] x, float[8,6] w1, float[6] g, float[6,4] w2) => (float[3,4] y)"
        "{ h = MatMul(x, w1) m = Mul(h, g) y = MatMul(m, w2) }"
    )
    assert summary(rescale_everything(prepared(text, WEIGHTS))) == [(Kind.SCALING, ["w2"], False)]


def test_a_refused_producer_leaves_its_layers_to_the_next() -> None:
    text = (
        "g (float[3,8] x, float[8,6] w1, float[8,6] w3, float[6,4] w2) => (float[3,4] y)"
        "{ a = MatMul(x, w1) b = MatMul(x, w3) t = Tanh(b) m = Mul(a, b) n = Mul(m, t) y = MatMul(n, w2) }"
    )
    assert summary(rescale_everything(prepared(text, WEIGHTS))) == [(Kind.LINEAR, ["w2"], False)]


POST_NORM = (
    "g (float[2,N,8] x, float[8] g, float[8] b, float[8,8] w1, float[8] b1, float[8,8] w2)"
    "=> (float[2,N,8] y, float[2,N,8] z)"
    "{ n = LayerNormalization(x, g, b) m = MatMul(n, w1) a = Add(m, b1) y = Add(a, n) t = Tanh(n) z = MatMul(t, w2) }"
)


def test_residual_connections_get_one_mul_and_add() -> None:
    model = prepared(POST_NORM, WEIGHTS)
    assert summary(find_groups(model)) == []
    groups = rescale_everything(model, Residual.MUL)
    assert summary(groups) == [(Kind.NORM, ["w1"], True)]
    assert sorted(node.op_type for node in model.graph) == sorted(
        ["LayerNormalization", "MatMul", "Add", "Add", "Tanh", "MatMul", "Mul", "Add"]
    )


def test_outputs_of_the_model_stay_refused() -> None:
    text, reason = REFUSED["output of the model"]
    groups = rescale_everything(prepared(text, WEIGHTS), Residual.MUL)
    assert [group.reason for group in groups] == [reason]


def test_explicit_operators_where_nothing_absorbs() -> None:
    model = prepared(REFUSED["behind a Gelu"][0], WEIGHTS)
    assert summary(rescale_everything(model, explicit=True)) == [
        (Kind.NONE, ["w1"], True),
        (Kind.NONE, ["w2"], True),
    ]
    kinds = [node.op_type for node in model.graph]
    assert (kinds.count("Sub"), kinds.count("Mul")) == (2, 2)


def test_float16_behind_a_cast() -> None:
    text = (
        "g (float[2,3,8] x, float[8] g, float[8] b, float16[8,6] w1) => (float16[2,3,6] y)"
        "{ n = LayerNormalization(x, g, b) h = Cast <to = 10> (n) y = MatMul(h, w1) }"
    )
    assert summary(rescale_everything(prepared(text, WEIGHTS), rtol=3e-3)) == [(Kind.NORM, ["w1"], True)]


@pytest.mark.parametrize(
    ("rest", "result"),
    [
        ("s = Squeeze(p, last) y = Transpose <perm = [1, 0]> (s)", "A,B"),  # answers to questions begin and end so
        ("s = Squeeze(p, last) u = Unsqueeze(s, last) y = MatMul(u, w2)", "A,B,C"),
        ("r = Reshape(p, flat) y = MatMul(r, w2)", "A,B"),
        ("c = Concat <axis = -1> (q, p) y = MatMul(c, w1)", "A,B,C"),
        ("t = Transpose <perm = [2, 1, 0]> (p) y = MatMul(t, w3)", "A,B,C"),
        ("e = Expand(p, wide) y = MatMul(e, w1)", "A,B,C"),
        ("m = Mul(p, x) y = MatMul(m, w)", "A,B,C"),
    ],
)
def test_one_channel_alone(rest: str, result: str) -> None:
    """Its number depends on no axis any more."""
    text = (
        f"g (float[2,N,8] x, float[8,2] wk, float[8,3] w, float[2,4] w1, float[1,4] w2, float[2,5] w3)"
        f"=> (float[{result}] y) <int64[1] last = {{-1}}, int64[2] flat = {{-1, 1}}, int64[3] wide = {{1, 1, 2}}> "
        f"{{ h = MatMul(x, wk) p, q = Split <axis = -1, num_outputs = 2> (h) {rest} }}"
    )
    rescale_everything(prepared(text, WEIGHTS), check=False)


def test_a_graph_without_groups() -> None:
    assert find_groups(prepared("g (float[3] x) => (float[3] y) { y = Exp(x) }", "")) == ()
