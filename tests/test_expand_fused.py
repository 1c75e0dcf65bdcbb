"""Fused operators of ONNX Runtime written out compute what its own kernels compute."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qonnx
from qonnx.passes.expand_fused import ExpandFused
from qonnx.passes.infer_shapes import InferShapes
from qonnx.passes.prepare import prepare
from tests.graphs import model_of
from tests.helpers import assert_same_function, operators, random_feeds

WEIGHTS = "w b g h w3 b3 cw cb cz word position segment"
HIDDEN = "float[n,6,16] x, float[n,6,16] s, float[16] g, float[16] h, float[16] b"
HEADS = "float[n,6,16] x, float[16,48] w3, float[48] b3"
QKV = "float[n,6,16] q, float[n,5,16] k, float[n,5,32] v"
IDS = "int32[n,6] ids, int32[n,6] kinds, float[9,16] word, float[8,16] position, float[2,16] segment"
MAP = "float[n,4,5,5] x, float[8,4,3,3] cw, float[8] cb, float[n,8,3,3] z"

CASES = {
    "BiasGelu": (HIDDEN, "float[n,6,16] y", "y = com.microsoft.BiasGelu(x, b)"),
    "Gelu": (HIDDEN, "float[n,6,16] y", "y = com.microsoft.Gelu(x)"),
    "FastGelu": (HIDDEN, "float[n,6,16] y", "y = com.microsoft.FastGelu(x)"),
    "FastGelu with bias": (HIDDEN, "float[n,6,16] y", "y = com.microsoft.FastGelu(x, b)"),
    "QuickGelu": (HIDDEN, "float[n,6,16] y", "y = com.microsoft.QuickGelu<alpha = 1.5>(x)"),
    "SkipLayerNormalization": (
        HIDDEN,
        "float[n,6,16] y, float[n,6,16] t",
        "y, m, v, t = com.microsoft.SkipLayerNormalization<epsilon = 0.1>(x, s, g, h, b)",
    ),
    "SkipLayerNormalization of two": (HIDDEN, "float[n,6,16] y", "y = com.microsoft.SkipLayerNormalization(x, s, g)"),
    "SkipSimplifiedLayerNormalization": (
        HIDDEN,
        "float[n,6,16] y, float[n,6,16] t",
        "y, m, v, t = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.1>(x, s, g)",
    ),
    "SimplifiedLayerNormalization": (
        HIDDEN,
        "float[n,6,16] y",
        "y = SimplifiedLayerNormalization<axis = -1, epsilon = 0.01>(x, g)",
    ),
    "FusedMatMul": (
        "float[16,n] x, float[8,16] w",
        "float[n,8] y",
        "y = com.microsoft.FusedMatMul<alpha = 0.3, transA = 1, transB = 1>(x, w)",
    ),
    "FusedGemm": (
        "float[n,16] x, float[8,16] w, float[8] b",
        "float[n,8] y",
        'y = com.microsoft.FusedGemm<activation="LeakyRelu", activation_alpha=0.2, transB=1, alpha=0.5>(x, w, b)',
    ),
    "FusedConv": (
        MAP,
        "float[n,8,3,3] y",
        'y = com.microsoft.FusedConv<activation = "Clip", activation_params = [-1.0, 1.0]>(x, cw, cb)',
    ),
    "FusedConv with a sum": (
        MAP,
        "float[n,8,3,3] y",
        'y = com.microsoft.FusedConv<activation = "Relu", dilations = [1, 1]>(x, cw, cb, z)',
    ),
    "EmbedLayerNormalization": (
        f"{IDS}, float[16] g, float[16] h, int32[n,6] mask",
        "float[n,6,16] y, int32[n] m",
        "y, m = com.microsoft.EmbedLayerNormalization(ids, kinds, word, position, segment, g, h, mask)",
    ),
    "EmbedLayerNormalization without segments": (
        f"{IDS}, float[16] g, float[16] h",
        "float[n,6,16] y",
        "y, m = com.microsoft.EmbedLayerNormalization(ids, , word, position, , g, h)",
    ),
    "Attention": (HEADS, "float[n,6,16] y", "y = com.microsoft.Attention<num_heads = 2>(x, w3, b3)"),
    "Attention with a mask": (
        f"{HEADS}, int32[n,6] mask",
        "float[n,6,16] y",
        "y = com.microsoft.Attention<num_heads = 4, scale = 0.2>(x, w3, b3, mask)",
    ),
    "Attention with lengths": (
        f"{HEADS}, int32[n] mask",
        "float[n,6,16] y",
        "y = com.microsoft.Attention<num_heads = 2>(x, w3, b3, mask)",
    ),
    "causal Attention": (
        HEADS,
        "float[n,6,16] y",
        "y = com.microsoft.Attention<num_heads = 2, unidirectional = 1>(x, w3, b3)",
    ),
    "Attention with a bias": (
        f"{HEADS}, float[n,2,6,6] a",
        "float[n,6,16] y",
        "y = com.microsoft.Attention<num_heads = 2>(x, w3, b3, , , a)",
    ),
    "MultiHeadAttention": (
        f"{QKV}, int32[n,5] mask",
        "float[n,6,32] y",
        "y = com.microsoft.MultiHeadAttention<num_heads = 4>(q, k, v, , mask)",
    ),
}


def made(inputs: str, outputs: str, body: str) -> ir.Model:
    model = model_of(f"g ({inputs}) => ({outputs}) {{ [it] {body} }}", weights=WEIGHTS, scale=0.5)
    model.opset_imports["com.microsoft"] = 1
    return model


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    found = random_feeds(model)
    mask = found.get("mask")
    if mask is not None:  # padding at the end, and at least one token
        lengths = np.arange(1, len(mask) + 1, dtype=np.int32)
        tokens = np.arange(mask.shape[-1])
        found["mask"] = lengths if mask.ndim == 1 else (lengths[:, None] > tokens).astype(np.int32)
    return found


@pytest.mark.parametrize(("inputs", "outputs", "body"), CASES.values(), ids=CASES.keys())
def test_expanded_operators_compute_the_same(inputs: str, outputs: str, body: str) -> None:
    model = made(inputs, outputs, body)
    before = model.clone()
    InferShapes()(model)
    assert ExpandFused()(model).modified
    assert not ExpandFused()(model).modified
    assert not model.functions
    assert {node.domain for node in model.graph} == {""}
    assert all((node.name or "").startswith("it/") for node in model.graph)
    assert_same_function(before, model, feeds(before), rtol=1e-4)


LEFT = {
    "an opset without Gelu": (HIDDEN, "y = com.microsoft.BiasGelu(x, b)", 19),
    "an activation that Gemm has no word for": (
        "float[n,16] x, float[8,16] w, float[8] b",
        'y = com.microsoft.FusedGemm<activation = "Elu", transB = 1>(x, w, b)',
        21,
    ),
    "results for training": (HIDDEN, "a, y = com.microsoft.SkipLayerNormalization(x, s, g)", 21),
    "a past": (
        f"{HEADS}, float[2,n,2,3,8] past",
        "y, present = com.microsoft.Attention<num_heads = 2>(x, w3, b3, , past)",
        21,
    ),
    "a mask of unknown rank": (
        f"{HEADS}, int32[n,6,6] mask",
        "y = com.microsoft.Attention<num_heads = 2>(x, w3, b3, mask)",
        21,
    ),
    "rotary positions": (HEADS, "y = com.microsoft.Attention<num_heads = 2, do_rotary = 1>(x, w3, b3)", 21),
    "another domain": (HIDDEN, "y = com.example.BiasGelu(x, b)", 21),
}


@pytest.mark.parametrize(("inputs", "body", "opset"), LEFT.values(), ids=LEFT.keys())
def test_leaves_alone(inputs: str, body: str, opset: int) -> None:
    model = model_of(f"g ({inputs}) => (float[?,?,?] y) {{ {body} }}", weights=WEIGHTS, opset=opset)
    before = ir.to_onnx_text(model)
    assert not ExpandFused()(model).modified
    assert ir.to_onnx_text(model) == before


BERT = """g (float[n,16,16] x, float[16,48] w3, float[48] b3, float[16,16] w, float[16] b, float[16] g, float[16] h)
    => (float[n,16,16] y) {
    [att] a = com.microsoft.Attention<num_heads = 1>(x, w3, b3)
    o = MatMul(a, w)
    [skip] s = com.microsoft.SkipLayerNormalization(o, x, g, h, b)
    y = MatMul(s, w) }"""


def test_a_graph_of_the_optimizer_is_quantized_throughout(tmp_path: Path) -> None:
    model = model_of(BERT, weights=WEIGHTS, opset=13, scale=0.3)
    model.opset_imports["com.microsoft"] = 1
    prepared = model.clone()
    notes = prepare(prepared)
    assert "wrote 1 Attention, 1 SkipLayerNormalization of ONNX Runtime in operators of ONNX" in notes
    assert operators(prepared).count("MatMul") == 5
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((8, 16, 16)).astype(np.float32)} for _ in range(6)]
    result = qonnx.quantize(model, data, tmp_path / "q.onnx")
    assert len(result.plan.quantized_layers) == 5
    assert result.comparison.outputs[0].sqnr_db > 25
