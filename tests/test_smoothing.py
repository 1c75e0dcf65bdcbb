"""Smoothing from data to folded model: exact, better by estimate and in integers, and accounted for."""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qonnx.errors import DataError
from qonnx.group_error import GroupError, Quantizers, Ranges, channel_axes, measure
from qonnx.group_report import GroupReport
from qonnx.group_samples import collect_inputs
from qonnx.groups import Residual, SmoothGroup, find_groups
from qonnx.numerics import Dtype
from qonnx.observation import observe
from qonnx.passes.outlier_suppression import OutlierSuppression
from qonnx.passes.smooth_quant import SmoothQuant
from qonnx.runtime import session, with_outputs
from qonnx.smoothing import Method, smooth
from qonnx.statistics import Statistics
from tests.helpers import assert_same_function, operators
from tests.smoothing import prepared
from tests.test_smooth_quant import quantized_error

WEIGHTS = "g b w1 w2 b2 w3"
BLOCK = (
    "g (float[N,8] x, float[8] g, float[8] b, float[8,16] w1, float[16,8] w2, float[8] b2, float[8,4] w3)"
    "=> (float[N,8] y, float[N,4] z)"
    "{ n = LayerNormalization(x, g, b) h = MatMul(n, w1) r = Relu(h) m = MatMul(r, w2) a = Add(m, b2)"
    "  y = Add(a, n) e = Gelu(y) z = MatMul(e, w3) }"
)
Batches = list[dict[str, npt.NDArray[np.float32]]]


def block() -> tuple[ir.Model, Batches]:
    """A block with channels that stick out behind its norm, and batches for it."""
    model = prepared(BLOCK, WEIGHTS)
    for name, channels in (("g", {1: 30.0, 5: 9.0}), ("b", {3: 40.0})):
        stored = model.graph.initializers[name]
        assert stored.const_value is not None
        array = stored.const_value.numpy().copy()
        for channel, value in channels.items():
            array[channel] = value
        stored.const_value = ir.tensor(array, name=name)
    rng = np.random.default_rng(0)
    return model, [{"x": rng.standard_normal((40, 8)).astype(np.float32)} for _ in range(4)]


def run(
    model: ir.Model, batches: Batches, method: Method, residual: Residual = Residual.MUL, explicit: bool = True
) -> tuple[GroupReport, ...]:
    groups = find_groups(model, residual=residual, explicit=explicit)
    axes = channel_axes(groups)
    statistics = observe(model, list(axes), batches, channel_axes=axes)
    return smooth(model, groups, method, statistics, collect_inputs(model, groups, batches), Quantizers())


METHODS: list[Method] = [SmoothQuant(0.5), SmoothQuant(), OutlierSuppression(), OutlierSuppression(percentile=99.0)]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_function_stays_and_the_report_says_what_was_done(method: Method) -> None:
    model, batches = block()
    before = model.clone()
    reports = run(model, batches, method)
    assert_same_function(before, model, batches[0], rtol=2e-5)
    assert [report.value for report in reports] == ["n", "h", "e"]
    norm = reports[0]
    assert norm.producer.startswith("LayerNormalization '")
    assert len(norm.consumers) == 1
    assert norm.reason == ""
    assert norm.nodes == (2 if "after a shift" in norm.method else 1)
    assert (norm.channels, norm.changed) == (8, norm.changed)
    assert norm.crest is not None
    assert norm.smoothed_crest is not None
    assert norm.smoothed_crest < norm.crest
    assert norm.sqnr_db is not None
    assert norm.smoothed_sqnr_db is not None
    assert norm.smoothed_sqnr_db > norm.sqnr_db + 3
    assert norm.weight_growth is not None
    assert norm.weight_growth > 0
    for report in reports:
        assert bool(report.method) != bool(report.reason)
        assert report.smoothed_sqnr_db is None or report.sqnr_db is None or report.smoothed_sqnr_db > report.sqnr_db


def test_residual_connections_are_refused_unless_a_mul_is_allowed() -> None:
    model, batches = block()
    reports = run(model, batches, OutlierSuppression(), Residual.REFUSE, explicit=False)
    assert "adds something else to it" in reports[0].reason
    assert "which cannot absorb factors" in reports[2].reason
    assert reports[2].producer == ""
    assert "Mul" not in operators(model)


def test_a_node_must_be_worth_it() -> None:
    """Channels that are all alike gain next to nothing."""
    text = (
        "g (float[N,8] x, float[8] g, float[8] b, float[8,16] w1) => (float[N,16] y, float[N,8] z)"
        "{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) z = Add(x, n) }"
    )
    model = prepared(text, "w1 b g")
    for name, value in (("g", 1.0), ("b", 0.0)):
        model.graph.initializers[name].const_value = ir.tensor(np.full(8, value, np.float32), name=name)
    before = ir.to_onnx_text(model)
    (report,) = run(model, block()[1], SmoothQuant())
    assert "would gain" in report.reason
    assert (report.method, report.changed) == ("", 0)
    assert ir.to_onnx_text(model) == before


def test_an_alpha_that_does_harm_is_not_applied() -> None:
    model, batches = block()
    report = run(model, batches, SmoothQuant(0.0))[0]
    assert "SmoothQuant, alpha 0 would gain -" in report.reason


def test_nothing_to_smooth() -> None:
    model = prepared("g (float[N,8] x) => (float[N,8] y) { y = Exp(x) }", "")
    assert run(model, block()[1], SmoothQuant()) == ()


def test_a_tensor_that_was_not_observed() -> None:
    model, _ = block()
    groups = find_groups(model, residual=Residual.MUL)
    reports = smooth(model, groups, SmoothQuant(0.5), Statistics({}), {})
    assert [report.reason for report in reports][:2] == [
        "channels of n were not observed; calibrate with channel_axes",
        "channels of r were not observed; calibrate with channel_axes",
    ]


def test_without_samples_a_given_alpha_is_applied() -> None:
    model, batches = block()
    groups = find_groups(model, residual=Residual.MUL)
    axes = channel_axes(groups)
    reports = smooth(model, groups, SmoothQuant(0.5), observe(model, list(axes), batches, channel_axes=axes), {})
    assert reports[0].method == "SmoothQuant, alpha 0.5"
    assert (reports[0].sqnr_db, reports[0].smoothed_sqnr_db) == (None, None)


def group_and_samples(
    text: str, batches: Batches
) -> tuple[SmoothGroup, Statistics, dict[str, npt.NDArray[np.float32]]]:
    model = prepared(text, WEIGHTS)
    groups = [group for group in find_groups(model) if not group.reason]
    axes = channel_axes(groups)
    statistics = observe(model, list(axes), batches, channel_axes=axes)
    return groups[-1], statistics, collect_inputs(model, groups, batches)


CONV = (
    "g (float[N,3,6,5] x, float[4,3,1,1] w1, float[6,4,3,3] w2) => (float[N,6,4,3] y)"
    "{ c = Conv(x, w1) y = Conv(c, w2) }"
)


def test_channels_of_an_image() -> None:
    rng = np.random.default_rng(0)
    batches = [{"x": rng.standard_normal((2, 3, 6, 5)).astype(np.float32)}]
    group, statistics, samples = group_and_samples(CONV, batches)
    (name,) = group.inputs
    assert samples[name].shape == (60, 4)
    ranges = measure(group, statistics)
    np.testing.assert_allclose(ranges.low, samples[name].min(axis=0))
    np.testing.assert_allclose(ranges.high, samples[name].max(axis=0))
    weight = group.consumers[0].linear.weight.const_value
    assert weight is not None
    array = weight.numpy().astype(np.float64)
    np.testing.assert_allclose(ranges.weight, np.abs(array).max(axis=(0, 2, 3)))
    assert GroupError(group, ranges, samples, Quantizers())(np.ones(4), np.zeros(4)) > 0


def test_weights_of_grouped_convolutions() -> None:
    text = (
        "g (float[N,3,6] x, float[4,3,1] w1, float[6,2,3] w2) => (float[N,6,4] y)"
        "{ c = Conv(x, w1) y = Conv <group = 2> (c, w2) }"
    )
    batches = [{"x": np.random.default_rng(0).standard_normal((2, 3, 6)).astype(np.float32)}]
    group, statistics, _ = group_and_samples(text, batches)
    weight = group.consumers[0].linear.weight.const_value
    assert weight is not None
    per_group = np.abs(weight.numpy()).max(axis=2).reshape(2, 3, 2).max(axis=1).reshape(-1)
    ranges = measure(group, statistics)
    np.testing.assert_allclose(ranges.weight, per_group)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    ("groups", "op", "shape"), [(2, "Conv", (6, 2)), (4, "Conv", (8, 1)), (2, "ConvTranspose", (4, 3))]
)
def test_the_error_of_a_grouped_convolution(op: str, groups: int, shape: tuple[int, int], per_channel: bool) -> None:
    """It is that of one layer a group, side by side: x [tokens, inputs], and every tap an output of its own."""
    text = (
        f"g (float[N,3,6] x, float[4,3,1] w1, float[{shape[0]},{shape[1]},3] w2) => (float[N,K,M] y)"
        f"{{ c = Conv(x, w1) y = {op} <group = {groups}> (c, w2) }}"
    )
    rng = np.random.default_rng(0)
    group, statistics, samples = group_and_samples(text, [{"x": rng.standard_normal((2, 3, 6)).astype(np.float32)}])
    error = GroupError(group, measure(group, statistics), samples, Quantizers(per_channel=per_channel))
    s, z = np.exp(rng.standard_normal(4)), np.zeros(4) if op == "ConvTranspose" else rng.standard_normal(4)
    tensor = group.consumers[0].linear.weight.const_value
    assert tensor is not None
    w, (x,) = tensor.numpy().astype(np.float64), samples.values()
    step = np.abs((x - z) / s).max() / 127
    rounded, inputs, noise, signal = np.rint((x - z) / s / step) * step, 4 // groups, 0.0, 0.0
    parts = []
    for number in range(groups):
        if op == "Conv":
            outputs = shape[0] // groups
            part = w[number * outputs : (number + 1) * outputs].transpose(1, 2, 0)
        else:
            part = w[number * inputs : (number + 1) * inputs].transpose(0, 2, 1)
        parts.append(part * s[number * inputs : (number + 1) * inputs, None, None])
    for number, part in enumerate(parts):
        own = slice(number * inputs, (number + 1) * inputs)
        largest = np.abs(part).max(axis=(0, 1)) if per_channel else max(np.abs(each).max() for each in parts)
        q = (np.rint(part / largest * 127) * largest / 127).reshape(inputs, -1)
        y = x[:, own] @ (part / s[own, None, None]).reshape(inputs, -1)
        difference = rounded[:, own] @ q + z[own] @ (part / s[own, None, None]).reshape(inputs, -1) - y
        noise += np.square(difference - difference.mean(axis=0)).sum()
        signal += np.square(y - y.mean(axis=0)).sum()
    assert error(s, z) == pytest.approx(noise / signal, rel=0.02)


def test_rows_are_those_of_the_tensor() -> None:
    model, batches = block()
    groups = find_groups(model, residual=Residual.MUL, explicit=True)
    samples = collect_inputs(model, groups, batches, tokens=30)
    runner = session(with_outputs(model, list(samples)))
    for name, rows in samples.items():
        assert rows.shape[0] == 30
        whole = np.concatenate([runner.run(batch)[name] for batch in batches])
        distance = np.abs(rows[:, None] - whole[None]).max(axis=2).min(axis=1)
        np.testing.assert_allclose(distance, 0, atol=1e-6)
        assert len(np.unique(rows, axis=0)) == 30


def test_fewer_rows_than_asked_for() -> None:
    model, batches = block()
    groups = find_groups(model, residual=Residual.MUL)
    assert collect_inputs(model, groups, batches[:1], tokens=512)["n"].shape == (40, 8)
    assert collect_inputs(model, (), batches) == {}
    with pytest.raises(DataError, match="at least one batch"):
        collect_inputs(model, groups, [])


def test_one_scale_for_a_weight_and_fewer_bits() -> None:
    model, batches = block()
    groups = find_groups(model, residual=Residual.MUL)
    axes = channel_axes(groups)
    ranges = measure(groups[0], observe(model, list(axes), batches, channel_axes=axes))
    samples = collect_inputs(model, groups, batches)
    one, zero = np.ones(8), np.zeros(8)

    def error(quantizers: Quantizers) -> float:
        return GroupError(groups[0], ranges, samples, quantizers)(one, zero)

    assert error(Quantizers(per_channel=False)) > error(Quantizers())
    assert error(Quantizers(weights=Dtype.INT4)) > 4 * error(Quantizers())
    assert error(Quantizers(activations=Dtype.UINT8, symmetric=False)) < error(Quantizers())
    assert error(Quantizers(correct_biases=False)) != error(Quantizers())


def test_wide_layers_are_measured_on_some_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = block()
    groups = find_groups(model, residual=Residual.MUL)
    axes = channel_axes(groups)
    ranges = measure(groups[0], observe(model, list(axes), batches, channel_axes=axes))
    samples = collect_inputs(model, groups, batches)
    one, zero = np.ones(8), np.zeros(8)
    whole = GroupError(groups[0], ranges, samples, Quantizers())(one, zero)
    monkeypatch.setattr("qonnx.group_error._BUDGET", 1)
    monkeypatch.setattr("qonnx.group_error._FEWEST", 4)
    part = GroupError(groups[0], ranges, samples, Quantizers())(one, zero)
    assert part != whole
    assert part == pytest.approx(whole, rel=1.0)


def test_the_estimate_is_what_integers_do() -> None:
    model, batches = block()
    groups = find_groups(model, residual=Residual.MUL)
    axes = channel_axes(groups)
    ranges = measure(groups[0], observe(model, list(axes), batches, channel_axes=axes))
    samples = collect_inputs(model, groups, batches)
    weight = groups[0].consumers[0].linear.weight.const_value
    assert weight is not None
    scale, shift = np.linspace(0.5, 4, 8), np.linspace(-1, 1, 8)
    expected = quantized_error(samples["n"].astype(np.float64), [weight.numpy().astype(np.float64)], scale, shift)
    assert GroupError(groups[0], ranges, samples, Quantizers())(scale, shift) == pytest.approx(expected, rel=0.02)


def test_a_token_that_is_louder_than_all_others_does_not_decide() -> None:
    """Its noise counts as if it had 16 times the median power, and the others are not lost beside it."""
    text = (
        "g (float[T,8] x, float[8] g, float[8,6] w) =>(float[T,6] y) { n = RMSNormalization(x, g ) y = MatMul(n, w) }"
    )
    model = prepared(text, "g w", opset=23)
    (group,) = find_groups(model)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 8)).astype(np.float32)
    x[0, 3] = 3000
    axes = channel_axes([group])
    (name,) = axes
    ranges = Ranges(x.min(axis=0).astype(np.float64), x.max(axis=0).astype(np.float64), np.ones(8))
    tensor = group.consumers[0].linear.weight.const_value
    assert tensor is not None
    w = tensor.numpy().astype(np.float64)
    signal = np.square(x @ w).sum(axis=1)
    weight = np.minimum(1, 16 * np.median(signal) / signal)

    def power(y: npt.NDArray[np.float64], centred: bool) -> float:
        mean = (weight[:, None] * y).sum(axis=0) / weight.sum() if centred else 0.0
        return float((weight[:, None] * np.square(y - mean)).sum())

    for s in (np.ones(8), np.array([1, 1, 1, 1000.0, 1, 1, 1, 1])):
        step, steps = np.abs(x / s).max() / 127, np.abs(w * s[:, None]).max(axis=0) / 127
        noise = np.rint(x / s / step) * step @ (np.rint(w * s[:, None] / steps) * steps) - x @ w
        for centred in (False, True):
            error = GroupError(group, ranges, {name: x}, Quantizers(correct_biases=centred))
            expected = power(noise, centred) / power(x @ w, centred)
            assert error(s, np.zeros(8)) == pytest.approx(expected, rel=0.02)
        if s[3] == 1:
            assert expected > 0.2  # nothing is left of eight tokens of nine: 1e-5 by power
