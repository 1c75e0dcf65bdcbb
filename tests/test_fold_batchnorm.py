"""BatchNormalization and constant per-channel arithmetic become part of the weights before them."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.passes.fold_batchnorm import FoldBatchNorm
from tests.graphs import model_of
from tests.helpers import apply, assert_same_function, leave_alone, operators

# s, m, c: scale, mean and bias of a BatchNormalization; v: its variance, which model_of would make negative.
WEIGHTS = "w w2 b s c m k k1 ks"
PARAMETERS = "float[6] s, float[6] c, float[6] m"
VARIANCE = "<float[6] v = {0.5, 1, 2, 0.25, 3, 0.01}>"
OF_RANK_2 = VARIANCE.replace(">", ", float[3,6] a>")
OF_RANK_3 = VARIANCE.replace(">", ", float[2,6,5] a>")
NORM = "BatchNormalization"


def model(text: str, weights: str = WEIGHTS, opset: int = 17) -> ir.Model:
    return model_of(text, weights=weights, opset=opset)


CONV = f"float[2,4,8,8] x, float[6,4,3,3] w, {PARAMETERS}"
TRANSPOSED = f"float[2,4,8,8] x, {PARAMETERS}"

FOLDS = {
    "conv": (f"g ({CONV}) => (float[2,6,6,6] y) {VARIANCE} {{ a = Conv(x, w) y = {NORM}(a, s, c, m, v) }}", ["Conv"]),
    "conv with bias": (
        f"g ({CONV}, float[6] b) => (float[2,6,6,6] y) {VARIANCE}"
        f"{{ a = Conv(x, w, b) y = {NORM} <epsilon = 0.1> (a, s, c, m, v) }}",
        ["Conv"],
    ),
    "before relu": (
        f"g ({CONV}) => (float[2,6,6,6] y) {VARIANCE} {{ a = Conv(x, w) n = {NORM}(a, s, c, m, v) y = Relu(n) }}",
        ["Conv", "Relu"],
    ),
    "grouped conv": (
        f"g (float[2,4,8] x, float[6,2,3] w, {PARAMETERS}) => (float[2,6,6] y) {VARIANCE}"
        f"{{ a = Conv <group = 2> (x, w) y = {NORM}(a, s, c, m, v) }}",
        ["Conv"],
    ),
    "conv transpose": (
        f"g ({TRANSPOSED}, float[4,6,3,3] w) => (float[2,6,10,10] y) {VARIANCE}"
        f"{{ a = ConvTranspose(x, w) y = {NORM}(a, s, c, m, v) }}",
        ["ConvTranspose"],
    ),
    "grouped conv transpose": (
        f"g ({TRANSPOSED}, float[4,3,2,3] w, float[6] b) => (float[2,6,9,10] y) {VARIANCE}"
        f"{{ a = ConvTranspose <group = 2> (x, w, b) y = {NORM}(a, s, c, m, v) }}",
        ["ConvTranspose"],
    ),
    "gemm": (
        f"g (float[3,4] x, float[4,6] w, float[6] b, {PARAMETERS}) => (float[3,6] y) {VARIANCE}"
        f"{{ a = Gemm <alpha = 0.5, beta = 2.0> (x, w, b) y = {NORM}(a, s, c, m, v) }}",
        ["Gemm"],
    ),
    "gemm transB, scalar bias": (
        f"g (float[3,4] x, float[6,4] w, float b, {PARAMETERS}) => (float[3,6] y) {VARIANCE}"
        f"{{ a = Gemm <transB = 1> (x, w, b) y = {NORM}(a, s, c, m, v) }}",
        ["Gemm"],
    ),
    "gemm without bias": (
        f"g (float[4,3] x, float[4,6] w, {PARAMETERS}) => (float[3,6] y) {VARIANCE}"
        f"{{ a = Gemm <transA = 1> (x, w) y = {NORM}(a, s, c, m, v) }}",
        ["Gemm"],
    ),
    "matmul": (
        f"g (float[3,4] x, float[4,6] w, {PARAMETERS}) => (float[3,6] y) {OF_RANK_2}"
        f"{{ a = MatMul(x, w) y = {NORM}(a, s, c, m, v) }}",
        ["MatMul", "Add"],
    ),
    "matmul and add": (
        f"g (float[3,4] x, float[4,6] w, float[6] b, {PARAMETERS}) => (float[3,6] z) {OF_RANK_2}"
        f"{{ a = MatMul(x, w) a2 = Add(b, a) y = {NORM}(a2, s, c, m, v) z = Relu(y) }}",
        ["MatMul", "Add", "Relu"],
    ),
    "weight as Constant node": (
        f"g (float[2,6,8] x, {PARAMETERS}) => (float[2,1,8] y)"
        "<float[1] s1 = {2}, float[1] c1 = {3}, float[1] m1 = {4}, float[1] v1 = {5}>"
        "{ w = Constant <value = float[1,6,1] {1, 2, 3, 4, 5, 6}> ()"
        f" a = Conv(x, w) y = {NORM}(a, s1, c1, m1, v1) }}",
        ["Constant", "Conv"],
    ),
    "bias as Add of paddle": (
        "g (float[2,4,8,8] x, float[6,4,3,3] w, float[1,6,1,1] k) => (float[2,6,6,6] y)"
        "{ a = Conv(x, w) y = Add(k, a) }",
        ["Conv"],
    ),
    "learnable scalars of paddle": (
        "g (float[2,4,8,8] x, float[6,4,3,3] w, float[6] b, float[1] k, float k1) => (float[2,6,6,6] y)"
        "{ a = Conv(x, w, b) m2 = Mul(a, k) y = Add(m2, k1) }",
        ["Conv"],
    ),
    "all four, either order": (
        "g (float[2,4,8,8] x, float[6,4,3,3] w, float[6,1,1] k, float[1,1,1] k1) => (float[2,6,6,6] y)"
        "{ a = Conv(x, w) d = Div(a, k) e = Sub(k1, d) f = Sub(e, k) h = Mul(k1, f) y = Add(h, k) }",
        ["Conv"],
    ),
    "add, then norm, then mul": (
        f"g ({CONV}, float[6,1,1] k) => (float[2,6,6,6] y) {VARIANCE}"
        f"{{ a = Conv(x, w) d = Add(a, k) n = {NORM}(d, s, c, m, v) y = Mul(n, k) }}",
        ["Conv"],
    ),
    "two norms": (
        f"g ({CONV}) => (float[2,6,6,6] y) {VARIANCE}"
        f"{{ a = Conv(x, w) n = {NORM}(a, s, c, m, v) y = {NORM}(n, s, c, m, v) }}",
        ["Conv"],
    ),
    "up to the first reader": (
        f"g ({CONV}) => (float[2,6,6,6] y, float[2,6,6,6] z) {VARIANCE}"
        f"{{ a = Conv(x, w) n = {NORM}(a, s, c, m, v) y = {NORM}(n, s, c, m, v) z = Relu(n) }}",
        ["Conv", NORM, "Relu"],
    ),
}


@pytest.mark.parametrize(("text", "after"), FOLDS.values(), ids=FOLDS.keys())
def test_folds(text: str, after: list[str]) -> None:
    assert apply(FoldBatchNorm(), model(text)) == after


LEAVES_ALONE = {
    "norm after relu": f"g ({CONV}) => (float[2,6,6,6] y) {VARIANCE}"
    f"{{ a = Conv(x, w) r = Relu(a) y = {NORM}(r, s, c, m, v) }}",
    "second reader": f"g ({CONV}) => (float[2,6,6,6] y, float[2,6,6,6] z) {VARIANCE}"
    f"{{ a = Conv(x, w) y = {NORM}(a, s, c, m, v) z = Relu(a) }}",
    "graph output": f"g ({CONV}) => (float[2,6,6,6] y, float[2,6,6,6] a) {VARIANCE}"
    f"{{ a = Conv(x, w) y = {NORM}(a, s, c, m, v) }}",
    "training": f"g ({CONV}) => (float[2,6,6,6] y, float[6] m1, float[6] v1) {VARIANCE}"
    f"{{ a = Conv(x, w) y, m1, v1 = {NORM} <training_mode = 1> (a, s, c, m, v) }}",
    "computed scale": f"g ({CONV}) => (float[2,6,6,6] y) {VARIANCE}"
    f"{{ a = Conv(x, w) t = Abs(s) y = {NORM}(a, t, c, m, v) }}",
    "computed weight": f"g ({CONV}) => (float[2,6,6,6] y) {VARIANCE}"
    f"{{ t = Abs(w) a = Conv(x, t) y = {NORM}(a, s, c, m, v) }}",
    "computed bias": f"g ({CONV}, float[6] b) => (float[2,6,6,6] y) {VARIANCE}"
    f"{{ t = Abs(b) a = Conv(x, w, t) y = {NORM}(a, s, c, m, v) }}",
    "gemm bias per row": f"g (float[3,4] x, float[4,6] w, float[3,1] b, {PARAMETERS}) => (float[3,6] y) {VARIANCE}"
    f"{{ a = Gemm(x, w, b) y = {NORM}(a, s, c, m, v) }}",
    "negative variance": f"g ({CONV}) => (float[2,6,6,6] y) <float[6] v = {{-1, 1, 1, 1, 1, 1}}>"
    f"{{ a = Conv(x, w) y = {NORM}(a, s, c, m, v) }}",
    "matmul of rank 3": f"g (float[2,6,4] x, float[4,5] w, {PARAMETERS}) => (float[2,6,5] y) {OF_RANK_3}"
    f"{{ a = MatMul(x, w) y = {NORM}(a, s, c, m, v) }}",
    "matmul and its bias": "g (float[3,4] x, float[4,6] w, float[6] b) => (float[3,6] y)"
    "{ a = MatMul(x, w) y = Add(a, b) }",
    "weight first": f"g (float[4,6] x, float[3,4] w, {PARAMETERS}) => (float[3,6] y) {OF_RANK_2}"
    f"{{ a = MatMul(w, x) y = {NORM}(a, s, c, m, v) }}",
    "constant along width": "g (float[2,4,8,6] x, float[6,4,1,1] w, float[6] k) => (float[2,6,8,6] y)"
    "{ a = Conv(x, w) y = Mul(a, k) }",
    "constant along batch": "g (float[6,4,8,8] x, float[6,4,1,1] w, float[6,1,1,1] k) => (float[6,6,8,8] y)"
    "{ a = Conv(x, w) y = Mul(a, k) }",
    "constant adds an axis": "g (float[2,4,8,8] x, float[6,4,1,1] w, float[1,1,6,1,1] k) => (float[1,2,6,8,8] y)"
    "{ a = Conv(x, w) y = Mul(a, k) }",
    "divides a constant": "g (float[2,4,8,8] x, float[6,4,1,1] w, float k) => (float[2,6,8,8] y)"
    "{ a = Conv(x, w) y = Div(k, a) }",
    "divides by zero": "g (float[2,4,8,8] x, float[6,4,1,1] w) => (float[2,6,8,8] y) <float zero = {0}>"
    "{ a = Conv(x, w) y = Div(a, zero) }",
    "squared": "g (float[2,4,8,8] x, float[6,4,1,1] w) => (float[2,6,8,8] y) { a = Conv(x, w) y = Mul(a, a) }",
    "another domain": "g (float[2,4,8,8] x, float[6,4,1,1] w, float k) => (float[2,6,8,8] y)"
    "{ a = Conv(x, w) y = com.example.Mul(a, k) }",
}


@pytest.mark.parametrize("text", LEAVES_ALONE.values(), ids=LEAVES_ALONE.keys())
def test_leaves_alone(text: str) -> None:
    leave_alone(FoldBatchNorm(), model(text))


def test_leaves_an_overridable_weight_alone() -> None:
    graph = model(FOLDS["conv"][0])
    graph.graph.inputs.append(graph.graph.initializers["w"])
    leave_alone(FoldBatchNorm(), graph)


@pytest.mark.parametrize("opset", [7, 11, 13, 15])
def test_every_definition_of_the_operator(opset: int) -> None:
    assert apply(FoldBatchNorm(), model(FOLDS["conv"][0], opset=opset)) == ["Conv"]


def test_leaves_the_training_form_before_opset_14_alone() -> None:
    text = (
        f"g ({CONV}) => (float[2,6,6,6] y, float[6] m1, float[6] v1) {VARIANCE}"
        f"{{ a = Conv(x, w) y, m1, v1 = {NORM}(a, s, c, m, v) }}"
    )
    leave_alone(FoldBatchNorm(), model(text, opset=11))


def test_leaves_statistics_per_activation_alone() -> None:
    text = FOLDS["conv"][0].replace(f"{NORM}(", f"{NORM} <spatial = 0> (")
    leave_alone(FoldBatchNorm(), model(text, opset=7))


def test_shared_weights_are_copied_for_the_one_reader() -> None:
    text = (
        f"g ({CONV}, float[6] b) => (float[2,6,6,6] y, float[2,6,6,6] z) {VARIANCE}"
        f"{{ a = Conv(x, w, b) y = {NORM}(a, s, c, m, v) z = Conv(x, w, b) }}"
    )
    graph = model(text)
    original = graph.graph.initializers["w"].const_value
    assert apply(FoldBatchNorm(), graph) == ["Conv", "Conv"]
    first, second = graph.graph
    assert [value.name for value in first.inputs if value] == ["x", "w_folded", "b_folded"]
    assert [value.name for value in second.inputs if value] == ["x", "w", "b"]
    assert graph.graph.initializers["w"].const_value is original


def test_weights_are_not_touched_before_they_are_read() -> None:
    graph = model(FOLDS["conv"][0])
    tensor = graph.graph.initializers["w"].const_value
    assert tensor is not None
    reads = []

    def read() -> ir.TensorProtocol:
        reads.append(1)
        return tensor

    lazy = ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name="w")
    graph.graph.initializers["w"].const_value = lazy
    FoldBatchNorm()(graph)
    assert not reads
    folded = graph.graph.initializers["w_folded"].const_value
    assert folded is not None
    assert folded.numpy().shape == (6, 4, 3, 3)
    assert reads


def test_the_node_keeps_its_name_and_origin_and_says_what_was_folded() -> None:
    graph = model(FOLDS["learnable scalars of paddle"][0])
    conv, scale, shift = graph.graph
    conv.name, scale.name, shift.name = "stem", "stem_scale", "stem_shift"
    conv.metadata_props["origin"] = "stem"
    FoldBatchNorm()(graph)
    assert conv.name == "stem"
    assert conv.metadata_props == {"origin": "stem", "qonnx.folded": "stem_scale, stem_shift"}
    assert conv.outputs[0].name == "y"


def typed(dtype: ir.DataType, op: str = "conv with bias") -> ir.Model:
    """A graph of `FOLDS` in another type; the textual form has no constants of such types."""
    text = FOLDS[op][0].replace(VARIANCE, "").replace("float[6] s,", "float[6] v, float[6] s,")
    graph = model(text.replace("float[", f"{dtype.name.lower()}["), weights=f"{WEIGHTS} v")
    variance = np.array([0.5, 1, 2, 0.25, 3, 0.01]).astype(dtype.numpy())
    graph.graph.initializers["v"].const_value = ir.Tensor(variance, dtype=dtype, name="v")
    return graph


def test_float16() -> None:
    graph = typed(ir.DataType.FLOAT16)
    assert apply(FoldBatchNorm(), graph, rtol=1e-2) == ["Conv"]
    assert {value.dtype for value in graph.graph.node(0).inputs if value} == {ir.DataType.FLOAT16}


def test_double() -> None:
    graph = typed(ir.DataType.DOUBLE, "gemm")
    assert apply(FoldBatchNorm(), graph, rtol=1e-9) == ["Gemm"]


def test_bfloat16() -> None:
    graph = typed(ir.DataType.BFLOAT16)
    assert FoldBatchNorm()(graph).modified
    folded = graph.graph.initializers["w_folded"].const_value
    assert folded is not None
    assert folded.numpy().dtype == ml_dtypes.bfloat16


def test_leaves_float16_weights_that_would_overflow_alone() -> None:
    graph = model(
        "g (float16[1,1,4] x, float16[1,1,1] w, float16 k) => (float16[1,1,4] y) { a = Conv(x, w) y = Mul(a, k) }"
    )
    graph.graph.initializers["w"].const_value = ir.tensor(np.full((1, 1, 1), 3, np.float16), name="w")
    graph.graph.initializers["k"].const_value = ir.tensor(np.array(30000, np.float16), name="k")
    leave_alone(FoldBatchNorm(), graph)


def test_inside_a_subgraph_with_weights_from_outside() -> None:
    text = f"""
    g (bool condition, {CONV}) => (float[2,6,6,6] y) {VARIANCE} {{
      y = If (condition) <
        then_branch = yes () => (float[2,6,6,6] n) {{ a = Conv(x, w) n = {NORM}(a, s, c, m, v) }},
        else_branch = no () => (float[2,6,6,6] o) {{ o = Conv(x, w) }}
      >
    }}"""
    graph = model(text)
    before = graph.clone()
    assert FoldBatchNorm()(graph).modified
    assert operators(graph) == ["If"]
    x = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    for condition in (True, False):
        assert_same_function(before, graph, {"condition": np.array(condition), "x": x})


def test_a_reader_inside_a_subgraph_counts() -> None:
    text = f"""
    g (bool condition, {CONV}) => (float[2,6,6,6] y, float[2,6,6,6] z) {VARIANCE} {{
      a = Conv(x, w)
      y = {NORM}(a, s, c, m, v)
      z = If (condition) <
        then_branch = yes () => (float[2,6,6,6] n) {{ n = Relu(a) }},
        else_branch = no () => (float[2,6,6,6] o) {{ o = Identity(x2) }}
      >
    }}""".replace("Identity(x2)", "Neg(a)")
    leave_alone(FoldBatchNorm(), model(text))


@settings(max_examples=50, deadline=None)
@given(
    groups=st.integers(1, 3),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    transpose=st.booleans(),
    seed=st.integers(0, 1000),
    steps=st.lists(st.sampled_from(["Mul", "Add", "Sub", "Div", NORM]), min_size=1, max_size=4),
)
def test_any_run_after_any_convolution(
    groups: int, inputs: int, outputs: int, transpose: bool, seed: int, steps: list[str]
) -> None:
    channels = groups * outputs
    shape = (groups * inputs, outputs) if transpose else (channels, inputs)
    op = "ConvTranspose" if transpose else "Conv"
    lines, value = [f"v0 = {op} <group = {groups}> (x, w)"], "v0"
    for number, step in enumerate(steps, start=1):
        operands = "k, k, k, k2" if step == NORM else "k3"
        lines.append(f"v{number} = {step}({value}, {operands})")
        value = f"v{number}"
    graph = model_of(
        f"g (float[2,{groups * inputs},5] x, float[{shape[0]},{shape[1]},2] w, float[{channels}] k,"
        f" float[{channels}] k2, float[{channels},1] k3) => (float[a,b,c] {value}) {{ {' '.join(lines)} }}",
        weights="w k k2 k3",
        opset=17,
        seed=seed,
    )
    for name in ("k2", "k3"):
        tensor = graph.graph.initializers[name].const_value
        assert tensor is not None
        graph.graph.initializers[name].const_value = ir.tensor(np.abs(tensor.numpy()) + 0.1, name=name)
    assert apply(FoldBatchNorm(), graph, rtol=1e-4) == [op]
