"""Factors and offsets go into the weights exactly; what cannot be folded raises before anything is changed."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.comparison import compare
from qonnx.errors import ModelError
from qonnx.graph import RESCALED, constant
from qonnx.groups import Residual, find_groups
from qonnx.passes.infer_shapes import InferShapes
from qonnx.passes.name_nodes import NameNodes
from qonnx.passes.prepare import prepare
from qonnx.passes.rescale_channels import RescaleChannels, Rescaling, Vector
from tests.graphs import model_of
from tests.helpers import Array, assert_same_function, operators, random_feeds, run
from tests.smoothing import prepared, random_rescaling, rescale_everything

WEIGHTS = "w1 w2 w3 g b b1 b2"
NORM = (
    "g (float[2,3,4] x, float[4] g, float[4] b, float[4,6] w1, float[6] b1, float[4,5] w2)"
    "=> (float[2,3,6] y, float[2,3,5] z)"
    "{ n = LayerNormalization(x, g, b) m = MatMul(n, w1) y = Add(m, b1) z = MatMul(n, w2) }"
)
SCALE = np.array([0.5, 1.0, 2.0, 10.0])
SHIFT = np.array([1.0, -2.0, 0.0, 0.25])


def initializers(model: ir.Model) -> dict[str, Array]:
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: tensor.numpy().copy() for name, tensor in tensors.items() if tensor is not None}


def test_weights_are_those_of_the_formula() -> None:
    model = prepared(NORM, WEIGHTS)
    before = initializers(model)
    (group,) = find_groups(model)
    RescaleChannels((Rescaling(group, SCALE, SHIFT, "by hand"),))(model)
    after = initializers(model)
    w1, w2 = before["w1"].astype(np.float64), before["w2"].astype(np.float64)
    expected = {
        "g_rescaled": before["g"] / SCALE,
        "b_rescaled": (before["b"] - SHIFT) / SCALE,
        "w1_rescaled": w1 * SCALE[:, None],
        "w2_rescaled": w2 * SCALE[:, None],
        "b1_rescaled": before["b1"] + SHIFT @ w1,
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(after[name], array.astype(np.float32), err_msg=name)
    assert operators(model).count("Add") == 2
    assert model.graph[0].metadata_props["qonnx.rescaled"] == "by hand"
    assert not set(before) & set(after)
    assert group.producer.value.name == "n"


def test_a_layer_between_two_groups_is_rounded_once() -> None:
    text = (
        "g (float16[2,3,4] x, float16[4] g, float16[4] b, float16[4,6] w1, float16[6] b1, float16[6,5] w2)"
        "=> (float16[2,3,5] y)"
        "{ n = LayerNormalization(x, g, b) m = MatMul(n, w1) a = Add(m, b1) y = MatMul(a, w2) }"
    )
    model = prepared(text, WEIGHTS)
    before = initializers(model)
    first, second = find_groups(model)
    out_scale, out_shift = np.linspace(0.3, 3.0, 6), np.linspace(-1.0, 1.0, 6)
    RescaleChannels((Rescaling(first, SCALE, SHIFT), Rescaling(second, out_scale, out_shift)))(model)
    after = initializers(model)
    w1, b1 = before["w1"].astype(np.float64), before["b1"].astype(np.float64)
    np.testing.assert_array_equal(after["w1_rescaled"], (w1 * SCALE[:, None] / out_scale).astype(np.float16))
    np.testing.assert_array_equal(after["b1_rescaled"], ((b1 + SHIFT @ w1 - out_shift) / out_scale).astype(np.float16))
    assert after["w1_rescaled"].dtype == np.float16


def test_nothing_to_do() -> None:
    model = prepared(NORM, WEIGHTS)
    before = ir.to_onnx_text(model)
    (group,) = find_groups(model)
    assert not RescaleChannels(())(model).modified
    assert not RescaleChannels((Rescaling(group, np.ones(4), np.zeros(4)),))(model).modified
    assert ir.to_onnx_text(model) == before


def test_shared_weights_are_copied() -> None:
    text = (
        "g (int64[2,3] i, float[3,4] x, float[4] g, float[4] b, float[7,4] w1)"
        "=> (float[3,7] y, float[3,7] z, float[2,3,4] e, float[3,4] t)"
        "{ e = Gather(w1, i) n = LayerNormalization(x, g, b) y = Gemm <transB = 1> (n, w1)"
        "  k = LayerNormalization(x, g, b) z = Gemm <transB = 1> (k, w1) t = LayerNormalization(x, g, b) }"
    )
    model = prepared(text, WEIGHTS)
    before = initializers(model)
    groups = rescale_everything(model)
    assert [group.reason for group in groups] == ["", ""]
    after = initializers(model)
    assert after.keys() - before.keys() == {
        *("g_rescaled", "g_rescaled_1", "b_rescaled", "b_rescaled_1"),
        *("w1_rescaled", "w1_rescaled_1"),
        *(name for name in after if name.endswith("_bias")),
    }
    for name in ("w1", "g", "b"):
        np.testing.assert_array_equal(after[name], before[name])


def test_a_shared_path_to_a_weight_is_copied() -> None:
    text = (
        "g (float[3,4] x, float[4] g, float[4] b, float[7,4] w1, float[4] b1) => (float[3,7] y, float[3,7] z)"
        "{ n = LayerNormalization(x, g, b) k = LayerNormalization(x, g, b1) t = Transpose(w1) y = MatMul(n, t)"
        "  z = MatMul(k, t) }"
    )
    model = model_of(text, weights=WEIGHTS)
    InferShapes()(model)
    NameNodes()(model)
    rescale_everything(model)


def test_weights_stay_lazy() -> None:
    model = prepared(NORM, WEIGHTS)
    rescale_everything(model)
    kinds = {name: type(value.const_value) for name, value in model.graph.initializers.items()}
    assert kinds["w1_rescaled"] is ir.LazyTensor


def test_the_result_keeps_its_name_when_a_bias_is_added() -> None:
    text = (
        "g (float[2,3,4] x, float[4] g, float[4] b, float[4,5] w2) => (float[2,3,5] z)"
        "{ n = LayerNormalization(x, g, b) z = MatMul(n, w2) }"
    )
    model = prepared(text, WEIGHTS)
    rescale_everything(model)
    assert operators(model) == ["LayerNormalization", "MatMul", "Add"]
    assert [value.name for value in model.graph.outputs] == ["z"]
    assert model.graph.outputs[0].producer() is model.graph[2]


def test_readers_of_one_tensor_share_their_mul_and_add() -> None:
    text = (
        "g (float[2,3,4] x, float[4] g, float[4] b, float[4,5] w2)"
        "=> (float[2,3,5] z, float[2,3,4] p, float[2,3,4] q)"
        "{ n = LayerNormalization(x, g, b) z = MatMul(n, w2) p = Add(n, x) q = Sub(x, n) }"
    )
    model = prepared(text, WEIGHTS)
    rescale_everything(model, Residual.MUL)
    found = operators(model)
    assert (found.count("Mul"), found.count("Add"), found.count("Sub")) == (1, 3, 1)


def test_a_reader_of_two_groups_gets_the_channels_of_both_back() -> None:
    """The second Mul stood in the place of the first one."""
    model = prepared(
        "g (float[2,6,16] x, float[16,16] w, float[16] s, float[32,32] w2) => (float[2,6,32] y) "
        "{ h = MatMul(x, w) n = LayerNormalization(x, s) c = Concat <axis = -1> (h, n) z = MatMul(c, w2) "
        "y = Add(c, z) }",
        "w s w2",
    )
    groups = rescale_everything(model, residual=Residual.MUL)
    assert [len(group.taps) for group in groups if not group.reason] == [1, 1]


def test_factors_alone_need_no_add() -> None:
    text = (
        "g (float[2,3,4] x, float[4] g, float[4] b, float[4,5] w2) => (float[2,3,5] z, float[2,3,4] p)"
        "{ n = LayerNormalization(x, g, b) z = MatMul(n, w2) p = Add(n, x) }"
    )
    model = prepared(text, WEIGHTS)
    before = model.clone()
    (group,) = find_groups(model, residual=Residual.MUL)
    RescaleChannels((Rescaling(group, SCALE),))(model)
    assert operators(model) == ["LayerNormalization", "Mul", "MatMul", "Add"]
    assert_same_function(before, model)


def test_relu_becomes_a_clip_where_its_bound_moves() -> None:
    text = (
        "g (float[2,3,6] x, float[4,3,1] w1, float[5,4,3] w2) => (float[2,5,4] y)"
        "{ c = Conv(x, w1) r = Relu(c) y = Conv(r, w2) }"
    )
    model = prepared(text, WEIGHTS)
    before = model.clone()
    group = find_groups(model)[-1]
    RescaleChannels((Rescaling(group, 2 * np.ones(4), np.full(4, 3.0)),))(model)
    assert operators(model) == ["Conv", "Clip", "Conv"]
    np.testing.assert_array_equal(constant(model.graph[1].inputs[1]), np.float32(-1.5), strict=True)
    assert_same_function(before, model)


REFUSED: dict[str, tuple[list[float], list[float] | None, str]] = {
    "too few factors": ([1, 2, 3], None, "3 factors and 3 offsets for 4 channels"),
    "too many offsets": ([1, 1, 1, 1], [0, 0, 0, 0, 1], "4 factors and 5 offsets for 4 channels"),
    "factor of 0": ([1, 0, 1, 1], None, "factors must be positive and finite"),
    "negative factor": ([1, -2, 1, 1], None, "factors must be positive and finite"),
    "not a number": ([1, np.nan, 1, 1], None, "factors must be positive and finite"),
    "infinite factor": ([1, np.inf, 1, 1], None, "factors must be positive and finite"),
    "infinite offset": ([1, 1, 1, 1], [0, np.inf, 0, 0], "factors must be positive and finite, offsets finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_numbers_that_do_not_fit(case: str) -> None:
    scale, shift, message = REFUSED[case]
    check_error(NORM, np.array(scale, float), None if shift is None else np.array(shift, float), message)


def check_error(text: str, scale: Vector, shift: Vector | None, message: str, opset: int = 21) -> None:
    model = prepared(text, WEIGHTS, opset)
    group = find_groups(model)[-1]
    before = ir.to_onnx_text(model)
    with pytest.raises(ir.passes.PassError) as caught:
        ir.passes.Sequential(RescaleChannels((Rescaling(group, scale, shift),)))(model)
    cause = caught.value.__cause__
    assert isinstance(cause, ModelError)
    assert message in str(cause)
    assert "\n" not in str(cause)
    assert ir.to_onnx_text(model) == before


UNFIT = {
    "channels that something else reads": (
        "g (float[2,3,4] x, float[4] g, float[4] b, float[4,5] w2) => (float[2,3,5] z, float[2,3,4] p)"
        "{ n = LayerNormalization(x, g, b) z = MatMul(n, w2) p = Add(n, x) }",
        None,
        "adds something else to it cannot be changed; leave them at factor 1",
    ),
    "no bias": (
        "g (float[2,3,4] x, float[4] g, float[4,5] w2) => (float[2,3,5] z)"
        "{ n = RMSNormalization(x, g) z = MatMul(n, w2) }",
        SHIFT,
        "no offset possible: RMSNormalization",
    ),
    "one number to pad with": (
        "g (float[2,3,6] x, float[4,3,1] w1, float[5,4,3] w2) => (float[2,5,6] y)"
        "<int64[6] pads = {0, 0, 1, 0, 0, 1}> { c = Conv(x, w1) r = Pad(c, pads) y = Conv(r, w2) }",
        SHIFT,
        "pads all channels with one number; use one offset",
    ),
    "a clip": (
        "g (float[2,3,6] x, float[4,3,1] w1, float[5,4,3] w2) => (float[2,5,4] y) <float one = {1}>"
        "{ c = Conv(x, w1) r = Clip(c, , one) y = Conv(r, w2) }",
        None,
        "no factor possible: Clip",
    ),
    "overflow": (
        "g (float16[2,3,4] x, float16[4] g, float16[4] b, float16[4,5] w2) => (float16[2,3,5] z)"
        "{ n = LayerNormalization(x, g, b) z = MatMul(n, w2) }",
        None,
        "weight w2: scaled, it overflows float16",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_groups_that_cannot(case: str) -> None:
    text, shift, message = UNFIT[case]
    scale = SCALE * 1e6 if case == "overflow" else SCALE
    check_error(text, scale, shift, message, 23)


def test_groups_of_another_model() -> None:
    model = prepared(NORM, WEIGHTS)
    (group,) = find_groups(model.clone())
    with pytest.raises(ModelError, match="found in another model"):
        RescaleChannels((Rescaling(group, SCALE),)).call(model)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3]), st.booleans(), st.booleans())
def test_random_chains_of_layers(seed: int, groups: int, biased: bool, relu: bool) -> None:
    """Conv, ConvTranspose and Conv in a row, of any number of groups."""
    width = 2 * groups
    bias = ", b1" if biased else ""
    act = "r = Relu(c)" if relu else "r = Identity(c)"
    text = (
        f"g (float[1,{width},5] x, float[{2 * width},2,2] w1, float[{2 * width}] b1, float[{2 * width},3,2] w2,"
        f" float[{width},{3 * groups},1] w3) => (float[1,{width},K] y)"
        f"{{ c = Conv <group = {groups}> (x, w1{bias}) {act} d = ConvTranspose <group = {groups}> (r, w2)"
        "  e = LeakyRelu(d) y = Conv(e, w3) }"
    )
    model = prepared(text, WEIGHTS)
    before = model.clone()
    rng = np.random.default_rng(seed)
    chosen = [random_rescaling(group, rng) for group in find_groups(model, explicit=True)]
    assert len(chosen) == 3
    RescaleChannels(tuple(chosen))(model)
    assert_same_function(before, model, {"x": rng.standard_normal((1, width, 5)).astype(np.float32)}, rtol=2e-5)


def test_runs_optimized_too() -> None:
    model = prepared(NORM, WEIGHTS)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)}
    expected = run(model, feeds, optimize=True)
    rescale_everything(model)
    for name, array in run(model, feeds, optimize=True).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)


def test_layers_whose_results_changed_are_not_compared_with_the_original() -> None:
    text = (
        "g (float[n,16] x, float[16,16] w, float[16] b, float[16,16] w2, float[16,16] w3) => (float[n,16] y) "
        "{ [up] h = Gemm(x, w, b) r = Relu(h) [down] d = MatMul(r, w2) [last] y = MatMul(d, w3) }"
    )
    model = model_of(text, weights="w b w2 w3")
    prepare(model)
    original = model.clone()
    (group,) = (group for group in find_groups(model) if group.value == "h")
    RescaleChannels((Rescaling(group, np.linspace(0.5, 2.0, 16)),))(model)
    assert [node.name for node in model.graph if RESCALED in node.metadata_props] == ["up", model.graph[1].name]
    result = compare(original, model, [random_feeds(model)], layers=True)
    assert [layer.node for layer in result.layers] == ["down", "last"]
    assert result.unmatched_layers == ("h",)
    assert min(layer.sqnr_db for layer in result.layers) > 90
