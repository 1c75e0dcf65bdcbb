"""The two layouts of FasterTransformer's INT8 BERT: what is quantized besides the operands of products."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qonnx
from qonnx.graph import load
from qonnx.numerics import PerAxis, PerTensor
from qonnx.passes.prepare import prepare
from qonnx.placement import Edge, Placement, place
from qonnx.recipe import Recipe, load_recipe
from qonnx.resolve import resolve
from qonnx.targets import target
from tests.graphs import model_of

ENCODER = (
    "g (float[2,32,64] x, float[64,64] wq, float[64,64] wk, float[64,64] wv, float[64] bq, float[64,64] wo, "
    "float[64] bo, float[64] s, float[64,128] w1, float[128,64] w2) => (float[2,32,64] y) {"
    "heads = Constant <value = int64[4] {2, 32, 4, 16}> () flat = Constant <value = int64[3] {2, 32, 64}> () "
    "[q] mq = MatMul(x, wq) q = Add(mq, bq) [k] k = MatMul(x, wk) [v] v = MatMul(x, wv) "
    "q4 = Reshape(q, heads) k4 = Reshape(k, heads) v4 = Reshape(v, heads) "
    "qt = Transpose <perm = [0,2,1,3]> (q4) kt = Transpose <perm = [0,2,3,1]> (k4) "
    "vt = Transpose <perm = [0,2,1,3]> (v4) [scores] a = MatMul(qt, kt) p = Softmax(a) [mix] o = MatMul(p, vt) "
    "ot = Transpose <perm = [0,2,1,3]> (o) r = Reshape(ot, flat) [out] mo = MatMul(r, wo) ao = Add(mo, bo) "
    "[sum1] z = Add(ao, x) n = LayerNormalization(z, s) [fc1] h = MatMul(n, w1) g = Gelu(h) [fc2] d = MatMul(g, w2) "
    "[sum2] e = Add(n, d) y = LayerNormalization(e, s) }"
)
NAMES = "wq wk wv bq wo bo s w1 w2"


def encoder() -> ir.Model:
    model = model_of(ENCODER, weights=NAMES, scale=0.2)
    prepare(model)
    return model


def placed(recipe: Recipe, name: str = "a800") -> Placement:
    return place(encoder(), resolve(recipe, target(name)), target(name))


def test_mode_1_quantizes_operands_and_nothing_else() -> None:
    mode1, usual = placed(load_recipe("bert-int8-mode1")), placed(Recipe())
    assert mode1.activations == usual.activations
    assert not any(edge.node in ("sum1", "sum2") for edges in mode1.activations.values() for edge in edges)


def test_mode_2_quantizes_results_of_products_and_residuals_too() -> None:
    mode1, mode2 = (placed(load_recipe(f"bert-int8-mode{mode}")) for mode in (1, 2))
    results = {"mq", "k", "v", "mo", "h", "d"}
    assert set(mode2.activations) - set(mode1.activations) == results
    assert Edge("sum1", 1) in mode2.activations["x"]
    assert Edge("sum2", 0) in mode2.activations["n"]
    assert Edge("sum1", 0) not in {edge for edges in mode2.activations.values() for edge in edges}
    assert len({mode2.ties[value] for value in ("mq", "k", "v")}) == 1
    assert len({mode2.ties[value] for value in results}) == 4


@pytest.mark.parametrize("name", ["a800", "ort-cpu"])
def test_both_modes_run_and_the_first_is_more_accurate(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    batches = [{"x": rng.standard_normal((2, 32, 64)).astype(np.float32)} for _ in range(8)]
    kept = []
    for mode in (1, 2):
        recipe = f"bert-int8-mode{mode}"
        result = qonnx.quantize(encoder(), batches, tmp_path / "q.onnx", recipe=recipe, target=name)
        kept.append(result.comparison.outputs[0].sqnr_db)
        kinds = {type(tensor.granularity) for tensor in result.plan.weights}
        assert kinds == ({PerAxis} if mode == 1 else {PerTensor})
        assert len(result.plan.quantized_layers) == len(result.plan.layers)
    assert kept[0] > kept[1] > 15
    scales = {tensor.value: tensor.scale for tensor in result.plan.activations}
    assert scales["mq"] == scales["k"] == scales["v"]
    assert "DequantizeLinear" in {node.op_type for node in load(tmp_path / "q.onnx").graph}
