"""Each rule has graphs that break it and graphs that do not; the compiler itself judges the errors."""

import re
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.comparison import compare
from qonnx.engine import build_engine
from qonnx.engine.listing import int8_nodes
from qonnx.errors import EngineError, ModelError, TargetError
from qonnx.exporter import export
from qonnx.graph import save
from qonnx.linter import Finding, Fixed, Repair, Severity, fix, lint
from qonnx.linter.errors import ERRORS, e12_format
from qonnx.linter.table import findings_lines, fixes_lines
from qonnx.linter.view import Site, quantizer_of
from qonnx.linter.warnings import WARNINGS
from qonnx.pipeline import quantize
from tests.helpers import assert_same_function, operators, random_feeds, run


def tensor(declaration: str, *shape: int, value: float = 1) -> str:
    """An initializer in textual ONNX: `int8[2,3] w = {1,1,1,1,1,1}`."""
    dtype, name = declaration.split()
    return f"{dtype}[{','.join(map(str, shape))}] {name} = {{{','.join([str(value)] * int(np.prod(shape)))}}}"


# What graphs may use: scales, zero points of 0, weights of 64 x 64, and kernels of 16 channels.
CONSTANTS = ", ".join([
    "float s = {0.05}, float t = {0.1}, int8 z = {0}, int8 low = {-127}, int8 high = {127}, int64[1] axis = {0}",
    "float[1] s1 = {0.05}, float zf = {0}, int64[2] square = {64, 64}",
    tensor("float s64", 64, value=0.1), tensor("int8 z64", 64, value=0), tensor("float bias", 64),
    tensor("int8 w", 64, 64), tensor("float wf", 64, 64), tensor("int8 narrow", 64, 8), tensor("int8 gamma", 64),
    tensor("float s16", 16, value=0.1), tensor("int8 z16", 16, value=0), tensor("int8 k", 16, 16, 3, 3),
    tensor("int8 k8", 8, 8, 3, 3),
])  # fmt: skip


def graph(body: str, extra: str = "", *, x: str = "float[4,64] x", y: str = "", opset: int = 21) -> ir.Model:
    """A graph from `x` to `y`, which is float and has the rank of `x` if nothing else is said.

    Constants named w.. and k.. get random values; those named half.. become float16.
    """
    y = y or f"float[{', '.join('abcd'[: x.partition(']')[0].count(',') + 1])}] y"
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : {opset}, '
        '"ai.onnx.ml" : 1, "com.microsoft" : 1, "com.acme" : 1, "trt" : 1]>'
        f"net ({x}) => ({y}) <{CONSTANTS}{', ' if extra else ''}{extra}> {{ {body} }}"
    )
    rng = np.random.default_rng(0)
    for name, value in list(model.graph.initializers.items()):
        assert value.const_value is not None
        array = value.const_value.numpy()
        if name[0] in "wk":
            floating = value.const_value.dtype.is_floating_point()
            limits = int(value.const_value.dtype.min), int(value.const_value.dtype.max) + 1
            random = rng.standard_normal(array.shape) if floating else rng.integers(*limits, array.shape)
            array = random.astype(array.dtype)
        # TensorRT reads 4-bit types from raw bytes only, and the textual form has no halves.
        stored = ir.tensor(array.astype(np.float16) if name.startswith("half") else array, name=name)
        value.const_value, value.dtype = stored, stored.dtype
        if not value.uses():
            del model.graph.initializers[name]
    return model


def pair(value: str = "x", scale: str = "s", zero: str = "z", op: str = "", attributes: str = "") -> str:
    return f"""[{value}_Q] {value}_q = {op}QuantizeLinear{attributes}({value}, {scale}, {zero})
               [{value}_DQ] {value}_d = {op}DequantizeLinear{attributes}({value}_q, {scale}, {zero})"""


def int4(shape: tuple[int, int], scales: tuple[int, ...], axis: int, block_size: int, opset: int = 21) -> ir.Model:
    """x times an int4 weight with blocks."""
    dequantize = f"[w4_DQ] w4_d = DequantizeLinear<axis={axis}, block_size={block_size}>(w4, s4)"
    stored = f"{tensor('int4 w4', *shape)}, {tensor('float s4', *scales, value=0.1)}"
    return graph(f"{dequantize} y = MatMul(x, w4_d)", stored, x=f"float[4,{shape[0]}] x", opset=opset)


DQ_W = "[w_DQ] w_d = DequantizeLinear<axis=1>(w, s64, z64)"
DQ_K = "[k_DQ] k_d = DequantizeLinear<axis=0>(k, s16, z16)"
FC = f"{DQ_W} [fc] y = MatMul(x_d, w_d)"
IMAGE = "float[2,16,8,8] x"
CONV = "Conv<pads=[1,1,1,1]>"

# What TensorRT does with a graph that breaks an E rule. SILENT: builds it, and computes something else.
REFUSED, SILENT, NOT_ASKED = "refused", "silent", "not asked"


class Broken(NamedTuple):
    """A graph that breaks one rule, at one node."""

    rule: str
    node: str
    model: ir.Model
    verdict: str = NOT_ASKED


ERROR_CASES = [
    Broken("E1", "x_Q", graph(f"{pair(zero='z3')} y = Relu(x_d)", "int8 z3 = {3}"), REFUSED),
    Broken("E1", "x_Q", graph(f"{pair(zero='z3', op='com.microsoft.')} y = Relu(x_d)", "int8 z3 = {3}")),
    Broken("E1", "x_Q", graph(f"{pair(zero='u')} {FC}", "uint8 u = {128}"), REFUSED),
    Broken(
        "E2",
        "wu_DQ",
        graph(
            f"{pair()} [wu_DQ] w_d = DequantizeLinear(wu, s, u) y = MatMul(x_d, w_d)",
            f"uint8 u = {{128}}, {tensor('uint8 wu', 64, 64)}",
        ),
        REFUSED,
    ),
    Broken("E2", "x_Q", graph(f"{pair(zero='i')} y = Relu(x_d)", "int16 i = {0}"), REFUSED),
    Broken("E3", "x_Q", graph(f"{pair(zero='u')} y = Relu(x_d)", "uint8 u = {0}"), SILENT),
    Broken("E3", "x_Q", graph("[x_Q] q = QuantizeLinear(x, s) d = DequantizeLinear(q, s) y = Relu(d)"), SILENT),
    Broken("E4", "x_Q", graph(f"{pair(scale='nil')} y = Relu(x_d)", "float nil = {0.0}"), REFUSED),
    Broken("E4", "x_Q", graph(f"{pair(scale='inf')} y = Relu(x_d)", "float inf = {inf}"), SILENT),
    Broken(
        "E4",
        "w_DQ",
        graph(
            f"{pair()} [w_DQ] w_d = DequantizeLinear<axis=1>(w, minus, z64) y = MatMul(x_d, w_d)",
            tensor("float minus", 64, value=-1),
        ),
    ),
    Broken(
        "E5",
        "w_DQ",
        graph(f"{pair()} [w_DQ] w_d = DequantizeLinear<axis=1>(w, s64, z) y = MatMul(x_d, w_d)"),
        REFUSED,
    ),
    Broken("E5", "x_Q", graph(f"zero = Unsqueeze(z, axis) {pair(scale='s1', zero='zero')} y = Relu(x_d)"), REFUSED),
    Broken(
        "E6",
        "w_DQ",
        graph(f"{pair()} [w_DQ] w_d = DequantizeLinear<axis=1>(w, s16, z16) y = MatMul(x_d, w_d)"),
        REFUSED,
    ),
    Broken("E6", "w_DQ", graph(f"{pair()} [w_DQ] w_d = DequantizeLinear<axis=2>(w, s64, z64) y = MatMul(x_d, w_d)")),
    Broken(
        "E6",
        "x_Q",
        graph(f"{pair(scale='s11', zero='z11')} y = Relu(x_d)", "float[1,1] s11 = {1}, int8[1,1] z11 = {0}"),
        REFUSED,
    ),
    Broken(
        "E7",
        "b_DQ",
        graph(f"{pair()} {DQ_W} [b_DQ] b_d = DequantizeLinear(b, s) y = Gemm(x_d, w_d, b_d)", tensor("int32 b", 64)),
        REFUSED,
    ),
    Broken(
        "E8",
        "turn",
        graph(f"{pair()} [turn] w_t = Transpose(w) w_d = DequantizeLinear(w_t, s, z) y = MatMul(x_d, w_d)"),
        REFUSED,
    ),
    Broken(
        "E8",
        "look",
        graph("[look] g = Gather(w, x) d = DequantizeLinear(g, s, z) y = Relu(d)", x="int64[4] x", y="float[4,64] y"),
    ),
    Broken("E8", "cast", graph("[cast] w_d = Cast<to=1>(w) y = MatMul(x, w_d)")),
    Broken("E9", "node_of_q", graph("q, qs, qz = DynamicQuantizeLinear(x) y = Cast<to=1>(q)"), REFUSED),
    Broken("E9", "product", graph("[product] y = com.microsoft.FusedMatMul(x, wf)"), REFUSED),
    Broken("E9", "count", graph("[count] y = Unique(x)")),
    Broken("E9", "binary", graph("[binary] y = ai.onnx.ml.Binarizer(x)")),
    Broken(
        "E10",
        "fc",
        graph(f"{pair()} w_d = DequantizeLinear(w, half, z) [fc] y = MatMul(x_d, w_d)", "float half = {0.1}"),
        REFUSED,
    ),
    Broken("E12", "x_Q", graph(f"{pair(zero='f8')} y = Relu(x_d)", "float8e4m3fn f8 = {0}"), REFUSED),
    Broken(
        "E12",
        "f8",
        graph("[f8] d = trt.TRT_FP8DequantizeLinear(w8, s) y = MatMul(x, d)", tensor("float8e4m3fn w8", 64, 64)),
        REFUSED,
    ),
    Broken("E13", "w4_DQ", int4((7, 65), (1, 65), 0, 7), REFUSED),
    Broken("E13", "w4_DQ", int4((64, 64), (2, 2), 0, 32), REFUSED),
    Broken("E13", "w4_DQ", int4((96, 64), (2, 64), 0, 64), SILENT),
    Broken("E13", "w4_DQ", int4((64, 64), (2, 64), 0, 32, opset=19), SILENT),
    Broken("E13", "x_Q", graph(f"{pair(zero='i4')} y = Relu(x_d)", "int4 i4 = {0}"), SILENT),
    Broken("E14", "turn", graph("[turn] m = Transpose(x) y = Cast<to=1>(m)", x="uint8[4,64] x"), REFUSED),
    Broken("E14", "same", graph("[same] m = Identity(x) y = Cast<to=1>(m)", x="uint8[4,64] x"), REFUSED),
    Broken(
        "E14",
        "add",
        graph("c = Cast<to=1>(x) [add] m = Add(x, x) d = Cast<to=1>(m) y = Add(c, d)", x="uint8[4] x"),
        REFUSED,
    ),
    Broken("E14", "to", graph("[to] u = Cast<to=2>(x) f = Cast<to=1>(u) y = Relu(f)"), REFUSED),
    Broken("E14", "cast", graph("[cast] y = Cast<to=1>(x)", x="int16[4] x"), REFUSED),
    Broken("E14", "to", graph("[to] y = Cast<to=12>(x)", y="uint32[4,64] y"), REFUSED),
    Broken("E14", "cast", graph("[cast] y = Cast<to=1>(x)", x="uint64[4] x"), REFUSED),
]

RESIDUAL = f"[c] c = {CONV}(x_d, k_d) [add] sum = Add(c, {{skip}}) r = Relu(sum) {pair('r')} y = {CONV}(r_d, k_d)"
ATTENDED = f"r = MatMul(a_d, x_d) {pair('r')} [out] y = MatMul(r_d, wf)"
CUT = f"a, b = Split<axis=1, num_outputs=2>(m) p = Softmax(a) {pair('b')} b_t = Transpose(b_d) [mix] y = MatMul(p, b_t)"
CUT_OF_FLOAT = f"b, c = Split<axis=1, num_outputs=2>(r) {pair('b')} [mix] y = MatMul(a, b_d)"
LAYER_NORM = "y = LayerNormalization({}, {})"

WARNING_CASES = [
    Broken("W1", "x_Q", graph(f"{pair(scale='s64', zero='z64', attributes='<axis=1>')} {FC}")),
    Broken("W2", "fc", graph(f"{pair()} w_d = DequantizeLinear<axis=0>(w, s64, z64) [fc] y = MatMul(x_d, w_d)")),
    Broken(
        "W2", "fc", graph(f"{pair()} w_d = DequantizeLinear<axis=1>(w, s64, z64) [fc] y = Gemm<transB=1>(x_d, w_d)")
    ),
    Broken("W2", "conv", graph(f"{pair()} k_d = DequantizeLinear(k, s16, z16) [conv] y = {CONV}(x_d, k_d)", x=IMAGE)),
    Broken("W2", "fc", graph(f"{pair()} {DQ_W} w_t = Transpose(w_d) [fc] y = MatMul(x_d, w_t)")),
    Broken("W3", "fc", graph(f"{pair()} [fc] y = MatMul(x_d, wf)")),
    Broken("W3", "fc", graph(f"{DQ_W} [fc] y = MatMul(x, w_d)")),
    Broken("W3", "mix", graph(f"m = Relu(x) {CUT}")),
    Broken("W3", "qk", graph(f"{pair()} x_t = Transpose(x) [qk] y = MatMul(x_d, x_t)", x="float[64,64] x")),
    Broken("W4", "fc", graph(f"{pair()} r = Relu(x_d) {DQ_W} [fc] y = MatMul(r, w_d)")),
    Broken("W5", "x_DQ", graph(f"x_q = QuantizeLinear(x, s, z) [x_DQ] x_d = DequantizeLinear(x_q, t, z) {FC}")),
    Broken("W5", "x_d_Q", graph(f"{pair()} {pair('x_d')} {DQ_W} y = MatMul(x_d_d, w_d)")),
    Broken("W5", "x_d_Q", graph(f"{pair()} {pair('x_d', 't')} {DQ_W} y = MatMul(x_d_d, w_d)")),
    Broken("W6", "x_Q", graph(f"{pair(scale='fed')} {FC}", x="float[4,64] x, float fed")),
    Broken("W7", "add", graph(f"{pair()} {DQ_K} {RESIDUAL.format(skip='skip')}", x=f"{IMAGE}, {IMAGE[:-1]}skip")),
    Broken(
        "W8",
        "c_Q",
        graph(
            f"{pair()} {DQ_K} c = {CONV}(x_d, k_d) {pair('c')} r = Relu(c_d) {pair('r')} y = {CONV}(r_d, k_d)", x=IMAGE
        ),
    ),
    Broken("W8", "m_Q", graph(f"{pair()} {DQ_W} m = MatMul(x_d, w_d) {pair('m')} y = Add(m_d, bias)")),
    Broken("W9", "norm", graph(f"{pair()} [norm] {LAYER_NORM.format('x_d', 'bias')}")),
    Broken("W9", "norm", graph(f"g = DequantizeLinear(gamma, s, z) [norm] {LAYER_NORM.format('x', 'g')}")),
    Broken("W9", "soft", graph(f"{pair()} [soft] y = Softmax(x_d)")),
    Broken("W10", "pool", graph(f"{pair()} [pool] p = GlobalAveragePool(x_d) y = Relu(p)", x=IMAGE)),
    Broken(
        "W10",
        "join",
        graph(
            f"{pair()} {pair('v', 't')} [join] c = Concat<axis=0>(x_d, v_d) {pair('c')} {DQ_W} y = MatMul(c_d, w_d)",
            x="float[4,64] x, float[4,64] v",
        ),
    ),
    Broken("W11", "fc", graph(f"{pair()} d = DequantizeLinear(narrow, s, z) [fc] y = MatMul(x_d, d)")),
    Broken(
        "W11",
        "mix",
        graph(f"{pair()} {pair('v')} [mix] y = MatMul(x_d, v_d)", x="float[1,64] x, float[64,64] v"),
    ),
    Broken(
        "W11",
        "conv",
        graph(
            f"r = Relu(x) {pair('r')} d = DequantizeLinear(k8, s, z) [conv] y = {CONV}(r_d, d)", x="float[2,8,8,8] x"
        ),
    ),
    Broken("W12", "wf_Q", graph(f"{pair()} {pair('wf')} y = MatMul(x_d, wf_d)")),
    Broken(
        "W12",
        "clip",
        graph(f"q = QuantizeLinear(x, s, z) [clip] c = Clip(q, low, high) x_d = DequantizeLinear(c, s, z) {FC}"),
    ),
    Broken("W13", "y_DQ", graph("q = QuantizeLinear(x, s, z) [y_DQ] y = DequantizeLinear(q, s, z)")),
    Broken("W13", "y_Q", graph("[y_Q] y = QuantizeLinear(x, s, z)", y="int8[4,64] y")),
    Broken("W13", "x_DQ", graph(f"[x_DQ] x_d = DequantizeLinear(x, s, z) {FC}", x="int8[4,64] x")),
]

CLEAN_CASES = [
    ("E1", graph(f"{pair()} {FC}")),
    ("E2", graph("y = Cast<to=1>(x)", x="uint8[4] x")),
    (
        "E3",
        graph(f"x_q = QuantizeLinear<output_dtype=3>(x, s) x_d = DequantizeLinear(x_q, s) {FC}"),
    ),
    ("E4", graph(f"{pair(scale='tiny')} {FC}", "float tiny = {1e-30}")),
    ("E5", graph(f"zi = Cast<to=3>(zf) {pair(zero='zi')} {FC}")),
    ("E5", graph(f"{pair(scale='s1')} {FC}")),
    ("E6", graph(f"{pair(attributes='<axis=7>')} w_d = DequantizeLinear<axis=-1>(w, s64, z64) y = MatMul(x_d, w_d)")),
    ("E7", graph(f"{pair()} {DQ_W} y = Gemm(x_d, w_d, bias)")),
    ("E8", graph(f"{pair()} w_d = DequantizeLinear(w, s, z) w_t = Transpose(w_d) y = MatMul(x_d, w_t)")),
    ("E9", graph(f"{pair(op='com.microsoft.')} {DQ_W} m = MatMul(x_d, w_d) y = com.microsoft.Gelu(m)")),
    ("E9", graph("y = com.acme.Wobble(x)")),
    (
        "E10",
        graph(
            f"{pair(scale='half')} w_d = DequantizeLinear(w, half, z) y = MatMul(x_d, w_d)",
            "float half = {0.1}",
            x="float16[4,64] x",
            y="float16[4,64] y",
        ),
    ),
    ("E13", int4((64, 64), (2, 64), 0, 32)),
    ("E13", int4((64, 64), (64, 2), 1, 32)),
    ("E14", graph("y = Cast<to=2>(x)", y="uint8[4,64] y")),
    ("E14", graph("y = Identity(x)", x="uint8[4,64] x", y="uint8[4,64] y")),
    ("E14", graph("y = Shape(x)", x="uint8[4,64] x", y="int64[2] y")),
    ("E14", graph("y = Equal(x, v)", x="uint8[4] x, uint8[4] v", y="bool[4] y")),
    ("E14", graph("y = CastLike(x, s)", x="uint8[4] x")),
    ("E14", graph("l = Gather(bytes, x) y = Cast<to=1>(l)", "uint8[4] bytes = {1, 2, 3, 4}", x="int64[4] x")),
    ("E14", graph("y = com.acme.Wobble(x)", x="uint8[4] x")),
    ("W2", graph(f"{pair()} w_d = DequantizeLinear<axis=0>(w, s64, z64) w_t = Transpose(w_d) y = MatMul(x_d, w_t)")),
    ("W2", graph(f"{pair()} w_d = DequantizeLinear<axis=0>(w, s64, z64) y = Gemm<transB=1>(x_d, w_d)")),
    ("W2", graph(f"{pair()} k_d = DequantizeLinear<axis=1>(k, s16, z16) y = ConvTranspose(x_d, k_d)", x=IMAGE)),
    ("W3", graph("y = MatMul(x, wf)")),
    ("W3", graph(f"{pair()} {DQ_W} m = MatMul(x_d, w_d) {CUT}")),
    ("W3", graph(f"{pair()} a = Softmax(x) {pair('a')} {ATTENDED}", x="float[64,64] x")),
    ("W4", graph(f"r = Relu(x) {pair('r')} r4 = Reshape(r_d, square) {DQ_W} y = MatMul(r4, w_d)", x="float[64,64] x")),
    ("W5", graph(f"{pair()} r = Relu(x_d) {pair('r', 't')} {DQ_W} y = MatMul(r_d, w_d)")),
    (
        "W7",
        graph(f"{pair()} {DQ_K} {pair('skip')} {RESIDUAL.format(skip='skip_d')}", x=f"{IMAGE}, {IMAGE[:-1]}skip"),
    ),
    ("W8", graph(f"{pair()} {DQ_K} c = {CONV}(x_d, k_d) r = Relu(c) {pair('r')} y = {CONV}(r_d, k_d)", x=IMAGE)),
    ("W9", graph(f"n = LayerNormalization(x, bias) {pair('n')} {DQ_W} y = MatMul(n_d, w_d)")),
    ("W9", graph(f"{pair()} {DQ_K} c = {CONV}(x_d, k_d) {pair('c')} {LAYER_NORM.format('c_d', 'c_d')}", x=IMAGE)),
    (
        "W10",
        graph(
            f"{pair()} {pair('v')} c = Concat<axis=0>(x_d, v_d) {pair('c')} {DQ_W} y = MatMul(c_d, w_d)",
            x="float[4,64] x, float[4,64] v",
        ),
    ),
    (
        "W10",
        graph(f"{pair()} p = AveragePool<kernel_shape=[2,2]>(x_d) {pair('p')} {DQ_K} y = {CONV}(p_d, k_d)", x=IMAGE),
    ),
    ("W11", graph(f"{pair()} {FC}", x="float[1,64] x")),  # a classifier of one image
    ("W11", graph(f"{pair()} d = DequantizeLinear(k8, s, z) y = {CONV}(x_d, d)", x="float[2,8,8,8] x")),
]


@pytest.mark.parametrize("case", ERROR_CASES + WARNING_CASES, ids=lambda case: f"{case.rule}-{case.node}")
def test_a_broken_rule_is_found_and_no_other(case: Broken) -> None:
    (finding,) = lint(case.model)
    assert (finding.rule, finding.node) == (case.rule, case.node)
    assert finding.severity is (Severity.ERROR if case.rule.startswith("E") else Severity.WARNING)
    for text in (finding.message, finding.remedy):
        assert text
        assert "\n" not in text


@pytest.mark.parametrize(("rule", "model"), CLEAN_CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_graph_that_keeps_the_rule_is_clean(rule: str, model: ir.Model) -> None:
    assert lint(model) == ()


def test_the_result_of_a_layer_is_rounded_for_nothing_where_the_next_one_is_in_float() -> None:
    square = "float[64,64] x"
    for model in (
        graph(f"{pair()} {DQ_W} r = MatMul(x_d, w_d) {pair('r')} [out] y = MatMul(r_d, wf)"),
        graph(f"{pair()} a = Relu(x) {pair('a')} {ATTENDED}", x=square),  # no attention
        graph(f"{pair()} r = MatMul(x, x) a = Softmax(r) {CUT_OF_FLOAT}", x=square),
        graph(f"{pair()} {DQ_W} m = MatMul(x_d, w_d) {CUT.replace('p = Softmax', 'p = Relu')}"),
    ):
        (finding,) = lint(model)
        assert (finding.rule, finding.node) == ("W3", "out" if "out" in {node.name for node in model.graph} else "mix")


def test_every_rule_has_its_graphs() -> None:
    rules = {rule.__name__.partition("_")[0].upper() for rule in (*ERRORS, *WARNINGS)}
    assert rules | {"E11"} == {f"E{number}" for number in range(1, 15)} | {f"W{number}" for number in range(1, 14)}
    assert {case.rule for case in (*ERROR_CASES, *WARNING_CASES)} == rules
    asked = {case.rule for case in ERROR_CASES if case.verdict != NOT_ASKED}
    assert asked == {rule for rule in rules if rule.startswith("E")}


@pytest.mark.rtx
@pytest.mark.parametrize(
    "case",
    [case for case in ERROR_CASES if case.verdict != NOT_ASKED],
    ids=lambda case: f"{case.rule}-{case.node}-{case.verdict}",
)
def test_the_compiler_agrees(case: Broken, tmp_path: Path) -> None:
    save(case.model, tmp_path / "net.onnx")
    if case.verdict == SILENT:
        build_engine(tmp_path / "net.onnx", tmp_path / "net.plan")
    else:
        with pytest.raises(EngineError):
            build_engine(tmp_path / "net.onnx", tmp_path / "net.plan")


def test_a_weight_only_file_gets_one_remedy_for_all_layers() -> None:
    findings = lint(graph(f"{DQ_W} m = MatMul(x, w_d) y = MatMul(m, w_d)", x="float[64,64] x"))
    assert [finding.rule for finding in findings] == ["W3", "W3"]
    assert len({finding.remedy for finding in findings}) == 1
    assert "only the weight" in findings[0].message


FLOAT_CASES = [case for case in WARNING_CASES if case.rule in ("W1", "W2", "W3", "W4", "W6")]


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("model", "int8"),
    [(case.model, False) for case in FLOAT_CASES] + [(graph(f"{pair()} {FC}"), True)],
    ids=[f"{case.rule}-{case.node}" for case in FLOAT_CASES] + ["clean"],
)
def test_what_is_said_to_run_in_float_does(model: ir.Model, int8: bool, tmp_path: Path) -> None:
    save(model, tmp_path / "net.onnx")
    engine = build_engine(tmp_path / "net.onnx", tmp_path / "net.plan")
    (product,) = (node for node in model.graph if node.op_type in ("Conv", "Gemm", "MatMul"))
    name = product.name or f"node_of_{product.outputs[0].name}"
    assert int8_nodes(engine.layers, [name])[0].int8 == int8


def test_dynamic_sizes_need_a_range_and_inputs_a_rank(tmp_path: Path) -> None:
    model = graph("y = Relu(x)", x="float[batch,length] x, float[batch,length] other, float[3,?] third")
    findings = lint(model)
    assert [(finding.rule, finding.severity, finding.node) for finding in findings] == [
        ("E11", Severity.WARNING, "x"),
        ("E11", Severity.WARNING, "third"),
    ]
    assert "dims={'length': (1, 128, 256)}" in findings[0].remedy
    model.graph.inputs[0].shape = None
    (unknown, *_) = lint(model)
    assert (unknown.rule, unknown.severity, unknown.node) == ("E11", Severity.ERROR, "x")
    save(model, tmp_path / "net.onnx")
    with pytest.raises(EngineError):
        build_engine(tmp_path / "net.onnx", tmp_path / "net.plan")


def test_fp8_is_fine_where_the_device_has_it() -> None:
    model = next(case.model for case in ERROR_CASES if case.rule == "E12")
    node = model.graph[0]
    assert e12_format(Site(node, quantizer_of(node), 21, (8, 0))) is not None
    assert e12_format(Site(node, quantizer_of(node), 21, (8, 9))) is None


def test_bodies_of_subgraphs_and_functions_are_checked() -> None:
    branch = f"b () => (float[4,64] b) {{ {pair(zero='z3')} b = Relu(x_d) }}"
    model = graph(
        f"y = If<then_branch = {branch}, else_branch = {branch}>(c)", "int8 z3 = {3}", x="float[4,64] x, bool c"
    )
    assert {finding.rule for finding in lint(model)} == {"E1"}
    assert [found.exact for found in fix(model).fixes] == [False, False]
    function = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["": 21, "local": 1]>
        net (float[4,64] x) => (float[4,64] y) <float s = {0.1}, int8 z = {3}> { y = local.rounded(x, s, z) }
        <domain: "local", opset_import: ["": 21]>
        rounded (x, s, z) => (y) { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Relu(d) }"""
    )
    assert {finding.rule for finding in lint(function)} == {"E1"}
    assert len(function.functions) == 1


@pytest.mark.parametrize(
    ("model", "target", "error", "expected"),
    [
        ("missing.onnx", "a800", ModelError, "missing.onnx: no such file"),
        (graph("y = Relu(x)"), "ort-cpu", TargetError, "'ort-cpu' runs no TensorRT"),
        (graph("y = Relu(x)"), "h9000", TargetError, "unknown target 'h9000'"),
    ],
)
def test_bad_arguments(model: ir.Model | str, target: str, error: type[Exception], expected: str) -> None:
    for call in (lint, fix):
        with pytest.raises(error, match=expected):
            call(model, target=target)


def repaired(model: ir.Model, *, exact: bool) -> Fixed:
    """Repairs a graph, and checks what holds for all repairs."""
    before = ir.to_onnx_text(model)
    fixed = fix(model)
    assert ir.to_onnx_text(model) == before
    assert fixed.fixes
    assert all(each.exact for each in fixed.fixes) == exact
    assert not [finding for finding in fixed.findings if finding.severity is Severity.ERROR]
    assert fix(fixed.model).fixes == ()
    onnx.checker.check_model(ir.to_proto(fixed.model), full_check=True)
    used = {value.name for node in fixed.model.graph.all_nodes() for value in node.inputs if value is not None}
    assert set(fixed.model.graph.initializers) <= used
    if not exact:
        assert not any(each.exact is False for each in fix(model, exact_only=True).fixes)
    return fixed


WU = f"uint8 u = {{128}}, {tensor('uint8 wu', 64, 64)}, {tensor('uint8 u64', 64, value=128)}"
EXACT_CASES = [
    ("E1", graph(f"{pair(zero='u')} {FC}", WU)),
    (
        "E1",
        graph(
            f"q = QuantizeLinear(x, s, u) m = Transpose(q) x_d = DequantizeLinear(m, s, u) {FC}", WU, x="float[64,4] x"
        ),
    ),
    ("E1", graph("b = DequantizeLinear(gamma, s, z3) y = Add(x, b)", "int8 z3 = {3}")),
    ("E2", graph(f"{pair()} w_d = DequantizeLinear(wu, s, u) y = MatMul(x_d, w_d)", WU)),
    ("E2", graph(f"{pair()} w_d = DequantizeLinear<axis=1>(wu, s64, u64) y = MatMul(x_d, w_d)", WU)),
    ("E2", graph(f"{pair()} m = Transpose(wu) w_d = DequantizeLinear(m, s, u) y = MatMul(x_d, w_d)", WU)),
    ("E2", graph("i = DequantizeLinear(w16, s, h) y = Add(x, i)", f"int16 h = {{7}}, {tensor('int16 w16', 64)}")),
    (
        "E4",
        graph(
            f"{pair()} w_d = DequantizeLinear<axis=1>(w, dead, z64) y = MatMul(x_d, w_d)",
            f"float[64] dead = {{{', '.join(['0', '0.5'] * 32)}}}",
        ),
    ),
    ("E7", graph(f"{pair()} {DQ_W} b_d = DequantizeLinear(wb, s) y = Gemm(x_d, w_d, b_d)", tensor("int32 wb", 64))),
    (
        "E7",
        graph(
            f"{pair()} {DQ_W} b_d = DequantizeLinear<axis=0>(wb, s64, zb) y = Gemm(x_d, w_d, b_d)",
            f"{tensor('int32 wb', 64)}, {tensor('int32 zb', 64, value=0)}",
        ),
    ),
    ("E8", graph(f"{pair()} m = Transpose(w) w_d = DequantizeLinear(m, s, z) y = MatMul(x_d, w_d)")),
    ("E8", graph(f"{pair()} m = Transpose(w) w_d = DequantizeLinear<axis=1>(m, s64, z64) y = MatMul(x_d, w_d)")),
    ("E8", graph(f"{pair()} m = Identity(w) w_d = DequantizeLinear<axis=1>(m, s64, z64) y = MatMul(x_d, w_d)")),
    (
        "E8",
        graph(
            f"{pair()} r = Reshape(flat, square) m = Transpose(r) w_d = DequantizeLinear(m, s, z) y = MatMul(x_d, w_d)",
            tensor("int8 flat", 4096),
        ),
    ),
    ("E8", graph("g = Gather(w, x) d = DequantizeLinear(g, s, z) y = Relu(d)", x="int64[4] x", y="float[4,64] y")),
    ("W5", graph(f"{pair()} {pair('x_d')} {DQ_W} y = MatMul(x_d_d, w_d)")),
    ("W9", graph(f"g = DequantizeLinear(gamma, s, z) {LAYER_NORM.format('x', 'g')}")),
    ("W12", graph(f"{pair()} {pair('wf')} y = MatMul(x_d, wf_d)")),
    ("W12", graph(f"{pair()} {pair('wf', 's64', 'z64', attributes='<axis=1>')} y = MatMul(x_d, wf_d)")),
    (
        "W12",
        graph(
            f"{pair()} q = QuantizeLinear(wf, s, z) c = Clip(q, low, high) w_d = DequantizeLinear(c, s, z) "
            "y = MatMul(x_d, w_d)"
        ),
    ),
]


@pytest.mark.parametrize(("rule", "model"), EXACT_CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_exact_repairs_change_no_result(rule: str, model: ir.Model) -> None:
    assert (rule, Repair.EXACT) in {(finding.rule, finding.repair) for finding in lint(model)}
    fixed = repaired(model, exact=True)
    assert fixed.findings == ()
    assert rule in {each.rule for each in fixed.fixes}
    feeds = random_feeds(model)
    feeds["x"] *= 4 if feeds["x"].dtype == np.float32 else 1  # beyond the ends of the grid too
    assert_same_function(model, fixed.model, feeds, rtol=1e-6)


def test_one_zero_point_is_repeated_for_many_scales() -> None:
    model = graph(f"{pair()} w_d = DequantizeLinear<axis=1>(w, s64, z) y = MatMul(x_d, w_d)")
    # ONNX Runtime does not take one zero point either, so that the comparison is with what was meant.
    assert_same_function(graph(f"{pair()} {FC}"), repaired(model, exact=True).model)


def test_scales_get_the_type_of_the_graph() -> None:
    half = graph(f"{pair()} w_d = DequantizeLinear(w, half, z) y = MatMul(x_d, w_d)", "float half = {0.1}")
    after = run(repaired(half, exact=True).model, feeds := random_feeds(half))["y"]
    codes = half.graph.initializers["w"].const_value
    assert codes is not None
    expected = symmetric(feeds["x"], 0.05) @ (codes.numpy() * np.float32(np.float16(0.1)))
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-4)
    # 0.1 is no half-precision number, 0.5 is one.
    for scale, exact in (("s", False), ("power", True)):
        single = graph(
            f"w_d = DequantizeLinear(w, {scale}, z) y = MatMul(x, w_d)",
            "float power = {0.5}",
            x="float16[4,64] x",
            y="float16[4,64] y",
        )
        repaired(single, exact=exact)


def symmetric(x: npt.ArrayLike, step: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Rounds to int8 with zero point 0 and back."""
    step = np.asarray(step, np.float32)
    codes = np.clip(np.rint(np.asarray(x, np.float32) / step), -128, 127)
    return np.asarray(codes * step, np.float32)


@settings(max_examples=30, deadline=None)
@given(
    zero_point=st.integers(0, 255).filter(lambda code: code != 128),  # which is exact, or 0
    unsigned=st.booleans(),
    scale=st.floats(0.125, 8, width=32),
    seed=st.integers(0, 99),
)
def test_an_affine_activation_gets_the_symmetric_grid_of_its_range(
    zero_point: int, unsigned: bool, scale: float, seed: int
) -> None:
    dtype, code = ("uint8", zero_point) if unsigned else ("int8", zero_point - 128)
    model = graph(f"{pair(scale='a', zero='n')} {FC}", f"float a = {{{scale}}}, {dtype} n = {{{code}}}")
    x = np.random.default_rng(seed).uniform(-300 * scale, 300 * scale, (4, 64)).astype(np.float32)
    fixed = repaired(model, exact=False)
    low, high = -zero_point * scale, (255 - zero_point) * scale
    step = np.float32(max(-low, high) / 127)
    expected = np.maximum(x, 0) if zero_point == 0 else np.minimum(x, 0) if zero_point == 255 else x
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    result = run(fixed.model, {"x": x})["y"]
    product = symmetric(expected, step) @ (weight.numpy() * np.float32(0.1))
    # A value in the middle between two codes may fall to either side.
    np.testing.assert_allclose(result, product, rtol=1e-4, atol=float(30 * step))


def test_an_affine_weight_gets_the_symmetric_grid_of_its_range() -> None:
    stored = f"uint8 u = {{100}}, {tensor('uint8 wu', 64, 64)}"
    model = graph(f"{pair()} w_d = DequantizeLinear(wu, s, u) y = MatMul(x_d, w_d)", stored)
    fixed = repaired(model, exact=False)
    weight = model.graph.initializers["wu"].const_value
    assert weight is not None
    values = (weight.numpy().astype(np.float32) - 100) * np.float32(0.05)
    (codes,) = (value for value in fixed.model.graph.initializers.values() if value.shape == [64, 64])
    assert codes.const_value is not None
    step = np.float32(155 * 0.05 / 127)
    np.testing.assert_allclose(codes.const_value.numpy() * step, symmetric(values, step), rtol=1e-5)


INFINITE = "float inf = {inf}, float nan = {nan}"


@pytest.mark.parametrize(
    "body",
    [
        "q = QuantizeLinear(x, inf, z) y = DequantizeLinear(q, inf, z)",  # the pair makes the output
        "q = QuantizeLinear(x, inf, z) y = Relu(x)",  # nothing reads it
        "q = QuantizeLinear(x, inf, z) c = Clip(q) d = DequantizeLinear(c, inf, z) y = Relu(d)",
    ],
)
def test_some_pairs_that_no_scale_fits_cannot_be_removed(body: str) -> None:
    fixed = fix(graph(body, INFINITE))
    assert "E4" not in {each.rule for each in fixed.fixes}
    assert "E4" in {finding.rule for finding in fixed.findings}
    ir.to_proto(fixed.model)


@pytest.mark.parametrize("scale", ["inf", "nan"])
def test_codes_are_not_stored_where_no_scale_fits(scale: str, tmp_path: Path) -> None:
    model = graph(
        f"{pair('masks', scale=scale)} m = Add(masks_d, x) y = Softmax(m)", f"{INFINITE}, {tensor('float masks', 64)}"
    )
    exact = fix(model, exact_only=True)
    save(exact.model, tmp_path / "exact.onnx")
    assert not exact.fixes
    assert operators(repaired(model, exact=False).model) == ["Add", "Softmax"]


@pytest.mark.parametrize("mask", ["x", "masks"])
def test_what_no_scale_fits_stays_in_float(mask: str) -> None:
    """ONNX Runtime's quantizer gives scores behind a mask of -inf, and the mask, an infinite scale."""
    constants = "float inf = {inf}, float[64] masks = {" + ", ".join(["0", "-inf"] * 32) + "}"
    model = graph(f"{pair(mask, scale='inf')} m = Add({mask}_d, x) y = Softmax(m)", constants)
    fixed = repaired(model, exact=False)
    assert operators(fixed.model) == ["Add", "Softmax"]
    assert [fix.rule for fix in fixed.fixes] == ["E4"]


def test_pairs_for_operators_that_compute_in_float_are_removed() -> None:
    model = graph(f"{pair(zero='n')} a = Add(x_d, bias) {pair('a', zero='n')} y = Softmax(a_d)", "int8 n = {-5}")
    assert operators(repaired(model, exact=False).model) == ["Add", "Softmax"]


@pytest.mark.parametrize(
    ("zero_point", "body", "expected"),
    [
        # The lowest code stood for 0: a Relu may have been left out for it.
        (-128, f"{pair(zero='n')} y = Softmax(x_d)", ["Relu", "QuantizeLinear", "DequantizeLinear", "Softmax"]),
        (127, f"{pair(zero='n')} y = Softmax(x_d)", ["Min", "QuantizeLinear", "DequantizeLinear", "Softmax"]),
        (-128, f"p = Sigmoid(x) {pair('p', zero='n')} y = Softmax(p_d)", ["Sigmoid", "Softmax"]),
        # The Q/DQ pairs of a skip connection serve the convolution before it.
        (
            -5,
            f"{pair()} {DQ_K} c = {CONV}(x_d, k_d) {pair('skip', zero='n')} y = Add(c, skip_d)",
            ["QuantizeLinear", "DequantizeLinear"] * 2,
        ),
    ],
)
def test_what_is_left_of_a_pair_with_a_zero_point(zero_point: int, body: str, expected: list[str]) -> None:
    inputs = f"{IMAGE}, {IMAGE[:-1]}skip" if "skip" in body else "float[4,64] x"
    fixed = fix(graph(body, f"int8 n = {{{zero_point}}}", x=inputs))
    rest = ("Conv", "Add") if "skip" in body else ()
    found = [op for op in operators(fixed.model) if op not in rest]
    assert found == expected if not rest else found.count("QuantizeLinear") == expected.count("QuantizeLinear")
    assert {finding.severity for finding in fixed.findings} <= {Severity.WARNING}


UNREPAIRABLE = {
    "int16 is another grid": graph(f"{pair(zero='i')} {FC}", "int16 i = {0}"),
    "uint8 output": graph("y = QuantizeLinear(x, s, u)", "uint8 u = {0}", y="uint8[4,64] y"),
    "uint8 input": graph(
        "d = DequantizeLinear(x, s, u) y = Relu(d)", "uint8 u = {7}", x="uint8[4,64] x", y="float[4,64] y"
    ),
    "integers are computed on": graph(
        f"q = QuantizeLinear(x, s, u) c = Clip(q, u, u) x_d = DequantizeLinear(c, s, u) {FC}", "uint8 u = {7}"
    ),
    "two zero points": graph(
        f"q = QuantizeLinear(x, s, n) x_d = DequantizeLinear(q, s, m) {FC}", "int8 n = {3}, int8 m = {4}"
    ),
    "scales that do not move along": graph(
        f"{pair()} m = Reshape(w, square) w_d = DequantizeLinear<axis=1>(m, s64, z64) y = MatMul(x_d, w_d)"
    ),
    "a constant cast": graph("c = Cast<to=1>(w) y = MatMul(x, c)"),
    "a bias that is computed": graph("i = Cast<to=6>(x) y = DequantizeLinear(i, s)"),
    "the type is not told": graph(
        "w_d = DequantizeLinear(w, half, z) v_d = DequantizeLinear(w, s, z) y = MatMul(v_d, w_d)", "float half = {0.1}"
    ),
}


@pytest.mark.parametrize("reason", UNREPAIRABLE)
def test_what_cannot_be_repaired_is_left_and_still_reported(reason: str) -> None:
    model = UNREPAIRABLE[reason]
    fixed = fix(model)
    assert fixed.fixes == ()
    errors = [finding for finding in fixed.findings if finding.severity is Severity.ERROR]
    assert errors
    assert not any(finding.fixable for finding in errors)
    assert operators(fixed.model) == operators(model)


def test_findings_are_data_and_lines() -> None:
    findings = [finding for case in (*ERROR_CASES, *WARNING_CASES) for finding in lint(case.model)]
    assert msgspec.json.decode(msgspec.json.encode(findings), type=list[Finding]) == findings
    text = "\n".join(line.plain for line in (*findings_lines(findings), *findings_lines(())))
    errors = len(ERROR_CASES)
    assert f"{errors} errors, {len(findings) - errors} warnings" in text
    assert re.search(r"  \.\.\. and \d+ more\n", text)
    assert text.endswith("nothing found")
    shown = [finding for finding in findings if f"  {finding.node}: {finding.message}\n" in text]
    assert {finding.rule for finding in shown} == {finding.rule for finding in findings}
    repairs = [line.plain for line in fixes_lines(fix(EXACT_CASES[0][1]).fixes)]
    assert repairs[0].startswith("rule  nodes")
    assert "shifted" in repairs[1]


@pytest.mark.rtx
def test_what_qonnx_writes_is_clean(tmp_path: Path) -> None:
    from models import residual

    example = residual.build()
    path = export(
        example.module, example.args, tmp_path / "float.onnx", dynamic_shapes=example.dynamic_shapes, verify=False
    )
    quantized = quantize(path, list(residual.calibration(3, 4)), tmp_path / "quantized.onnx", target="a800").output
    assert lint(quantized) == ()
    fixed = fix(quantized)
    assert fixed.fixes == ()


@pytest.mark.models
@pytest.mark.rtx
def test_the_defaults_of_onnx_runtime_are_refused_and_build_after_repair(tmp_path: Path) -> None:
    import onnxruntime.quantization as ort_quantization

    from models import minilm

    example = minilm.build()
    path = export(
        example.module, example.args, tmp_path / "float.onnx", dynamic_shapes=example.dynamic_shapes, verify=False
    )
    batches = list(minilm.calibration(6, 2, 32))

    class Reader(ort_quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter(batches[:4])

        def get_next(self) -> dict[str, npt.NDArray[np.int64]] | None:
            return next(self._batches, None)

    ort_quantization.quantize_static(path, tmp_path / "ort.onnx", Reader())
    dims = {"sequence": (1, 64, 128)}
    with pytest.raises(EngineError, match="Int32"):
        build_engine(tmp_path / "ort.onnx", tmp_path / "ort.plan", dims=dims)
    findings = lint(tmp_path / "ort.onnx")
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    assert {finding.rule for finding in errors} == {"E1", "E7"}
    assert all(finding.fixable for finding in errors)

    fixed = fix(tmp_path / "ort.onnx")
    assert [finding.rule for finding in fixed.findings] == ["E11"]
    assert {each.exact for each in fixed.fixes if each.rule == "E7"} == {True}
    save(fixed.model, tmp_path / "fixed.onnx")
    engine = build_engine(tmp_path / "fixed.onnx", tmp_path / "fixed.plan", dims=dims)
    products = [node.name or "" for node in fixed.model.graph if node.op_type == "MatMul"]
    assert len(products) == 48
    assert [answer.node for answer in int8_nodes(engine.layers, products) if not answer.int8] == []

    # The repair is approximate, and takes away most roundings that ONNX Runtime's defaults make for nothing.
    before, after = (
        compare(path, tmp_path / name, batches[4:]).outputs[0].sqnr_db for name in ("ort.onnx", "fixed.onnx")
    )
    assert after > before + 2
