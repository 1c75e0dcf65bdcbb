"""The roofline of graphs: operations and bytes that were counted by hand, and totals of known networks."""

import glob
from collections.abc import Mapping
from pathlib import Path

import msgspec
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from models import minilm, mobilenet
from qonnx.devices import Format, device
from qonnx.errors import ModelError, RecipeError, TargetError
from qonnx.exporter import export
from qonnx.graph import load, save
from qonnx.numerics import Blocked, Dtype, PerTensor
from qonnx.passes.prepare import prepare
from qonnx.placement import Edge, place
from qonnx.plan import LayerPlan, QuantPlan, TensorPlan
from qonnx.recipe import Recipe
from qonnx.resolve import resolve
from qonnx.roofline import LayerRoof, Roofline, Variant, roofline, unprofitable
from qonnx.targets import target
from qonnx.work import Bound, Work, gemm
from tests.graphs import model_of

A800 = device("a800")
FP16, INT8, INT4, PLAN = Variant

CONVOLUTIONS = (
    "g (float[n,16,8,8] x, float[32,16,3,3] w, float[32,1,3,3] d, float[32,32,1,1] p) => (float[n,32,8,8] y) {"
    "[conv] a = Conv<pads=[1,1,1,1]>(x, w) r = Relu(a)"
    "[depth] b = Conv<pads=[1,1,1,1], group=32>(r, d)"
    "[point] c = Conv(b, p) y = Relu(c) }"
)

ATTENTION = (
    "g (float[n,length,64] x, float[64,64] wq, float[64,64] wk, float[64,64] wv, float[64,64] wo)"
    " => (float[n,length,64] y) {"
    "[query] q = MatMul(x, wq) [key] k = MatMul(x, wk) [value] v = MatMul(x, wv)"
    "[turn] t = Transpose<perm=[0,2,1]>(k)"
    "[scores] s = MatMul(q, t) f = Constant<value=float {0.125}>() u = Mul(s, f) p = Softmax<axis=-1>(u)"
    "[mix] o = MatMul(p, v) [out] y = MatMul(o, wo) }"
)


def of(text: str, dims: Mapping[str, int] | None = None, opset: int = 21, plan: QuantPlan | None = None) -> Roofline:
    return roofline(prepared(text, opset), A800, dims=dims, plan=plan)


def prepared(text: str, opset: int = 21) -> ir.Model:
    model = model_of(text, weights="w d p wq wk wv wo b", opset=opset)
    prepare(model)
    return model


def planned(model: ir.Model, leave: Mapping[str, str] | None = None, dtype: Dtype = Dtype.INT8) -> QuantPlan:
    """A plan of the right edges; its scales do not matter here."""
    a800 = target("a800")
    placement = place(model, resolve(Recipe(), a800), a800, leave)
    layers = tuple(LayerPlan(layer.node, layer.op, layer.output, reason=layer.reason) for layer in placement.layers)
    activations = tuple(TensorPlan(v, e, dtype, PerTensor(), (1.0,)) for v, e in placement.activations.items())
    weights = tuple(TensorPlan(v, e, dtype, PerTensor(), (1.0,)) for (v, *_), e in placement.weights.items())
    return QuantPlan("a800", "int8", activations, weights, layers)


def layer(result: Roofline, node: str) -> LayerRoof:
    return next(entry for entry in result.layers if entry.node == node)


def traffic(result: Roofline, node: str, variant: Variant) -> tuple[int, int, int]:
    """Bytes of inputs, weights and outputs."""
    work = layer(result, node).work[variant]
    return work.inputs, work.weights, work.outputs


def others(result: Roofline, variant: Variant = FP16) -> dict[str, int]:
    return {other.op: other.bytes[variant] for other in result.others}


# Convolutions


def test_convolutions_by_hand() -> None:
    result = of(CONVOLUTIONS)
    assert result.dims == {"n": 1}
    assert [(entry.node, entry.op, entry.work[FP16].flop) for entry in result.layers] == [
        ("conv", "Conv", 2 * 32 * 64 * 16 * 9),
        ("depth", "Conv", 2 * 32 * 64 * 9),
        ("point", "Conv", 2 * 32 * 64 * 32),
    ]
    assert result.flop == 589_824 + 36_864 + 131_072
    assert traffic(result, "conv", FP16) == (16 * 64 * 2, 32 * 16 * 9 * 2, 32 * 64 * 2)
    assert traffic(result, "depth", FP16) == (32 * 64 * 2, 32 * 9 * 2, 32 * 64 * 2)
    assert traffic(result, "point", FP16) == (32 * 64 * 2, 32 * 32 * 2, 32 * 64 * 2)
    # x is read as FP16 and written as INT8 by a kernel of its own, then read: 2 + 1 + 1 bytes.
    assert traffic(result, "conv", INT8) == (16 * 64 * 4, 32 * 16 * 9, 32 * 64)
    assert traffic(result, "depth", INT8) == (32 * 64, 32 * 9, 32 * 64)
    assert traffic(result, "point", INT8) == (32 * 64, 32 * 32, 32 * 64 * 2)  # the caller gets floats
    # Weights in INT4 are for matrix products only.
    for node in ("conv", "depth", "point"):
        assert layer(result, node).work[INT4] == layer(result, node).work[FP16]
    assert result.others == ()
    assert all(entry.work[INT8].format is Format.INT8 for entry in result.layers)


def test_the_whole_graph_takes_the_sum_of_its_layers() -> None:
    result = of(CONVOLUTIONS, {"n": 32})
    for variant in (FP16, INT8, INT4):
        total = sum(entry.work[variant].seconds(A800) for entry in result.layers)
        assert result.seconds(variant) == pytest.approx(total)
    # 32 images: conv moves 65536 + 9216 + 131072, depth 262144 + 576, point 262144 + 2048 bytes, all bound by memory
    assert {entry.work[FP16].bound(A800) for entry in result.layers} == {Bound.MEMORY}
    assert result.seconds(FP16) == pytest.approx((205_824 + 262_720 + 264_192) / 2.039e12)
    assert result.seconds(INT8) == pytest.approx(
        (131_072 + 4608 + 65_536 + 131_360 + 65_536 + 1024 + 131_072) / 2.039e12
    )
    assert result.speedup(INT8) == pytest.approx(732_736 / 530_208)
    assert result.speedup(FP16) == result.speedup(INT4) == 1


def test_an_empty_graph_gains_nothing() -> None:
    result = of("g (float[n] x) => (float[n] y) { y = Identity(x) }")
    assert (result.layers, result.others, result.speedup(INT8)) == ((), (), 1)


@pytest.mark.parametrize(
    ("text", "flop"),
    [
        # Every input element meets 8 output channels in each of 2 groups, through 2 x 2 weights.
        (
            "g (float[3,4,5,5] x, float[4,8,2,2] w) => (float y)"
            "{ [it] y = ConvTranspose<group=2, strides=[2,2]>(x, w) }",
            2 * 3 * 4 * 25 * 8 * 4,
        ),
        ("g (float[3,4,10] x, float[6,2,3] w) => (float y) { [it] y = Conv<group=2>(x, w) }", 2 * 3 * 6 * 8 * 2 * 3),
        ("g (float[7,5] x, float[7,6] w, float[6] b) => (float y) { [it] y = Gemm<transA=1>(x, w, b) }", 2 * 5 * 6 * 7),
        ("g (float[5,7] x, float[6,7] w) => (float y) { [it] y = Gemm<transB=1>(x, w) }", 2 * 5 * 6 * 7),
        ("g (float[2,1,5,7] x, float[3,7,6] w) => (float y) { [it] y = MatMul(x, w) }", 2 * 2 * 3 * 5 * 6 * 7),
        ("g (float[5,7] x, float[7] w) => (float y) { [it] y = MatMul(x, w) }", 2 * 5 * 7),
        ("g (float[2,5,7] x, float[2,7,6] z) => (float y) { [it] y = MatMul(x, z) }", 2 * 2 * 5 * 6 * 7),
    ],
    ids=["transposed", "grouped", "gemm-a", "gemm-b", "batched", "vector", "computed"],
)
def test_operations(text: str, flop: int) -> None:
    (entry,) = of(text).layers
    assert {work.flop for work in entry.work.values()} == {flop}


# Matrix products and attention


def test_a_linear_layer_is_the_gemm_primitive() -> None:
    result = of(
        "g (float[n,256] x, float[256,512] w) => (float[n,512] y) { z = Relu(x) [fc] y = MatMul(z, w) }", {"n": 40}
    )
    work = layer(result, "fc").work
    assert work[FP16] == gemm(40, 512, 256)
    assert (work[INT4].weights, work[INT4].scales, work[INT4].format) == (256 * 512 // 2, 512 * 2 * 2, Format.FP16)
    assert (work[INT8].inputs, work[INT8].weights, work[INT8].outputs) == (40 * 256, 256 * 512, 40 * 512 * 2)
    # Relu has no product before it: a kernel of its own, which writes integers in INT8.
    assert others(result) == {"Relu": 40 * 256 * 4}
    assert others(result, INT8) == {"Relu": 40 * 256 * 3}


def test_attention_by_hand() -> None:
    result = of(ATTENTION, {"n": 2, "length": 32})
    tokens, width = 2 * 32, 64
    flops = {entry.node: entry.work[FP16].flop for entry in result.layers}
    assert flops == {
        **dict.fromkeys(("query", "key", "value", "out"), 2 * tokens * width * width),
        **dict.fromkeys(("scores", "mix"), 2 * 2 * 32 * 32 * width),
    }
    size = tokens * width
    for node in ("query", "key", "value"):
        assert traffic(result, node, FP16) == (2 * size, 2 * width * width, 2 * size)
    # Scores and probabilities stay on the chip; what is left of [scores] besides Q and K is the constant 0.125.
    assert traffic(result, "scores", FP16) == (4 * size + 2, 0, 0)
    assert traffic(result, "mix", FP16) == (2 * size, 0, 2 * size)
    assert result.others == ()
    # In INT8 the first projection pays for the conversion of x.
    assert traffic(result, "query", INT8) == (4 * size, width * width, size)
    assert traffic(result, "key", INT8) == (size, width * width, size)
    assert traffic(result, "scores", INT8) == (2 * size + 2, 0, 0)
    assert traffic(result, "mix", INT8) == (size, 0, size)
    assert traffic(result, "out", INT8) == (size, width * width, 2 * size)
    assert {entry.work[INT8].format for entry in result.layers} == {Format.INT8}
    assert layer(result, "scores").work[INT4] == layer(result, "scores").work[FP16]


def test_scores_or_probabilities_that_someone_else_reads_go_through_memory() -> None:
    probabilities = ATTENTION.replace(
        "=> (float[n,length,64] y)", "=> (float[n,length,64] y, float[n,length,length] p)"
    )
    result = of(probabilities, {"n": 2, "length": 32})
    scores = 2 * 32 * 32 * 2
    assert traffic(result, "scores", FP16)[2] == scores
    assert others(result) == {"Softmax": 2 * scores}
    assert traffic(result, "mix", FP16)[0] == scores + 2 * 2 * 32 * 64

    both = ATTENTION.replace("=> (float[n,length,64] y)", "=> (float[n,length,64] y, float[n,length,length] u)")
    assert others(of(both, {"n": 2, "length": 32})) == {"Softmax": 2 * scores}


@pytest.mark.parametrize(
    ("text", "flop", "inputs"),
    [
        # 4 query heads and 2 key heads of size 16: each of 4 x 8 queries meets 10 keys, twice.
        (
            "g (float[2,4,8,16] q, float[2,2,10,16] k, float[2,2,10,16] v) => (float y){ [it] y = Attention(q, k, v) }",
            2 * 2 * (2 * 4 * 8 * 16) * 10,
            2 * (2 * 4 * 8 * 16 + 2 * (2 * 2 * 10 * 16)),
        ),
        (
            "g (float[2,8,64] q, float[2,10,32] k, float[2,10,32] v) => (float y)"
            "{ [it] y = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v) }",
            2 * 2 * (2 * 4 * 8 * 16) * 10,
            2 * (2 * 4 * 8 * 16 + 2 * (2 * 2 * 10 * 16)),
        ),
        # One new token after 31: the keys of the cache count.
        (
            "g (float[1,4,1,16] q, float[1,4,1,16] k, float[1,4,1,16] v, float[1,4,31,16] a, float[1,4,31,16] b)"
            " => (float y, float c, float d) { [it] y, c, d = Attention(q, k, v, , a, b) }",
            2 * 2 * (4 * 16) * 32,
            2 * (3 * 4 * 16 + 2 * 4 * 31 * 16),
        ),
    ],
    ids=["grouped-queries", "flat", "cache"],
)
def test_the_attention_operator(text: str, flop: int, inputs: int) -> None:
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 23]>\n' + text)
    (entry,) = roofline(model, A800).layers
    assert (entry.work[FP16].flop, entry.work[FP16].inputs) == (flop, inputs)
    # The planner leaves it in float.
    assert entry.work[INT8] == entry.work[FP16]


# What is fused and what is not


def test_a_residual_add_reads_the_other_summand() -> None:
    text = (
        "g (float[1,16,8,8] x, float[16,16,1,1] w, float[16,16,1,1] d) => (float[1,16,8,8] y) {"
        "[first] a = Conv(x, w) r = Relu(a) [second] b = Conv(r, d) [add] s = Add(b, r) y = Relu(s) }"
    )
    result = of(text)
    size = 16 * 64
    # r is the input of the second convolution and of the Add that is fused into it: read once.
    assert traffic(result, "second", FP16) == (2 * size, 2 * 256, 2 * size)
    assert traffic(result, "second", INT8) == (size, 256, 2 * size)
    skip = of(text.replace("Add(b, r)", "Add(b, x)"))
    assert traffic(skip, "second", FP16) == (4 * size, 2 * 256, 2 * size)


def test_values_read_as_float_and_as_integers_are_written_twice() -> None:
    result = of(
        "g (float[4,64] x, float[64] b, float[64,64] w) => (float[4,64] y)"
        "{ [norm] h = LayerNormalization(x, b) [fc] m = MatMul(h, w) y = Add(m, h) }"
    )
    size = 4 * 64
    assert others(result, FP16) == {"LayerNormalization": 2 * size + 2 * 64 + 2 * size}
    assert others(result, INT8) == {"LayerNormalization": 2 * size + 2 * 64 + 3 * size}
    assert traffic(result, "fc", FP16) == (2 * size, 2 * 64 * 64, 2 * size)
    assert traffic(result, "fc", INT8) == (3 * size, 64 * 64, 2 * size)


def test_an_operator_is_not_fused_into_a_kernel_that_another_operand_waits_for() -> None:
    # The gate is computed from a, so that multiplying a by it cannot be part of the kernel that makes a.
    text = (
        "g (float[1,16,8,8] x, float[16,16,1,1] w, float[16,16,1,1] d) => (float[1,16,8,8] y) {"
        "[first] a = Conv(x, w) m = GlobalAveragePool(a) [gate] g = Conv(m, d) s = Sigmoid(g) [scale] y = Mul(a, s) }"
    )
    result = of(text)
    size = 2 * 16 * 64
    assert traffic(result, "first", FP16) == (size, 512, size)
    assert traffic(result, "gate", FP16) == (32, 512, 32)
    assert others(result) == {"GlobalAveragePool": size + 32, "Mul": size + 32 + size}


def test_moving_data_costs_nothing_of_its_own() -> None:
    text = (
        "g (float[2,8,64] x, float[64,192] w, float[64,64] d) => (float[2,8,64] y) {"
        "[qkv] a = MatMul(x, w) l = Constant<value=int64[1] {64}>() h = Constant<value=int64[1] {128}>()"
        "z = Constant<value=int64[1] {2}>() part = Slice(a, l, h, z)"
        "shape = Constant<value=int64[2] {16, 64}>() flat = Reshape(part, shape) [fc] b = MatMul(flat, d)"
        "back = Constant<value=int64[3] {2, 8, 64}>() y = Reshape(b, back) }"
    )
    result = of(text)
    assert traffic(result, "qkv", FP16)[2] == 2 * 16 * 192  # written whole
    assert traffic(result, "fc", FP16)[0] == 2 * 16 * 64  # a third of it is read
    assert result.others == ()


def test_a_concat_is_written_by_those_who_make_its_parts() -> None:
    result = of(
        "g (float[1,16,8,8] x, float[16,16,1,1] w, float[16,16,1,1] d, float[8,32,1,1] p) => (float[1,8,8,8] y) {"
        "[left] a = Conv(x, w) [right] b = Conv(x, d) c = Concat<axis=1>(a, b) [both] y = Conv(c, p) }"
    )
    assert traffic(result, "left", INT8)[2] == traffic(result, "right", INT8)[2] == 16 * 64
    assert traffic(result, "both", INT8)[0] == 32 * 64
    assert result.others == ()


def test_pooling_between_convolutions_stays_on_integers() -> None:
    result = of(
        "g (float[1,16,8,8] x, float[16,16,1,1] w, float[16,16,1,1] d) => (float[1,16,4,4] y) {"
        "[left] a = Conv(x, w) m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a) [right] y = Conv(m, d) }"
    )
    assert others(result, FP16) == {"MaxPool": 2 * (16 * 64 + 16 * 16)}
    assert others(result, INT8) == {"MaxPool": 16 * 64 + 16 * 16}


def test_an_embedding_reads_the_rows_that_are_looked_up() -> None:
    result = of(
        "g (int64[n,10] ids, float[30000,64] w, float[64] b) => (float[n,10,64] y)"
        "{ e = Gather(w, ids) y = LayerNormalization(e, b) }"
    )
    assert others(result) == {"LayerNormalization": 2 * 640 + 2 * 64 + 2 * 640}


# What cannot be counted


def test_sizes_that_depend_on_the_data_are_noted() -> None:
    result = of(
        "g (float[8,64] x, float[64,64] w, float[64,64] d) => (float y, float[8,64] z) {"
        "m = ReduceMax<keepdims=0>(x) q = Greater(x, m) i = NonZero(q) t = Transpose<perm=[1,0]>(i)"
        "rows = GatherND(x, t) one = Constant<value=int64[2] {-1, 64}>() r = Reshape(rows, one)"
        "[unknown] y = MatMul(r, w) [known] z = MatMul(x, d) }"
    )
    assert [entry.node for entry in result.layers] == ["known"]
    assert "1 layers are left out, such as 'unknown': their sizes depend on the data" in result.notes


def test_bodies_and_recurrences_are_noted() -> None:
    result = of(
        "g (bool c, float[4,64] x) => (float[4,64] y) { y = If(c) <"
        "then_branch = a () => (float[4,64] u) { u = Relu(x) }, else_branch = b () => (float[4,64] v) { v = Neg(x) }> }"
    )
    assert result.notes == ("the bodies of If, Loop and Scan are left out",)
    result = of(
        "g (float[4,1,8] x, float[1,32,8] w, float[1,32,8] d) => (float y) { y = LSTM<hidden_size=8>(x, w, d) }"
    )
    assert result.notes == ("the arithmetic of LSTM is left out, their traffic is counted",)
    assert others(result)["LSTM"] >= 2 * (4 * 8 + 2 * 32 * 8)


def test_int4_where_nothing_runs_it_is_said_to_be_hypothetical() -> None:
    model = prepared(CONVOLUTIONS)
    assert roofline(model, "t4").notes == (
        "TensorRT does not run weights in INT4 on sm_75: that variant is hypothetical",
    )
    assert roofline(model, "orin").notes == ()


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    text = (
        "g (float[4] x) => (float[4] y) { s = Constant<value=float {0.1}>() z = Constant<value=int8 {0}>()"
        "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
    )
    save(model_of(text), tmp_path / "m.onnx")
    for model in (model_of(text), tmp_path / "m.onnx"):
        with pytest.raises(ModelError, match="quantized already; give the float model, and its plan with --plan"):
            roofline(model, "a800")


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.onnx: no such file"):
        roofline(tmp_path / "none.onnx", "a800")


# Plans


@pytest.mark.parametrize(("text", "dims"), [(CONVOLUTIONS, {"n": 4}), (ATTENTION, {"n": 4, "length": 128})])
def test_a_plan_for_everything_is_the_int8_variant(text: str, dims: dict[str, int]) -> None:
    model = prepared(text)
    result = roofline(model, A800, dims=dims, plan=planned(model))
    for entry in result.layers:
        assert entry.work[PLAN].format is Format.INT8
        assert entry.work[PLAN].bytes <= entry.work[INT8].bytes
    assert result.seconds(PLAN) <= result.seconds(INT8)


def test_a_layer_left_in_float_costs_its_neighbours_too() -> None:
    model = prepared(CONVOLUTIONS)
    result = roofline(model, A800, plan=planned(model, leave={"depth": "a test"}))
    assert traffic(result, "depth", PLAN) == (32 * 64 * 2, 32 * 9 * 2, 32 * 64)  # writes integers for the next one
    assert layer(result, "depth").work[PLAN].format is Format.FP16
    assert traffic(result, "conv", PLAN)[2] == 32 * 64 * 2
    assert layer(result, "point").work[PLAN] == layer(result, "point").work[INT8]


def test_a_plan_from_a_file_and_weights_alone(tmp_path: Path) -> None:
    text = "g (float[n,256] x, float[256,512] w) => (float[n,512] y) { [fc] y = MatMul(x, w) }"
    model = prepared(text)
    blocked = TensorPlan("w", (Edge("fc", 1),), Dtype.INT4, Blocked(0, 64), (1.0,) * (4 * 512))
    plan = QuantPlan("a800", "int4", (), (blocked,), (LayerPlan("fc", "MatMul", "y"),))
    plan.save(tmp_path / "plan.json")
    work = layer(roofline(model, "a800", plan=tmp_path / "plan.json"), "fc").work[PLAN]
    assert work == Work(2 * 256 * 512, 2 * 256, 256 * 512 // 2, 2 * 4 * 512, 2 * 512, Format.FP16)


def test_an_edge_before_a_move_is_the_same_edge() -> None:
    model = prepared(ATTENTION)
    plan = planned(model)
    moved = [
        msgspec.structs.replace(tensor, value="k", edges=(Edge("turn", 0),)) if tensor.value == "t" else tensor
        for tensor in plan.activations
    ]
    early = msgspec.structs.replace(plan, activations=tuple(moved))
    dims = {"n": 2, "length": 32}
    expected = roofline(model, A800, dims=dims, plan=plan)
    assert roofline(model, A800, dims=dims, plan=early).layers == expected.layers


def test_an_edge_before_a_concat_is_another_edge() -> None:
    model = prepared(
        "g (float[1,16,8,8] x, float[1,16,8,8] z, float[8,32,1,1] p) => (float[1,8,8,8] y)"
        "{ [join] c = Concat<axis=1>(x, z) [it] y = Conv(c, p) }"
    )
    half = TensorPlan("x", (Edge("join", 0),), Dtype.INT8, PerTensor(), (1.0,))
    plan = QuantPlan("a800", "int8", (half,), (), ())
    work = layer(roofline(model, A800, plan=plan), "it").work
    assert work[PLAN] == work[FP16]


@pytest.mark.parametrize("kind", ["activations", "weights"])
def test_integers_are_multiplied_only_when_both_sides_are_integers(kind: str) -> None:
    model = prepared(CONVOLUTIONS)
    plan = msgspec.structs.replace(planned(model), **{kind: ()})
    for entry in roofline(model, A800, plan=plan).layers:
        assert entry.work[PLAN].format is Format.FP16
        assert entry.work[PLAN].bytes < entry.work[FP16].bytes or entry.node == "conv"


def test_fp8_counts_as_fp8_and_is_refused_without_it() -> None:
    model = prepared(CONVOLUTIONS)
    plan = planned(model, dtype=Dtype.FLOAT8E4M3FN)
    (entry, *_) = roofline(model, "h100", plan=plan).layers
    assert entry.work[PLAN].format is Format.FP8
    with pytest.raises(TargetError, match=r"a800-sxm-80 \(sm_80\) does not compute in fp8; use int8"):
        roofline(model, "a800", plan=plan)


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(RecipeError, match="the plan is for another model: it has no node 'conv'"):
        roofline(prepared(ATTENTION), "a800", dims={"length": 8}, plan=planned(prepared(CONVOLUTIONS)))


def test_the_result_is_json_that_reads_back() -> None:
    result = of(CONVOLUTIONS)
    assert msgspec.json.decode(msgspec.json.encode(result), type=Roofline) == result


# Layers that gain nothing


def test_a_layer_that_mostly_writes_floats_is_not_worth_it_and_the_planner_leaves_it() -> None:
    # 16 inputs, 1024 outputs: FP16 moves 32768 + 32768 + 2097152 bytes, INT8 16384 + 16384 + 2097152.
    text = (
        "g (float[n,16] x, float[16] b, float[16,1024] w, float[64,1024] z, float[16,64] d)"
        " => (float[n,1024] y, float[n,64] u) {"
        "h = LayerNormalization(x, b) [wide] y = MatMul(h, w) [small] u = MatMul(h, d) }"
    )
    model = prepared(text.replace(", float[64,1024] z", ""))
    result = roofline(model, A800, dims={"n": 1024})
    reasons = unprofitable(result)
    assert reasons == {"wide": "int8 saves 1.5% of its time on a800-sxm-80: bound by memory at these sizes"}
    assert unprofitable(result, threshold=0.01) == {}
    assert set(unprofitable(result, threshold=0.5)) == {"wide", "small"}

    a800 = target("a800")
    layers = place(model, resolve(Recipe(), a800), a800, leave=reasons).layers
    assert {entry.node: entry.reason for entry in layers} == {"wide": reasons["wide"], "small": ""}


def test_converting_the_image_can_cost_more_than_the_first_convolution_saves() -> None:
    result = of("g (float[n,3,32,32] x, float[16,3,1,1] w) => (float[n,16,32,32] y) { [stem] y = Conv(x, w) }")
    # 6 + 32 bytes for a pixel in FP16, 12 + 32 in INT8
    assert unprofitable(result) == {"stem": "int8 saves nothing on a800-sxm-80: bound by memory at these sizes"}


def test_large_products_are_worth_it_everywhere() -> None:
    text = "g (float[n,1024] x, float[1024,1024] w) => (float[n,1024] y) { z = Relu(x) [fc] y = MatMul(z, w) }"
    for batch in (1, 64, 4096):
        assert unprofitable(of(text, {"n": batch})) == {}


# Known networks


LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


@pytest.mark.parametrize(
    ("name", "gmac"),
    [("resnet50", 4.09), ("vgg19", 19.63), ("squeezenet", 0.35), ("shufflenet", 0.12)],
)
def test_networks_that_come_with_onnx(name: str, gmac: float) -> None:
    assert glob.glob(str(LIGHT / "*.onnx"))
    result = roofline(LIGHT / f"light_{name}.onnx", "a800")
    assert result.flop / 2e9 == pytest.approx(gmac, abs=0.006)
    assert 1.5 < result.speedup(INT8) <= 2
    assert result.notes == ()


@pytest.mark.models
def test_mobilenet(tmp_path: Path) -> None:
    example = mobilenet.build(224)
    path = export(example.module, example.args, tmp_path / "m.onnx", dynamic_shapes=example.dynamic_shapes)
    image = torch.zeros(1, 3, 224, 224)
    macs = 0

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal macs
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        macs += output.numel() * weight[0].numel()

    for module in example.module.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.inference_mode():
        example.module(image)

    result = roofline(path, "a800")
    assert result.dims == {"batch": 1}
    assert result.flop == 2 * macs == 2 * 300_774_272
    assert len(result.layers) == 53
    assert result.seconds(FP16) == pytest.approx(15e-6, rel=0.2)
    assert 1.7 < result.speedup(INT8) < 2
    assert unprofitable(result) == {}
    # All layers but the first few pixels are bound by memory, whatever the batch.
    large = roofline(path, "a800", dims={"batch": 64})
    assert large.flop == 64 * result.flop
    depthwise = [entry for entry in large.layers if entry.work[FP16].intensity < 5]
    assert len(depthwise) == 17
    model = load(path)
    prepare(model)
    plan = planned(model)
    assert roofline(model, "a800", plan=plan).speedup(PLAN) == pytest.approx(result.speedup(INT8), rel=0.02)


@pytest.mark.models
def test_minilm(tmp_path: Path) -> None:
    example = minilm.build()
    path = export(example.module, example.args, tmp_path / "m.onnx", dynamic_shapes=example.dynamic_shapes)
    result = roofline(path, "a800", dims={"sequence": 128})
    # 6 layers of 4 projections, 2 products of 4 times the width, and 2 products in attention.
    macs = 6 * 128 * (4 * 384**2 + 2 * 384 * 1536 + 2 * 128 * 384)
    assert result.flop == 2 * macs == 2 * 1_434_451_968
    assert len(result.layers) == 48
    assert others(result).keys() >= {"LayerNormalization"}
    assert "Softmax" not in others(result)
    # One sentence waits for the weights, so that 4 bits help; many are bound by arithmetic, so that only INT8 does.
    assert result.speedup(INT4) > 1.5
    many = roofline(path, "a800", dims={"sequence": 128, "batch": 64})
    assert many.speedup(INT4) < 1.02
    assert many.speedup(INT8) > 1.5
    model = load(path)
    prepare(model)
    sized = {"sequence": 128}
    assert roofline(model, "a800", dims=sized, plan=planned(model)).speedup(PLAN) == pytest.approx(
        result.speedup(INT8), rel=0.05
    )
