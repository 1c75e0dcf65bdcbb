"""What a layer costs alone is what the model loses when it is the only one that is quantized."""

import math

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

from qonnx.bias_correction import correct_biases
from qonnx.comparison import difference
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.plan import QuantPlan
from qonnx.recipe import Match, Recipe, Rule, load_recipe
from qonnx.sensitivity import LayerCost, layer_costs, most_costly
from tests.graphs import model_of
from tests.helpers import run
from tests.test_plan import planned

Batches = list[dict[str, np.ndarray]]


def without(*nodes: str) -> Recipe:
    """A recipe that leaves some nodes in float."""
    rules = tuple(Rule(Match(name=node), skip=True) for node in nodes)
    return msgspec.structs.replace(load_recipe("int8-average"), rules=rules)


NETWORKS = {
    "products": (
        "g (float[8,32] x, float[32,64] w1, float[64] b, float[64,32] w2) => (float[8,32] y) "
        "{ [first] a = Gemm(x, w1, b) r = Relu(a) [second] y = MatMul(r, w2) }"
    ),
    "a residual block and pooling": (
        "g (float[1,16,8,8] x, float[16,16,3,3] w1, float[16,16,3,3] w2, float[16,16,1,1] w3) => (float[1,16,4,4] y) "
        "{ [first] a = Conv <pads = [1,1,1,1]> (x, w1) r = Relu(a) [second] c = Conv <pads = [1,1,1,1]> (r, w2) "
        "s = Add(c, x) t = Relu(s) m = MaxPool <kernel_shape = [2,2], strides = [2,2]> (t) [third] y = Conv(m, w3) }"
    ),
    "two outputs of one projection in attention": (
        "g (float[1,32,64] x, float[64,192] w1, float[64,64] w2) => (float[1,32,64] y, int64[1,32,1] top) "
        "{ [project] a = MatMul(x, w1) q, k, v = Split <axis = -1, num_outputs = 3> (a) "
        "kt = Transpose <perm = [0,2,1]> (k) [scores] s = MatMul(q, kt) p = Softmax(s) [mix] c = MatMul(p, v) "
        "[out] y = MatMul(c, w2) top = ArgMax <axis = -1> (y) }"
    ),
    "layers that share a transposed weight": (
        "g (float[8,128] x, float[128,128] w1) => (float[8,128] y) "
        "{ t = Transpose(w1) [first] a = MatMul(x, t) r = Relu(a) [second] y = MatMul(r, t) }"
    ),
}


def network(name: str) -> tuple[ir.Model, Batches]:
    # Larger weights would make the attention all or nothing, and then noise of layers does not add up.
    model = model_of(NETWORKS[name], weights="w1 w2 w3 b", scale=0.05 if "attention" in name else 0.2)
    shape = model.graph.inputs[0].shape
    assert shape is not None
    rng = np.random.default_rng(1)
    return model, [{"x": rng.standard_normal(shape.numpy()).astype(np.float32)} for _ in range(4)]


def loss(model: ir.Model, plan: QuantPlan, batch: dict[str, np.ndarray]) -> float:
    """Signal-to-noise ratio of output y in dB when the plan is carried out."""
    quantized = model.clone()
    InsertQDQ(plan)(quantized)
    return difference("y", run(model, batch)["y"], run(quantized, batch)["y"]).sqnr_db


@pytest.mark.parametrize("target", ["a800", "ort-cpu"])
@pytest.mark.parametrize("name", ["products", "a residual block and pooling"])
def test_alone_a_layer_costs_what_quantizing_only_that_layer_costs(name: str, target: str) -> None:
    model, batches = network(name)
    costs = layer_costs(model, planned(model, batches, name=target), batches[0])
    nodes = [cost.node for cost in costs]
    assert sorted(nodes) == sorted({"first", "second", "third"} & set(nodes))
    for cost in costs:
        alone = planned(model, batches, without(*(node for node in nodes if node != cost.node)), name=target)
        assert [layer.node for layer in alone.quantized_layers] == [cost.node]
        expected = loss(model, alone, batches[0])
        assert cost.sqnr_db == pytest.approx(expected, abs=0.2)


def test_what_two_layers_need_rounded_costs_both() -> None:
    """Else the layer behind is left in float, and what it reads is rounded as before: the convolution writes it."""
    wide = (
        "g (float[1,16,8,8] x, float[16,16,1,1] w1, float[16,16,1,1] w2) => (float[1,16,8,8] y) "
        "{ [first] c = Conv(x, w1) [second] y = Conv(c, w2) }"
    )
    model = model_of(wide, weights="w1 w2", scale=0.2)
    initializer = model.graph.initializers["w1"]
    weight = np.array(initializer.const_value.numpy())  # type: ignore[union-attr]
    weight[0] *= 300  # one channel takes up the whole range
    initializer.const_value = ir.tensor(weight, name="w1")
    rng = np.random.default_rng(3)
    batches = [{"x": rng.standard_normal((1, 16, 8, 8)).astype(np.float32)} for _ in range(4)]
    cpu = {cost.node: cost.sqnr_db for cost in layer_costs(model, planned(model, batches, name="ort-cpu"), batches[0])}
    gpu = {cost.node: cost.sqnr_db for cost in layer_costs(model, planned(model, batches), batches[0])}
    assert cpu["first"] == pytest.approx(cpu["second"], abs=1)
    assert gpu["first"] > gpu["second"] + 5


def test_corrections_of_biases_count_for_their_layer_even_where_there_was_no_bias() -> None:
    model, batches = network("a residual block and pooling")
    plan = correct_biases(model, planned(model, batches), batches)
    assert {bias.node for bias in plan.biases} == {"first", "second", "third"}
    costs = layer_costs(model, plan, batches[0])
    for cost in costs:
        alone = planned(model, batches, without(*(other.node for other in costs if other != cost)))
        shifts = tuple(bias for bias in plan.biases if bias.node == cost.node)
        alone = msgspec.structs.replace(alone, biases=shifts)
        assert cost.sqnr_db == pytest.approx(loss(model, alone, batches[0]), abs=0.2)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_layers_together_and_none_at_all(name: str) -> None:
    model, batches = network(name)
    plan = planned(model, batches)
    costs = layer_costs(model, plan, batches[0])
    assert {cost.node for cost in costs} == {layer.node for layer in plan.quantized_layers}
    assert list(costs) == sorted(costs, key=lambda cost: cost.sqnr_db)
    noise = sum(10 ** (-cost.sqnr_db / 10) for cost in costs)
    together = loss(model, plan, batches[0])
    assert -10 * math.log10(noise) == pytest.approx(together, abs=3)


def test_nothing_quantized_costs_nothing() -> None:
    model, batches = network("products")
    plan = planned(model, batches, without("*"))
    assert layer_costs(model, plan, batches[0]) == ()


def test_the_model_is_not_changed() -> None:
    model, batches = network("products")
    plan = planned(model, batches)
    before = ir.to_onnx_text(model)
    layer_costs(model, plan, batches[0])
    assert ir.to_onnx_text(model) == before


def cost(node: str, sqnr_db: float) -> LayerCost:
    return LayerCost(node, "MatMul", "", sqnr_db)


MOST_COSTLY = {
    "the goal is reached": ([cost("a", 10), cost("b", 30)], 20.0, 16.0, 5, ["a"]),
    "one is not enough": ([cost("a", 10), cost("b", 10), cost("c", 40)], 7.0, 16.0, 5, ["a", "b"]),
    "no more than allowed": ([cost("a", 10), cost("b", 10), cost("c", 10)], 5.0, 60.0, 2, ["a", "b"]),
    "none allowed": ([cost("a", 10)], 5.0, 16.0, 0, []),
    "not finite": ([cost("a", -math.inf), cost("b", 20)], -math.inf, 16.0, 5, ["a"]),
    "not finite together only": ([cost("a", 10), cost("b", 20)], -math.inf, 16.0, 5, ["a"]),
    "nothing costs": ([cost("a", math.inf)], 10.0, 16.0, 5, []),
    "no layers": ([], 10.0, 16.0, 5, []),
}


@pytest.mark.parametrize("name", MOST_COSTLY)
def test_most_costly(name: str) -> None:
    costs, reached, goal, allowed, expected = MOST_COSTLY[name]
    assert [layer.node for layer in most_costly(costs, reached, goal, allowed)] == expected
