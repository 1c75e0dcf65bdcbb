import math
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qonnx.comparison import _CHUNK, GROUP_BYTES, Difference, compare, difference, mostly_constant
from qonnx.errors import DataError, ModelError
from qonnx.runtime import Optimization

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def graph(body: str, signature: str = "(float[n, 4] x) => (float[n, 4] y)", weights: str = "") -> ir.Model:
    return ir.from_onnx_text(f"{HEADER} g {signature} {weights} {{ {body} }}")


def data(*sizes: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((size, 4)).astype(np.float32) for size in sizes]


def only(outputs: tuple[Difference, ...]) -> Difference:
    (output,) = outputs
    return output


@given(
    arrays.arrays(np.float32, (40,), elements=st.floats(-100, 100, width=32)),
    arrays.arrays(np.float32, (40,), elements=st.floats(-100, 100, width=32)),
)
@settings(max_examples=50, deadline=None)
def test_figures_follow_their_definitions(x: Any, y: Any) -> None:
    found = difference("v", x, y)
    a, b = x.astype(np.float64), y.astype(np.float64)
    noise = np.sum((a - b) ** 2)
    if noise == 0:
        assert found.sqnr_db == math.inf
        assert found.cosine == 1
    elif np.sum(a**2) == 0:
        assert found.sqnr_db == -math.inf
    else:
        assert found.sqnr_db == pytest.approx(10 * np.log10(np.sum(a**2) / noise), abs=1e-9)
        if np.any(b):
            assert found.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-12)
        else:
            assert math.isnan(found.cosine)
    assert found.max_error == np.abs(a - b).max()
    assert found.mean_error == pytest.approx(np.abs(a - b).mean())
    assert found.elements == 40
    assert math.isnan(found.agreement)


@pytest.mark.parametrize("count", [_CHUNK - 1, _CHUNK, 2 * _CHUNK + 7])
def test_large_arrays_are_summed_in_parts(count: int) -> None:
    x = np.ones(count, np.float16)
    y = x.copy()
    y[-1] = 0.5
    found = difference("v", x, y)
    assert found.elements == count
    assert found.sqnr_db == pytest.approx(10 * math.log10(count / 0.25))
    assert found.max_error == 0.5


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.complex64])
def test_every_float_type_is_measured(dtype: Any) -> None:
    x = np.array([3, 4], dtype)
    found = difference("v", x, np.array([3, 3.5], dtype))
    assert found.sqnr_db == 20
    assert found.max_error == 0.5


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]), 0.75),
        (np.array([True, False]), np.array([True, True]), 0.5),
        (np.array(["a", "b"], object), np.array(["a", "b"], object), 1),
        (np.array([1, 2], ml_dtypes.int4), np.array([1, -2], ml_dtypes.int4), 0.5),
        (np.array(3), np.array(3), 1),
    ],
)
def test_integers_are_counted_when_equal(x: Any, y: Any, expected: float) -> None:
    found = difference("v", x, y)
    assert found.agreement == expected
    assert found.elements == x.size
    assert math.isnan(found.sqnr_db)
    assert math.isnan(found.max_error)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    x = np.array([3, 4, np.inf, 1, np.nan], np.float32)
    y = np.array([3, 3.5, np.inf, np.nan, np.nan], np.float32)
    found = difference("v", x, y)
    assert (found.nonfinite_reference, found.nonfinite, found.elements) == (2, 3, 2)
    assert found.sqnr_db == 20
    nothing = difference("v", np.ones(2, np.float32), np.full(2, np.nan, np.float32))
    assert nothing.sqnr_db == -math.inf
    assert nothing.elements == 0
    assert math.isnan(nothing.max_error)
    both = difference("v", np.full(2, np.nan), np.full(2, np.nan))
    assert math.isnan(both.sqnr_db)


def test_shapes_or_kinds_that_differ_are_called_out() -> None:
    shapes = difference("v", np.ones((2, 3)), np.ones((2, 2)))
    kinds = difference("v", np.ones(2), np.ones(2, int))
    for found in (shapes, kinds):
        assert found.mismatched_batches == 1
        assert found.elements == 0
        assert math.isnan(found.sqnr_db)
        assert math.isnan(found.agreement)


def test_a_known_error_gives_its_ratio_over_all_batches() -> None:
    reference = graph("y = Mul(x, c)", weights="<float c = {1}>")
    candidate = graph("y = Mul(x, c)", weights="<float c = {1.1}>")
    found = compare(reference, candidate, data(3, 1, 7))
    output = only(found.outputs)
    assert output.name == "y"
    assert output.sqnr_db == pytest.approx(20, abs=1e-4)
    assert output.cosine == pytest.approx(1)
    assert output.elements == 11 * 4
    assert found.batches == 3
    assert found.layers == ()
    assert found.optimization is Optimization.ALL
    assert found.worst == output
    assert compare(reference, candidate, data(3, 1, 7), max_batches=2).batches == 2


def test_a_model_agrees_with_itself(tmp_path: Path) -> None:
    model = graph("y = Softmax(x)")
    ir.save(model, tmp_path / "model.onnx")
    found = compare(tmp_path / "model.onnx", model, data(3), layers=True)
    output = only(found.outputs)
    assert (output.sqnr_db, output.cosine, output.max_error) == (math.inf, 1, 0)
    assert (found.layers, found.unmatched_layers) == ((), ())


def test_every_output_is_reported_and_the_worst_is_known() -> None:
    signature = "(float[n, 4] x) => (float[n, 4] a, int64[n, 1] top, float[n, 4] b)"
    body = "a = Mul(x, c) top = ArgMax <axis = 1> (x) b = Mul(x, d)"
    reference = graph(body, signature, "<float c = {1}, float d = {1}>")
    candidate = graph(body, signature, "<float c = {1.01}, float d = {1.1}>")
    found = compare(reference, candidate, data(5))
    assert [output.name for output in found.outputs] == ["a", "top", "b"]
    assert found.outputs[1].agreement == 1
    assert found.worst == found.outputs[2]
    signature = "(float[n, 4] x) => (int64[n, 1] y)"
    highest, lowest = graph("y = ArgMax <axis = 1> (x)", signature), graph("y = ArgMin <axis = 1> (x)", signature)
    integers = compare(highest, lowest, data(5))
    assert integers.outputs[0].agreement == 0
    assert integers.worst is None


def test_shapes_that_depend_on_the_data_do_not_crash() -> None:
    signature = "(float[n, 4] x) => (float[m, 4] y)"
    body = "s = ReduceSum <keepdims = 0> (x, axes) keep = Greater(s, t) y = Compress <axis = 0> (x, keep)"
    reference = graph(body, signature, "<float t = {0}, int64[1] axes = {1}>")
    candidate = graph(body, signature, "<float t = {5}, int64[1] axes = {1}>")
    batches = [np.array([[1, 1, 1, 1], [-1, 0, 0, 0]], np.float32), np.array([[2, 2, 2, 2]], np.float32)]
    output = only(compare(reference, candidate, batches).outputs)
    assert output.mismatched_batches == 1
    assert output.elements == 4
    assert output.sqnr_db == math.inf


@given(
    arrays.arrays(np.float32, (12, 2, 4), elements=st.floats(-100, 100, width=32)),
    st.lists(st.integers(1, 11), max_size=3, unique=True),
)
@settings(max_examples=30, deadline=None)
def test_what_differs_between_samples_is_measured_for_itself(x: Any, cuts: list[int]) -> None:
    signature = "(float[n, 2, 4] x) => (float[n, 2, 4] y)"
    reference, candidate = graph("y = Identity(x)", signature), graph("y = Round(x)", signature)
    parts = np.split(x, sorted(cuts))
    found = only(compare(reference, candidate, parts).outputs).variation_db
    noise = np.sum(np.square(x - np.round(x), dtype=np.float64))
    power = np.var(x.astype(np.float64), axis=0, ddof=1).sum() * len(x)
    if (x == x[0]).all():
        assert found == -math.inf
    elif noise == 0:
        assert found == math.inf
    elif power > 1e-6:
        assert found == pytest.approx(10 * np.log10(power / noise), abs=1e-6)


@pytest.mark.parametrize(
    "samples",
    [
        [np.ones((1, 4), np.float32)],  # one sample
        [np.full((2, 4), 3e38, np.float32)],  # becomes infinite
        [np.ones((2, 4), np.float32), np.ones((2, 3), np.float32)],  # other axes change
    ],
)
def test_what_differs_between_samples_is_not_always_known(samples: list[Any]) -> None:
    signature = "(float[n, m] x) => (float[n, m] y)"
    models = [graph(f"y = Mul(x, {name})", signature, "<float a = {2.0}, float b = {3.0}>") for name in "ab"]
    assert math.isnan(only(compare(models[0], models[1], samples).outputs).variation_db)


@pytest.mark.parametrize(
    ("offset", "words"),
    [(0.0, ""), (2.0, ""), (100.0, "almost the same for every sample: it keeps"), (1e6, "but for rounding")],
)
def test_a_figure_about_what_all_samples_have_in_common_is_called_out(offset: float, words: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 4)).astype(np.float32)
    noise = rng.standard_normal(4).astype(np.float32) * np.float32(max(0.3, offset * 1e-4))
    weights = f"<float o = {{{offset}}}, float[4] e = {{{', '.join(map(str, offset + noise))}}}>"
    found = only(compare(graph("y = Add(x, o)", weights=weights), graph("y = Add(x, e)", weights=weights), [x]).outputs)
    assert [words in warning for warning in mostly_constant([found])] == [True] * bool(words)


@pytest.mark.parametrize(
    ("variation", "words"), [(-50.0, "is almost the same"), (-70.0, "is the same for every sample, but")]
)
def test_rounding_is_what_float32_cannot_tell(variation: float, words: str) -> None:
    output = Difference("y", 40.0, 1, 0, 0, math.nan, 8, 0, 0, 0, variation_db=variation)
    (warning,) = mostly_constant([output])
    assert words in warning


def test_outputs_that_are_equal_for_all_samples() -> None:
    """One of several may be meant so; all of them say that the model does not see the data."""
    exact = Difference("anchors", math.inf, 1, 0, 0, math.nan, 8, 0, 0, 0, variation_db=-math.inf)
    usual = msgspec.structs.replace(exact, name="scores", sqnr_db=20.0, variation_db=19.0)
    assert mostly_constant([exact, usual]) == ()
    (warning,) = mostly_constant([exact])
    assert warning.startswith("output anchors is the same for every sample, but for rounding: its inf dB say nothing")


def test_nan_of_the_candidate_is_called_out() -> None:
    found = compare(graph("y = Identity(x)"), graph("y = Sqrt(x)"), [np.array([[1, -4, 9, 1]], np.float32)])
    output = only(found.outputs)
    assert (output.nonfinite_reference, output.nonfinite, output.elements) == (0, 1, 3)


def test_a_candidate_that_takes_half_precision() -> None:
    half = graph("y = Neg(x)", "(float16[n, 4] x) => (float16[n, 4] y)")
    output = only(compare(graph("y = Neg(x)"), half, data(50)).outputs)
    assert 60 < output.sqnr_db < 90


@pytest.mark.parametrize(
    ("signature", "body", "message"),
    [
        ("(float[n, 4] z) => (float[n, 4] y)", "y = Neg(z)", "the candidate has no input 'x', it has z; "),
        ("(float[n, 4] x) => (float[n, 4] z)", "z = Neg(x)", "the candidate has no output 'y', it has z; "),
        (
            "(float[n, 4] x, float[n, 4] z) => (float[n, 4] y)",
            "y = Add(x, z)",
            "the candidate has an input 'z' that the reference lacks; ",
        ),
        (
            "(float[n, 4] x) => (float[n, 4] y, float[n, 4] z)",
            "y = Neg(x) z = Neg(x)",
            "the candidate has an output 'z' that the reference lacks; ",
        ),
    ],
)
def test_models_that_do_not_belong_together(signature: str, body: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        compare(graph("y = Neg(x)"), graph(body, signature), data(1))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_data_and_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="batch 1: input 'x' has shape"):
        compare(graph("y = Neg(x)"), graph("y = Neg(x)"), [np.ones((2, 5), np.float32)])
    for layers in (False, True):
        with pytest.raises(ModelError, match="no such file"):
            compare(tmp_path / "none.onnx", graph("y = Neg(x)"), data(1), layers=layers)


NETWORK = "(float[n, 3, 6, 6] x) => (float[n, 5] y)"


def network(quantized: bool) -> ir.Model:
    """Conv, MatMul, Gemm; the quantized form as this tool inserts it, with 4 bits to make the errors visible."""
    steps = {
        True: """
            xq = QuantizeLinear(x, s, zero) xd = DequantizeLinear(xq, s, zero)
            wd = DequantizeLinear <axis = 0> (w_codes, w_scale)
            [conv] c = Conv <pads = [1, 1, 1, 1]> (xd, wd)
        """,
        False: "[conv] c = Conv <pads = [1, 1, 1, 1]> (x, w)",
    }
    text = f"""{HEADER} g {NETWORK} <float s = {{0.02}}, int8 zero = {{0}}, int8[1] w_codes = {{0}}, float[1] w = {{0}},
        float[1] w_scale = {{0}}, float[1] m = {{0}}, float[1] k = {{0}}, int64[2] flat = {{0, -1}}> {{
        {steps[quantized]}
        r = Relu(c)
        f = Reshape(r, flat)
        [matmul] h = MatMul(f, m)
        [gemm] y = Gemm(h, k)
    }}"""
    model = ir.from_onnx_text(text)
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    scale = np.abs(weight).max(axis=(1, 2, 3)) / 7
    constants = {
        "w": weight,
        "w_scale": scale,
        "w_codes": np.rint(weight / scale[:, None, None, None]).astype(np.int8),
        "m": rng.standard_normal((144, 8)).astype(np.float32),
        "k": rng.standard_normal((8, 5)).astype(np.float32),
    }
    for name, array in constants.items():
        value = model.graph.initializers[name]
        if not value.uses():
            del model.graph.initializers[name]
            continue
        value.const_value, value.shape = ir.tensor(array, name=name), ir.Shape(array.shape)
    return model


def images() -> list[Any]:
    rng = np.random.default_rng(2)
    return [rng.standard_normal((size, 3, 6, 6)).astype(np.float32) for size in (4, 2)]


def reference_layers(quantized: bool) -> dict[str, Any]:
    """The three results, computed with numpy from the same weights."""
    model = network(quantized)
    constant = {
        name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value
    }
    x = np.concatenate(images()).astype(np.float64)
    weight = constant["w"].astype(np.float64) if not quantized else None
    if weight is None:
        x = np.clip(np.rint(x / np.float32(0.02)), -128, 127) * np.float32(0.02)
        weight = constant["w_codes"] * constant["w_scale"].astype(np.float64)[:, None, None, None]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    c = np.einsum("nchwij,ocij->nohw", windows, weight)
    h = np.maximum(c, 0).reshape(len(x), -1) @ constant["m"]
    return {"c": c, "h": h, "y": h @ constant["k"]}


@pytest.mark.parametrize("group_bytes", [1, GROUP_BYTES])
def test_layers_are_compared_in_network_order(group_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["qonnx.comparison"], "GROUP_BYTES", group_bytes)
    found = compare(network(False), network(True), images(), layers=True)
    assert [(layer.name, layer.node, layer.op) for layer in found.layers] == [
        ("c", "conv", "Conv"),
        ("h", "matmul", "MatMul"),
        ("y", "gemm", "Gemm"),
    ]
    expected, given = reference_layers(False), reference_layers(True)
    for layer in found.layers:
        x, y = expected[layer.name], given[layer.name]
        assert layer.sqnr_db == pytest.approx(10 * np.log10(np.sum(x**2) / np.sum((x - y) ** 2)), abs=0.01)
        assert layer.max_error == pytest.approx(np.abs(x - y).max(), rel=1e-3)
        assert layer.elements == x.size
    assert 10 < found.outputs[0].sqnr_db < 40
    assert found.worst_layers(2) == tuple(sorted(found.layers, key=lambda layer: layer.sqnr_db)[:2])
    assert found.unmatched_layers == ()


def test_layers_match_whatever_computes_them_and_the_rest_is_named() -> None:
    signature = "(float[n, 4] x) => (float[n, 4] y)"
    weights = "<float[4, 4] w = {1,2,3,4, 5,6,7,8, 1,0,0,0, 0,0,1,2}, float s = {0.1}, int8 z = {0}>"
    reference = graph(
        "[one] a = MatMul(x, w) [two] b = MatMul(a, w) [three] c = MatMul(b, w) y = Neg(c)", signature, weights
    )
    candidate = graph(
        """[one] a_input = MatMul(x, w) q = QuantizeLinear(a_input, s, z) a = DequantizeLinear(q, s, z)
           [two] other = MatMul(a, w) [three] c_input = MatMul(other, w) c = QuantizeLinear(c_input, s, z)
           d = DequantizeLinear(c, s, z) y = Neg(d)""",
        signature,
        weights,
    )
    found = compare(reference, candidate, data(2), layers=True)
    assert [(layer.name, layer.node, layer.op) for layer in found.layers] == [("a", "one", "MatMul")]
    assert found.unmatched_layers == ("b", "c")


def test_a_convolution_that_absorbed_its_batchnorm_is_compared_after_it() -> None:
    signature = "(float[n, 2, 1, 1] x) => (float[n, 2, 1, 1] y)"
    weights = (
        "<float[2, 2, 1, 1] w = {1, 2, 3, 4}, float[2] a = {2, 2}, float[2] b = {1, 1}, float[2] m = {0, 0},"
        "float[2] v = {1, 1}>"
    )
    reference = graph(
        "[conv] c = Conv(x, w) n = BatchNormalization <epsilon = 0.0> (c, a, b, m, v) y = Relu(n)", signature, weights
    )
    candidate = graph("[conv] n = Conv(x, w, b) y = Relu(n)", signature, weights.replace("1, 2, 3, 4", "2, 4, 6, 8"))
    found = compare(reference, candidate, [np.ones((1, 2, 1, 1), np.float32)], layers=True)
    assert [(layer.name, layer.node, layer.op, layer.max_error) for layer in found.layers] == [("n", "conv", "Conv", 0)]
    assert found.unmatched_layers == ()


def test_a_relu_that_codes_stand_for_is_compared_behind_them() -> None:
    signature = "(float[n, 1, 2, 2] x) => (float[n, 2, 2, 2] y)"
    weights = "<float[2, 1, 1, 1] w = {1, -1}, float s = {1}, uint8 z = {0}>"
    reference = graph("[conv] c = Conv(x, w) r = Relu(c) y = Neg(r)", signature, weights)
    bounded = "[conv] r = Conv(x, w) q = QuantizeLinear(r, s, z) d = DequantizeLinear(q, s, z) y = Neg({})"
    batch = np.array([[[[3, -2], [1, -5]]]], np.float32)
    found = compare(reference, graph(bounded.format("d"), signature, weights), [batch], layers=True)
    assert [(layer.name, layer.op, layer.max_error) for layer in found.layers] == [("r", "Conv", 0)]
    # Another reader than the codes sees what lies below 0.
    found = compare(reference, graph(bounded.format("r"), signature, weights), [batch], layers=True)
    assert [(layer.name, layer.op, layer.max_error) for layer in found.layers] == [("r", "Conv", 5)]


def test_shapes_outside_a_file_are_read(tmp_path: Path) -> None:
    body = "p = Shape(x) k = Add(p, z) y = Reshape(x, k) v = Reshape(y, s)"
    model = graph(
        body, "(float[n, 4] x) => (float[n, 4] y, float[?, 2] v)", "<int64[2] z = {0, 0}, int64[2] s = {-1, 2}>"
    )
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    for found in (compare(tmp_path / "m.onnx", model, data(3, 5)), compare(model, tmp_path / "m.onnx", data(3, 5))):
        assert [output.sqnr_db for output in found.outputs] == [math.inf, math.inf]
