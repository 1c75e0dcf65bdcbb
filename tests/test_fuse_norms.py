"""LayerNormalization, RMSNormalization and Gelu that are spelled out become one node."""

import itertools

import numpy as np
import onnx_ir as ir
import pytest

from qonnx.passes.fuse_gelu import FuseGelu
from qonnx.passes.fuse_norms import FuseNorms, decomposed_norms
from qonnx.passes.infer_shapes import InferShapes
from tests.graphs import model_of
from tests.helpers import apply, leave_alone, operators

CONSTANTS = "float two = {2}, float half = {0.5}, float minus_half = {-0.5}, float one = {1}, float[1] e = {0.001}"


def norm(body: str, *, x: str = "float[N,L,8]", opset: int = 17, more: str = "", outputs: str = "") -> ir.Model:
    """A graph from x to y with weights g and b of eight elements."""
    text = f"g ({x} x, float[8] g, float[8] b, float[1,8] g2, float[1,1,8] b2 {more}) => (float[N,L,8] y{outputs})"
    return inferred(model_of(f"{text} <{CONSTANTS}> {{ {body} }}", weights="g b g2 b2", opset=opset))


def inferred(model: ir.Model) -> ir.Model:
    InferShapes()(model)
    return model


MEAN = "ReduceMean <axes = [-1]>"
CENTRE = f"mean = {MEAN} (x) d = Sub(x, mean)"
VARIANCE = f"q = Pow(d, two) v = {MEAN} (q)"
ROOT = "ve = Add(v, e) r = Sqrt(ve)"

LAYER_NORMS = {
    "plain": f"{CENTRE} {VARIANCE} {ROOT} n = Div(d, r) s = Mul(n, g) y = Add(s, b)",
    "other orders": f"{CENTRE} q = Mul(d, d) v = {MEAN} (q) ve = Add(e, v) r = Sqrt(ve)"
    "n = Div(d, r) s = Mul(g, n) y = Add(b, s)",
    "reciprocal": f"{CENTRE} {VARIANCE} {ROOT} i = Reciprocal(r) n = Mul(i, d) s = Mul(n, g) y = Add(s, b)",
    "one over": f"{CENTRE} {VARIANCE} {ROOT} i = Div(one, r) n = Mul(d, i) s = Mul(n, g) y = Add(s, b)",
    "power of a half": f"{CENTRE} {VARIANCE} ve = Add(v, e) r = Pow(ve, half)n = Div(d, r) s = Mul(n, g) y = Add(s, b)",
    "power of minus a half": f"{CENTRE} {VARIANCE} ve = Add(v, e) r = Pow(ve, minus_half)"
    "n = Mul(d, r) s = Mul(n, g) y = Add(s, b)",
    "centred twice": f"{CENTRE} {VARIANCE} {ROOT} d2 = Sub(x, mean) n = Div(d2, r) s = Mul(n, g) y = Add(s, b)",
    "two means": f"{CENTRE} {VARIANCE} {ROOT} mean2 = {MEAN} (x) d2 = Sub(x, mean2)"
    "n = Div(d2, r) s = Mul(n, g) y = Add(s, b)",
    "parameters with axes of size 1": f"{CENTRE} {VARIANCE} {ROOT} n = Div(d, r) s = Mul(n, g2) y = Add(s, b2)",
    "without bias": f"{CENTRE} {VARIANCE} {ROOT} n = Div(d, r) y = Mul(n, g)",
    "without scale": f"{CENTRE} {VARIANCE} {ROOT} y = Div(d, r)",
    "positive axis": f"{CENTRE} {VARIANCE} {ROOT} n = Div(d, r) s = Mul(n, g) y = Add(s, b)".replace("-1", "2"),
}


@pytest.mark.parametrize("body", LAYER_NORMS.values(), ids=LAYER_NORMS.keys())
def test_layer_norm(body: str) -> None:
    assert apply(FuseNorms(), norm(body)) == ["LayerNormalization"]


def test_axes_as_input_and_the_parameters_that_stay() -> None:
    body = LAYER_NORMS["plain"].replace("<axes = [-1]> (x)", "(x, axes)").replace("<axes = [-1]> (q)", "(q, axes)")
    model = norm(body.replace("mean =", "axes = Constant <value = int64[1] {-1}> () mean ="), opset=18)
    last = model.graph.node(-1)
    last.name, last.metadata_props["origin"] = "/norm/Add_1", "norm"
    assert apply(FuseNorms(), model) == ["Constant", "LayerNormalization"]
    node = model.graph.node(-1)
    assert [value.name for value in node.inputs if value] == ["x", "g", "b"]
    assert node.attributes.get_float("epsilon") == pytest.approx(0.001)
    assert node.name == "/norm/Add_1_LayerNormalization"
    assert node.metadata_props == {"origin": "norm", "qonnx.pass": "FuseNorms"}


def test_two_last_axes() -> None:
    body = LAYER_NORMS["plain"].replace("[-1]", "[1, 2]").replace("s = Mul(n, g) y = Add(s, b)", "y = Mul(n, w)")
    model = model_of(
        f"g (float[N,4,8] x, float[4,8] w) => (float[N,4,8] y) <{CONSTANTS}> {{ {body} }}", weights="w", opset=17
    )
    assert apply(FuseNorms(), inferred(model)) == ["LayerNormalization"]
    assert model.graph.node(0).attributes.get_int("axis") == -2


ENDS_EARLY = {
    "scale of another shape": ("s = Mul(n, o) y = Add(s, b)", ["LayerNormalization", "Mul", "Add"], ", float[L,1] o"),
    "scale that is computed": ("s = Mul(n, x) y = Add(s, b)", ["LayerNormalization", "Mul", "Add"], ""),
    "scale of one element": ("s = Mul(n, half) y = Add(s, b)", ["LayerNormalization", "Mul", "Add"], ""),
    "bias of another shape": ("s = Mul(n, g) y = Add(s, x)", ["LayerNormalization", "Add"], ""),
    "scaled value is read twice": (
        "s = Mul(n, g) t = Add(s, b) y = Mul(t, s)",
        ["LayerNormalization", "Add", "Mul"],
        "",
    ),
}


@pytest.mark.parametrize(("end", "after", "more"), ENDS_EARLY.values(), ids=ENDS_EARLY.keys())
def test_ends_before_what_does_not_fit(end: str, after: list[str], more: str) -> None:
    body = f"{CENTRE} {VARIANCE} {ROOT} n = Div(d, r) {end}"
    assert apply(FuseNorms(), norm(body, more=more)) == after


RMS = f"q = Pow(x, two) v = {MEAN} (q) {ROOT}".replace("ReduceMean <axes = [-1]> (q)", "ReduceMean(q, last)")
RMS_NORMS = {
    "division": f"{RMS} n = Div(x, r) y = Mul(n, g)",
    "reciprocal, scale first": f"{RMS} i = Reciprocal(r) n = Mul(x, i) y = Mul(g, n)",
    "without scale": f"{RMS} y = Div(x, r)",
}


@pytest.mark.parametrize("body", RMS_NORMS.values(), ids=RMS_NORMS.keys())
def test_rms_norm(body: str) -> None:
    body = f"last = Constant <value = int64[1] {{-1}}> () {body}"
    assert apply(FuseNorms(), norm(body, opset=23)) == ["Constant", "RMSNormalization"]


def test_rms_norm_waits_for_its_opset_but_is_seen() -> None:
    body = f"last = Constant <value = int64[1] {{-1}}> () {RMS_NORMS['division']}"
    model = norm(body, opset=22)
    (found,) = decomposed_norms(model)
    assert not found.centred
    assert (found.x.name, found.scale and found.scale.name, found.axes) == ("x", "g", 1)
    leave_alone(FuseNorms(), model)


def test_layer_norm_waits_for_its_opset_but_is_seen() -> None:
    model = norm(LAYER_NORMS["plain"], opset=12)
    (found,) = decomposed_norms(model)
    assert (found.x.name, found.scale and found.scale.name, found.bias and found.bias.name) == ("x", "g", "b")
    assert found.epsilon == pytest.approx(0.001)
    leave_alone(FuseNorms(), model)


PLAIN = LAYER_NORMS["plain"]
LEAVES_ALONE = {
    "other exponent": norm(PLAIN.replace("Pow(d, two)", "Pow(d, half)")),
    "epsilon that is computed": norm(PLAIN.replace("Add(v, e)", "Add(v, mean)")),
    "epsilon below zero": norm(PLAIN.replace("Add(v, e)", "Add(v, minus_half)")),
    "first axis": norm(PLAIN.replace("[-1]", "[1]")),
    "different axes": norm(PLAIN.replace("[-1]", "[0]", 1)),
    "all axes": norm(PLAIN.replace(" <axes = [-1]>", "")),
    "axes that vanish": norm(PLAIN.replace("axes = [-1]", "axes = [-1], keepdims = 0"), x="float[8,8,8]"),
    "positive axis of unknown rank": norm(PLAIN.replace("[-1]", "[2]"), x="float"),
    "mean of something else": norm(
        PLAIN.replace(f"{MEAN} (x)", f"a = Abs(x) mean = {MEAN} (a)").replace("mean = a", "a")
    ),
    "upside down": norm(PLAIN.replace("Div(d, r)", "Div(r, d)")),
    "divides something else": norm(PLAIN.replace("Div(d, r)", "Div(x, r)")),
    "root is read twice": norm(PLAIN.replace("y = Add(s, b)", "t = Add(s, b) y = Mul(t, r)")),
    "centred value is read twice": norm(PLAIN.replace("y = Add(s, b)", "t = Add(s, b) y = Mul(t, d)")),
    "mean is a graph output": norm(PLAIN, outputs=", float[N,L,1] mean"),
    "no scale and no known size": norm(f"{CENTRE} {VARIANCE} {ROOT} y = Div(d, r)", x="float[N,L,D]"),
    "double": model_of(
        f"g (double[N,8] x) => (double[N,8] y) <{CONSTANTS.replace('float', 'double')}>"
        f"{{ {CENTRE} {VARIANCE} {ROOT} y = Div(d, r) }}"
    ),
}


@pytest.mark.parametrize("model", LEAVES_ALONE.values(), ids=LEAVES_ALONE.keys())
def test_leaves_alone(model: ir.Model) -> None:
    leave_alone(FuseNorms(), model)


def test_leaves_parameters_that_a_caller_may_override_alone() -> None:
    model = norm(PLAIN)
    model.graph.inputs.append(model.graph.initializers["e"])
    leave_alone(FuseNorms(), model)


def test_norm_of_a_norm_and_inside_a_subgraph() -> None:
    renamed = (
        f"mean2 = {MEAN} (y1) d2 = Sub(y1, mean2) q2 = Pow(d2, two) v2 = {MEAN} (q2) ve2 = Add(v2, e) r2 = Sqrt(ve2)"
        "n2 = Div(d2, r2) s2 = Mul(n2, g) y = Add(s2, b)"
    )
    assert apply(FuseNorms(), norm(PLAIN.replace("y =", "y1 =") + renamed)) == ["LayerNormalization"] * 2
    inside = (
        f"c = Constant <value = bool {{1}}> () y = If (c) <then_branch = t () => (float[N,L,8] y1)"
        f"{{ {PLAIN.replace('y =', 'y1 =')} }}, else_branch = f () => (float[N,L,8] z) {{ z = Neg(x) }}>"
    )
    model = norm(inside)
    assert apply(FuseNorms(), model) == ["Constant", "If"]
    assert operators_of(model) == {"Constant", "If", "LayerNormalization", "Neg"}


def operators_of(model: ir.Model) -> set[str]:
    return {node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph)}


def test_float16() -> None:
    text = (
        f"g (float16[N,L,8] x, float16[8] g, float16[8] b, float16 two, float16 e) => (float16[N,L,8] y) {{ {PLAIN} }}"
    )
    model = model_of(text, weights="g b two e", opset=17)
    for name, value in (("two", 2), ("e", 0.001)):
        model.graph.initializers[name].const_value = ir.tensor(np.array(value, np.float16), name=name)
    assert apply(FuseNorms(), model, rtol=5e-3) == ["LayerNormalization"]


# ---------------------------------------------------------------------------------------------------------------- Gelu

GELU_CONSTANTS = (
    "float root_half = {0.70710678}, float root_two = {1.4142135}, float half = {0.5}, float one = {1},"
    "float two = {2}, float three = {3}, float c = {0.044715}, float k = {0.7978846}"
)


def gelu(body: str, opset: int = 20, outputs: str = "") -> ir.Model:
    text = f"g (float[N,8] x) => (float[N,8] y{outputs}) <{GELU_CONSTANTS}> {{ {body} }}"
    return inferred(model_of(text, opset=opset))


ERFS = ("u = Mul(x, root_half)", "u = Mul(root_half, x)", "u = Div(x, root_two)")
PLUS = ("p = Add(f, one)", "p = Add(one, f)")
PRODUCTS = (
    "a = Mul(x, p) y = Mul(a, half)",
    "a = Mul(p, x) y = Div(a, two)",
    "a = Mul(half, p) y = Mul(x, a)",
    "h = Mul(x, half) y = Mul(h, p)",
    "h = Div(x, two) y = Mul(p, h)",
)


@pytest.mark.parametrize(
    "body", [" f = Erf(u) ".join((u, f"{p} {y}")) for u, p, y in itertools.product(ERFS, PLUS, PRODUCTS)]
)
def test_gelu(body: str) -> None:
    model = gelu(body)
    assert apply(FuseGelu(), model) == ["Gelu"]
    assert model.graph.node(0).attributes.get_string("approximate") == "none"


CUBES = ("q = Pow(x, three)", "s = Mul(x, x) q = Mul(s, x)", "s = Pow(x, two) q = Mul(x, s)")
SUMS = ("i = Mul(q, c) j = Add(x, i)", "i = Mul(c, q) j = Add(i, x)")


@pytest.mark.parametrize(("cube", "total"), list(itertools.product(CUBES, SUMS)))
def test_gelu_by_tanh(cube: str, total: str) -> None:
    model = gelu(f"{cube} {total} u = Mul(j, k) f = Tanh(u) {PLUS[0]} {PRODUCTS[0]}")
    assert apply(FuseGelu(), model) == ["Gelu"]
    assert model.graph.node(0).attributes.get_string("approximate") == "tanh"


GELU = f"{ERFS[0]} f = Erf(u) {PLUS[0]} {PRODUCTS[0]}"
GELU_BY_TANH = f"{CUBES[0]} {SUMS[0]} u = Mul(j, k) f = Tanh(u) {PLUS[0]} {PRODUCTS[0]}"
NOT_GELU = {
    "opset without Gelu": gelu(GELU, opset=19),
    "another factor": gelu(GELU.replace("root_half", "half")),
    "another addend": gelu(GELU.replace("Add(f, one)", "Add(f, two)")),
    "not halved": gelu(GELU.replace("Mul(a, half)", "Mul(a, two)")),
    "divided by a half": gelu(GELU.replace("Mul(a, half)", "Div(a, half)")),
    "divides a half": gelu(GELU.replace("Mul(a, half)", "Div(half, a)")),
    "product with something else": gelu(GELU.replace("Mul(x, p)", "Mul(f, p)")),
    "another root of two": gelu(GELU.replace("Mul(x, root_half)", "Div(root_two, x)")),
    "argument is read twice": gelu(GELU.replace("Mul(a, half)", "Mul(a2, half) ").replace("y =", "a2 = Add(a, u) y =")),
    "erf is a graph output": gelu(GELU, outputs=", float[N,8] f"),
    "only an erf": gelu("y = Erf(x)"),
    "only a tanh": gelu("y = Tanh(x)"),
    "another power": gelu(GELU_BY_TANH.replace("Pow(x, three)", "Pow(x, two)")),
    "another coefficient": gelu(GELU_BY_TANH.replace("Mul(q, c)", "Mul(q, k)")),
    "another scale": gelu(GELU_BY_TANH.replace("Mul(j, k)", "Mul(j, c)")),
    "cube of something else": gelu(GELU_BY_TANH.replace("q = Pow(x", "z = Abs(x) q = Pow(z")),
}


@pytest.mark.parametrize("model", NOT_GELU.values(), ids=NOT_GELU.keys())
def test_leaves_what_is_not_gelu_alone(model: ir.Model) -> None:
    leave_alone(FuseGelu(), model)


def test_several_in_a_row() -> None:
    first = GELU.replace("y =", "z =")
    renamed = "u2 = Div(z, root_two) f2 = Erf(u2) p2 = Add(f2, one) a2 = Mul(z, p2) y = Mul(a2, half)"
    assert apply(FuseGelu(), gelu(f"{first} {renamed}")) == ["Gelu", "Gelu"]
    assert operators(gelu(GELU)) == ["Mul", "Erf", "Add", "Mul", "Mul"]
