"""Plans that are fed back: as they were made, with reasons written by hand, and read from files."""

from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

import qonnx
from qonnx.graph import load
from qonnx.inspector import read_back
from qonnx.layers import Edge
from qonnx.plan import QuantPlan
from qonnx.recipe import Match, Rule, load_recipe
from tests.graphs import model_of

# Two heads of 16, cut from one projection; what attention makes is read by a product that is too narrow for integers.
ATTENTION = (
    "g (float[n,16,32] x, float[32,96] w, float[32,10] o) => (float[n,16,10] y) "
    "<int64[3] parts = {32,32,32}, int64[4] heads = {0,16,2,16}, int64[3] joined = {0,16,32}> {"
    "[project] all = MatMul(x, w) q, k, v = Split <axis = -1> (all, parts)"
    "hq = Reshape(q, heads) [queries] tq = Transpose <perm = [0,2,1,3]> (hq)"
    "hk = Reshape(k, heads) [keys] tk = Transpose <perm = [0,2,3,1]> (hk)"
    "hv = Reshape(v, heads) [values] tv = Transpose <perm = [0,2,1,3]> (hv)"
    "[qk] s = MatMul(tq, tk) p = Softmax <axis = -1> (s) [pv] r = MatMul(p, tv)"
    "tr = Transpose <perm = [0,2,1,3]> (r) c = Reshape(tr, joined) [narrow] y = MatMul(c, o) }"
)


def attention() -> ir.Model:
    return model_of(ATTENTION, weights="w o", scale=0.15)


def data(*shape: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((8, *shape)).astype(np.float32)} for _ in range(8)]


def edges(plan: QuantPlan) -> set[Edge]:
    return {edge for tensor in (*plan.activations, *plan.weights) for edge in tensor.edges}


def with_reasons(plan: QuantPlan, *nodes: str) -> QuantPlan:
    """The plan, edited by hand."""
    layers = tuple(
        msgspec.structs.replace(layer, reason="I say so") if layer.node in nodes else layer for layer in plan.layers
    )
    return msgspec.structs.replace(plan, layers=layers)


def test_what_an_attention_makes_stays_on_integers_for_a_layer_in_float(tmp_path: Path) -> None:
    """TensorRT makes one kernel of an attention only where its result is quantized, whoever reads that."""
    model, stream = attention(), data(16, 32)
    result = qonnx.quantize(model, stream, tmp_path / "one.onnx")
    assert [layer.node for layer in result.plan.float_layers] == ["narrow"]
    again = qonnx.quantize(model, stream, tmp_path / "two.onnx", plan=result.plan)
    assert again.plan == result.plan
    assert (tmp_path / "two.onnx").read_bytes() == (tmp_path / "one.onnx").read_bytes()


@pytest.mark.parametrize("recipe", ["bert-int8-mode2", "int8"])
def test_the_result_of_a_product_stays_on_integers_for_a_layer_in_float(recipe: str, tmp_path: Path) -> None:
    """The plan says what is rounded, whatever the recipe that is given with it wants."""
    text = "g (float[n,32] x, float[32,32] w, float[32,10] o) => (float[n,10] y) { m = MatMul(x, w) y = MatMul(m, o) }"
    model, stream = model_of(text, weights="w o", scale=0.3), data(32)
    result = qonnx.quantize(model, stream, tmp_path / "one.onnx", recipe="bert-int8-mode2")
    (narrow,) = result.plan.float_layers
    assert Edge(narrow.node, 0) in edges(result.plan)
    again = qonnx.quantize(model, stream, tmp_path / "two.onnx", recipe=recipe, plan=result.plan)
    assert again.plan == result.plan


@pytest.mark.parametrize("left", [("qk", "pv"), ("project",), ("qk", "pv", "project")], ids="+".join)
def test_a_reason_written_by_hand_says_what_a_rule_says(left: tuple[str, ...], tmp_path: Path) -> None:
    """Operands that are rounded in front of a Transpose go with their layer, and what others need is left."""
    model, stream = attention(), data(16, 32)
    whole = qonnx.quantize(model, stream, tmp_path / "one.onnx", recipe="int8-unsmoothed").plan
    rules = tuple(Rule(Match(name=node), skip=True) for node in left)
    recipe = msgspec.structs.replace(load_recipe("int8-unsmoothed"), rules=rules)
    wanted = qonnx.quantize(model, stream, tmp_path / "two.onnx", recipe=recipe).plan
    result = qonnx.quantize(model, stream, tmp_path / "three.onnx", plan=with_reasons(whole, *left))
    assert edges(result.plan) == edges(wanted) < edges(whole)
    again = qonnx.quantize(model, stream, tmp_path / "four.onnx", plan=result.plan)
    assert again.plan == result.plan


@pytest.mark.parametrize("target", ["a800", "ort-cpu"])
def test_a_plan_that_was_read_back_rounds_the_same_tensors(target: str, tmp_path: Path) -> None:
    model, stream = attention(), data(16, 32)
    plan = qonnx.quantize(model, stream, tmp_path / "one.onnx", target=target, recipe="int8-unsmoothed").plan
    back = read_back(load(tmp_path / "one.onnx"))
    assert back.plan.layers == plan.layers
    result = qonnx.quantize(model, stream, tmp_path / "two.onnx", target=target, plan=back.plan)
    assert edges(result.plan) == edges(plan)
