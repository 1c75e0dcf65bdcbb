"""Bias correction against a reference in numpy that runs the float and the rounded network layer by layer."""

from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qonnx.bias_correction import bias_edges, correct_biases, side_by_side
from qonnx.comparison import difference
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.plan import QuantPlan
from qonnx.recipe import Match, Recipe, Rule, load_recipe
from qonnx.runtime import session
from tests.graphs import model_of
from tests.helpers import run
from tests.test_plan import planned

Array = npt.NDArray[np.float64]
Batches = list[dict[str, np.ndarray]]


def without(*nodes: str) -> Recipe:
    """A recipe that leaves some nodes in float."""
    rules = tuple(Rule(Match(name=node), skip=True) for node in nodes)
    return msgspec.structs.replace(load_recipe("int8-average"), rules=rules)


CONVS = (
    "g (float[n,16,6,6] x, float[16,16,3,3] w1, float[16] b1, float[16,16,1,1] w2) => (float[n,16,4,4] y) "
    "{ [first] a = Conv(x, w1, b1) r = Relu(a) [second] y = Conv(r, w2) }"
)
PRODUCTS = (
    "g (float[n,5,16] x, float[16,32] w1, float[32] b1, float[32,16] w2, float[16] b2) => (float[n,5,16] y) "
    "{ [first] a = MatMul(x, w1) h = Add(a, b1) r = Relu(h) [second] c = MatMul(r, w2) y = Add(b2, c) }"
)


def skewed(*shape: int, count: int = 6) -> Batches:
    """Inputs whose rounding errors do not average out: most of them are below half a step."""
    rng = np.random.default_rng(3)
    return [{"x": rng.gamma(0.1, 1.0, shape).astype(np.float32)} for _ in range(count)]


def convolve(x: Array, weight: Array) -> Array:
    rows, columns = x.shape[2] - weight.shape[2] + 1, x.shape[3] - weight.shape[3] + 1
    result = np.zeros((x.shape[0], weight.shape[0], rows, columns))
    for i, j in np.ndindex(weight.shape[2:]):
        result += np.einsum("nchw,oc->nohw", x[:, :, i : i + rows, j : j + columns], weight[:, :, i, j])
    return result


def multiply(x: Array, weight: Array) -> Array:
    return x @ weight


def stored(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return np.asarray(tensor.numpy(), np.float64)


def rounded(plan: QuantPlan, value: str, array: Array) -> Array:
    """To the grid of the plan and back, symmetric, in int8."""
    (tensor,) = [tensor for tensor in (*plan.activations, *plan.weights) if tensor.value == value]
    scale = np.array(tensor.scale)
    if scale.size > 1:
        shape = [1] * array.ndim
        shape[array.shape.index(scale.size) if array.ndim == 4 else array.ndim - 1] = scale.size
        scale = scale.reshape(shape)
    return np.asarray(np.clip(np.round(array / scale), -128, 127) * scale)


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


# What stands in the place of Relu(a), and what it computes.
FUNCTIONS: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "Relu": ("r = Relu(a)", lambda x: np.maximum(x, 0)),
    "Clip": ("r = Clip(a, low, high)", lambda x: np.clip(x, 0, 1)),
    "Clip and Min": ("k = Clip(a, low) r = Min(k, high)", lambda x: np.clip(x, 0, 1)),
    "LeakyRelu": ("r = LeakyRelu <alpha = 0.1> (a)", lambda x: np.maximum(x, 0.1 * x)),
    "SiLU": ("s = Sigmoid(a) r = Mul(a, s)", lambda x: x * sigmoid(x)),
    "HardSwish": (
        "s = HardSigmoid <alpha = 0.1666667, beta = 0.5> (a) r = Mul(s, a)",
        lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    ),
    "GELU by Tanh": (
        "u = Mul(a, a) v = Mul(u, a) e = Mul(v, cubic) t = Add(a, e) k = Mul(t, root) h = Tanh(k) o = Add(h, high) "
        "p = Mul(a, o) r = Mul(half, p)",
        lambda x: 0.5 * x * (1 + np.tanh(0.7978846 * (x + 0.044715 * x**3))),
    ),
}
CONSTANTS = (
    "<float low = {0}, float high = {1}, float half = {0.5}, float cubic = {0.044715}, float root = {0.7978846}>"
)


def reference(
    model: ir.Model,
    plan: QuantPlan,
    batches: Batches,
    layer: Callable[[Array, Array], Array],
    channel: int,
    act: Callable[[Array], Array] = FUNCTIONS["Relu"][1],
) -> list[Array]:
    """Shifts of both layers: the mean of the difference, shrunk by its uncertainty over the samples.

    That of the first layer is taken behind its activation, and divided by the mean of the absolute slope.
    """
    seen: list[list[Array]] = [[], []]
    first_bias = stored(model, "b1").reshape([-1 if axis == channel else 1 for axis in range(4 if channel == 1 else 3)])
    for batch in batches:
        exact = batch["x"].astype(np.float64)
        inexact = rounded(plan, "x", exact)
        for number, weight in enumerate(("w1", "w2")):
            result = layer(exact, stored(model, weight))
            other = layer(inexact, rounded(plan, weight, stored(model, weight)))
            rest = tuple(axis for axis in range(result.ndim) if axis != channel)
            difference, counts = result - other, np.ones(result.shape)
            if number == 0:
                before, after = result + first_bias, other + first_bias
                least = 0.25 * np.sqrt(np.square(difference).mean(axis=rest, keepdims=True))
                step = np.maximum(np.abs(difference) / 2, least)
                middle = (before + after) / 2
                slope = (act(middle + step) - act(middle - step)) / (2 * step)
                difference = (act(before) - act(after)) * np.sign(slope.mean(axis=rest, keepdims=True))
                counts = np.abs(slope)
            seen[number].append(np.stack([difference.mean(axis=rest[1:]), counts.mean(axis=rest[1:])]))
            share = np.maximum(counts.mean(axis=rest, keepdims=True), 1e-12)
            other = other + difference.mean(axis=rest, keepdims=True) / share
            if number == 0:
                exact = act(result + first_bias)
                inexact = rounded(plan, "r", act(other + first_bias))
    shifts = []
    for samples, shares in (np.concatenate(list_of, axis=1) for list_of in seen):
        mean = samples.mean(axis=0) / shares.mean(axis=0)
        effective = shares.sum(axis=0) ** 2 / np.square(shares).sum(axis=0)
        scatter = np.square(samples - mean * shares).sum(axis=0) / shares.sum(axis=0) ** 2
        error = np.sqrt(scatter * effective / (effective - 1))
        shifts.append(mean * np.maximum(0, 1 - (error / mean) ** 2))
    return shifts


@pytest.mark.parametrize(
    ("text", "shape", "layer", "channel"),
    [(CONVS, (4, 16, 6, 6), convolve, 1), (PRODUCTS, (4, 5, 16), multiply, 2)],
    ids=["convolutions", "products with Add"],
)
def test_shifts_are_the_shrunk_mean_differences_layer_after_layer(
    text: str, shape: tuple[int, ...], layer: Callable[[Array, Array], Array], channel: int
) -> None:
    model, batches = model_of(text, weights="w1 w2 b1 b2", scale=0.3), skewed(*shape)
    plan = planned(model, batches)
    corrected = correct_biases(model, plan, batches)
    expected = reference(model, plan, batches, layer, channel)
    assert [bias.node for bias in corrected.biases] == ["first", "second"]
    for bias, shift in zip(corrected.biases, expected, strict=True):
        assert np.abs(shift).max() > 1e-3
        np.testing.assert_allclose(bias.shift, shift, atol=1e-5 + 1e-3 * np.abs(shift).max())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_mean_is_kept_behind(name: str) -> None:
    nodes, act = FUNCTIONS[name]
    text = CONVS.replace("r = Relu(a)", nodes).replace("{ [first]", f"{CONSTANTS} {{ [first]")
    model, batches = model_of(text, weights="w1 w2 b1", scale=0.3), skewed(4, 16, 6, 6)
    # Some channels lie where SiLU and GELU fall.
    model.graph.initializers["b1"].const_value = ir.tensor(np.linspace(-2, 1, 16, dtype=np.float32), name="b1")
    plan = planned(model, batches)
    (found, _) = correct_biases(model, plan, batches).biases
    (expected, _) = reference(model, plan, batches, convolve, 1, act)
    np.testing.assert_allclose(found.shift, expected, atol=1e-5 + 2e-3 * np.abs(expected).max())


@pytest.mark.parametrize(("text", "shape"), [(CONVS, (16, 16, 6, 6)), (PRODUCTS, (64, 5, 16))])
def test_the_mean_of_new_results_comes_closer(text: str, shape: tuple[int, ...]) -> None:
    model, batches = model_of(text, weights="w1 w2 b1 b2", scale=0.3), skewed(*shape, count=24)
    plan = planned(model, batches)
    corrected = correct_biases(model, plan, batches[:12])
    errors = []
    for candidate in (plan, corrected):
        quantized = model.clone()
        InsertQDQ(candidate)(quantized)
        moved = [run(quantized, batch)["y"] - run(model, batch)["y"] for batch in batches[12:]]
        channel = 1 if len(shape) == 4 else 2
        rest = tuple(axis for axis in range(len(shape)) if axis != channel)
        errors.append(float(np.square(np.concatenate(moved).mean(axis=rest)).sum()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("activation", ["Relu(a)", "Clip(a, low, high)"])
def test_elements_that_the_activation_stops_do_not_count(activation: str) -> None:
    """Most results lie far below 0, and their error is another one: its mean over all would move the few that count."""
    text = (
        "g (float[n,64] x, float[64,32] w, float[32] b) => (float[n,32] y) <float low = {0}, float high = {1e9}> "
        f"{{ [fc] p = MatMul(x, w) a = Add(p, b) y = {activation} }}"
    )
    model, batches = model_of(text, weights="w b", scale=0.3), skewed(64, 64, count=24)
    model.graph.initializers["b"].const_value = ir.tensor(np.full(32, -3, np.float32), name="b")
    plan = planned(model, batches)
    weight, errors = stored(model, "w"), []
    (shift,) = [bias.shift for bias in correct_biases(model, plan, batches).biases]
    x = np.concatenate([batch["x"] for batch in batches]).astype(np.float64)
    exact, inexact = x @ weight, rounded(plan, "x", x) @ rounded(plan, "w", weight)
    everything = (exact - inexact).mean(axis=0)
    for each in (np.array(shift), everything):
        errors.append(np.square(np.maximum(exact - 3, 0) - np.maximum(inexact + each - 3, 0)).sum())
    assert (exact > 3).mean() < 0.3
    assert errors[0] < 0.95 * errors[1]


BIASES = {
    "missing": ("", "Gemm(x, w)", (32,)),
    "left out": ("", "Gemm(x, w,)", (32,)),
    "scalar": (", float b", "Gemm(x, w, b)", (32,)),
    "one element": (", float[1] b", "Gemm(x, w, b)", (32,)),
    "vector": (", float[32] b", "Gemm(x, w, b)", (32,)),
    "row": (", float[1,32] b", "Gemm(x, w, b)", (1, 32)),
    "column": (", float[8,1] b", "Gemm(x, w, b)", (8, 32)),
    "matrix": (", float[8,32] b", "Gemm(x, w, b)", (8, 32)),
}


@pytest.mark.parametrize("name", BIASES)
def test_biases_of_every_shape_are_corrected(name: str) -> None:
    argument, product, shape = BIASES[name]
    model = model_of(
        f"g (float[8,16] x, float[16,32] w{argument}) => (float[8,32] y) {{ [fc] y = {product} }}", weights="w b"
    )
    batches = skewed(8, 16)
    plan = correct_biases(model, planned(model, batches), batches)
    before = model.graph.initializers.get("b")
    quantized = model.clone()
    InsertQDQ(plan)(quantized)
    (product_node,) = [node for node in quantized.graph if node.op_type == "Gemm"]
    bias = product_node.inputs[2]
    assert bias is not None
    assert bias.const_value is not None
    assert bias.const_value.shape == shape
    old = 0.0 if before is None or before.const_value is None else before.const_value.numpy()
    np.testing.assert_allclose(
        bias.const_value.numpy(), old + np.broadcast_to(np.array(plan.biases[0].shift, np.float32), shape)
    )
    assert "b" not in quantized.graph.initializers
    assert run(quantized, batches[0])["y"].shape == (8, 32)


LEAVES_ALONE = {
    "a product without bias": "{ [fc] y = MatMul(x, w) }",
    "a bias with a factor": "{ [fc] y = Gemm <beta = 2.0> (x, w, b) }",
    "no bias, but a factor": "{ [fc] y = Gemm <beta = 2.0> (x, w) }",
    "a bias that is computed": "{ s = Sigmoid(z) [fc] y = Gemm(x, w, s) }",
    "a bias that comes from outside": "{ [fc] y = Gemm(x, w, z) }",
    "an addition that is no bias": "{ [fc] a = MatMul(x, w) y = Add(a, a) }",
}


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str) -> None:
    text = "g (float[8,16] x, float[16,16] w, float[16] b, float[16] z) => (float[8,16] y) " + LEAVES_ALONE[name]
    model = model_of(text, weights="w b")
    batches = [{**batch, "z": np.ones(16, np.float32)} for batch in skewed(8, 16)]
    plan = planned(model, batches)
    assert plan.quantized_layers
    assert correct_biases(model, plan, batches) == plan


def test_layers_in_float_are_left_alone() -> None:
    model, batches = model_of(CONVS, weights="w1 w2 b1"), skewed(4, 16, 6, 6)
    plan = planned(model, batches, without("first"))
    assert [bias.node for bias in correct_biases(model, plan, batches).biases] == ["second"]


def test_one_sample_says_nothing_about_the_mean() -> None:
    model, batches = model_of(CONVS, weights="w1 w2 b1"), skewed(1, 16, 6, 6)
    plan = planned(model, batches)
    assert correct_biases(model, plan, batches[:1]) == plan
    assert correct_biases(model, plan, []) == plan


def test_the_model_is_not_changed() -> None:
    model, batches = model_of(CONVS, weights="w1 w2 b1"), skewed(4, 16, 6, 6)
    plan = planned(model, batches)
    before = ir.to_onnx_text(model)
    correct_biases(model, plan, batches)
    assert ir.to_onnx_text(model) == before


SURROUNDINGS = {
    "control flow": (
        "g (bool c, float[n,16] x, float[16,16] w, float[16] b) => (float[n,16] y) "
        "{ [first] a = Gemm(x, w, b) i = If (c) <then_branch = t () => (float[n,16] u) { u = MatMul(a, w) }, "
        "else_branch = e () => (float[n,16] v) { v = Add(a, x) }> [second] y = Gemm(i, w, b) }"
    ),
    "float16": (
        "g (bool c, float16[n,16] x, float16[16,16] w, float16[16] b) => (float16[n,16] y) "
        "{ [first] a = Gemm(x, w, b) r = Relu(a) [second] y = Gemm(r, w, b) }"
    ),
    "vectors": (
        "g (bool c, float[16] x, float[16,16] w, float[16] b) => (float[16] y) "
        "{ [first] m = MatMul(x, w) a = Add(m, b) r = Relu(a) [second] o = MatMul(r, w) y = Add(o, b) }"
    ),
    "unused outputs": (
        "g (bool c, float[n,16] x, float[16,16] w, float[16] b) => (float[n,16] y) "
        "{ [first] a = Gemm(x, w, b) d, m = Dropout(a) r, i = TopK <axis = 1> (d, k) [second] y = Gemm(d, w, b) }"
    ),
}


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_works_in(name: str, opset: int) -> None:
    text = SURROUNDINGS[name]
    if "k)" in text:
        text = text.replace("{ [first]", "{ k = Constant <value = int64[1] {2}> () [first]")
    if "float16" in text:
        opset = max(opset, 19)
    model = model_of(text, weights="w b", opset=opset, scale=0.3)
    kind = np.float16 if "float16" in text else np.float32
    batches = [
        {"x": (batch["x"][0] if name == "vectors" else batch["x"]).astype(kind), "c": np.array(number % 2 == 0)}
        for number, batch in enumerate(skewed(4, 16))
    ]
    plan = correct_biases(model, planned(model, batches), batches)
    assert {bias.node for bias in plan.biases} <= {"first", "second"}
    assert plan.biases
    quantized = model.clone()
    InsertQDQ(plan)(quantized)
    expected, found = run(model, batches[0])["y"], run(quantized, batches[0])["y"]
    assert difference("y", expected, found).sqnr_db > 15


def test_both_networks_read_a_default_that_the_caller_overrides() -> None:
    model = model_of(
        "g (float[8,16] x, float factor, float[16,16] w, float[16] b) => (float[8,16] y) "
        "{ [fc] a = Gemm(x, w, b) y = Mul(a, factor) }",
        weights="w b",
    )
    (factor,) = [value for value in model.graph.inputs if value.name == "factor"]
    factor.const_value = ir.tensor(np.float32(1), name="factor")
    model.graph.register_initializer(factor)
    batches = skewed(8, 16)
    assert correct_biases(model, planned(model, batches), batches).biases


def test_layers_behind_a_number_of_boxes_that_rounding_changes() -> None:
    """Two stages: what is above a threshold goes through a second layer; both networks look at the same rows."""
    model = model_of(
        "g (float[n,64] x, float[64,64] w, float[64,1] ws, float[64,64] w2, float[64] b2) => (float[m,64] y) "
        "{ all = Constant <value = int64[1] {-1}> () zero = Constant <value = float {0.0}> () "
        "[first] h = MatMul(x, w) r = Relu(h) [scores] s = MatMul(r, ws) row = Reshape(s, all) g = Greater(row, zero) "
        "i = NonZero(g) ii = Reshape(i, all) p = Gather <axis = 0> (r, ii) [second] a = MatMul(p, w2) y = Add(a, b2) }",
        weights="w ws w2 b2",
        scale=0.1,
    )
    rng = np.random.default_rng(0)
    batches = [{"x": rng.standard_normal((256, 64)).astype(np.float32)} for _ in range(6)]
    plan = correct_biases(model, planned(model, batches), batches)
    assert "second" in {bias.node for bias in plan.biases} <= {"first", "scores", "second"}
    spread = run(model, batches[0])["y"].std()
    for bias in plan.biases:
        assert len(bias.shift) == 64
        assert 0 < np.abs(bias.shift).max() < 0.05 * spread  # of equal rows; of others it would be the spread


def test_a_channel_that_is_let_through_in_one_sample_is_left_alone() -> None:
    """One sample explains its own error exactly, and says nothing of others."""
    text = "g (float[n,32] x, float[32,16] w, float[16] b) => (float[n,16] y) { [fc] p = Gemm(x, w, b) y = Relu(p) }"
    model, batches = model_of(text, weights="w b", scale=0.3), skewed(16, 32)
    results = np.concatenate([batch["x"] for batch in batches]) @ stored(model, "w")
    bias = -np.sort(results, axis=0)[-2:].mean(axis=0)  # between the largest and the second largest of each channel
    model.graph.initializers["b"].const_value = ir.tensor(bias.astype(np.float32), name="b")
    plan = planned(model, batches)
    assert [layer.node for layer in plan.quantized_layers] == ["fc"]
    assert not correct_biases(model, plan, batches).biases


def test_no_layer_is_moved_further_than_its_error_reaches() -> None:
    """A channel that hardly anything passes: what it lets through must not be divided by next to nothing."""
    text = (
        "g (float[n,32] x, float[32,4096] w, float[4096] b) => (float[n,4096] y) { [fc] p = Gemm(x, w, b) y = Relu(p) }"
    )
    model = model_of(text, weights="w b", scale=0.3)
    batches = skewed(4, 32, count=24)
    x = np.concatenate([batch["x"] for batch in batches]).astype(np.float64)
    bias = -np.quantile(x @ stored(model, "w"), 0.97, axis=0)
    model.graph.initializers["b"].const_value = ir.tensor(bias.astype(np.float32), name="b")
    plan = planned(model, batches)
    both = side_by_side(model, plan, bias_edges(model, plan))
    runner, ((output, _),) = session(both.model), both.differences.items()
    for batch in batches:
        found = runner.run(batch)
        data = batch["x"].astype(np.float64)
        error = data @ stored(model, "w") - rounded(plan, "x", data) @ rounded(plan, "w", stored(model, "w"))
        shift = found[output].sum(axis=0) / np.maximum(found[both.slopes[output]].sum(axis=0), 1e-12)
        assert (np.abs(shift) <= 4 * np.abs(error).max(axis=0)).all()


def test_an_activation_in_a_body_is_not_behind_the_layer() -> None:
    text = """g (float[n,32] x, float[32,16] w, float[16] b) => (float[n,16] y)
        { [fc] p = Gemm(x, w, b) m = ReduceMax <keepdims = 0> (x) c = Cast <to = 9> (m) y = If (c) <
        then_branch = t1 () => (float[n,16] o) { o = Relu(p) },
        else_branch = t2 () => (float[n,16] q) { z = ReduceMin(x) q = Add(z, z) }> }"""
    model, batches = model_of(text, weights="w b", scale=0.3), skewed(16, 32)
    (found,) = correct_biases(model, planned(model, batches), batches).biases
    x = np.concatenate([batch["x"] for batch in batches]).astype(np.float64)
    plan = planned(model, batches)
    error = x @ stored(model, "w") - rounded(plan, "x", x) @ rounded(plan, "w", stored(model, "w"))
    mean, uncertainty = error.mean(axis=0), error.std(axis=0, ddof=1) / np.sqrt(len(error))
    np.testing.assert_allclose(found.shift, mean * np.maximum(0, 1 - (uncertainty / mean) ** 2), atol=1e-5)
