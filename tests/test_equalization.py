"""Equalization inside the one call: what moves and why not, exact in float, better in integers, kept in the plan."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

import qonnx
from qonnx.equalization import equalize
from qonnx.errors import RecipeError
from qonnx.group_error import Quantizers, channel_axes
from qonnx.group_report import GroupReport
from qonnx.group_samples import collect_inputs
from qonnx.groups import find_groups
from qonnx.observation import observe
from qonnx.passes.equalize import Equalization
from qonnx.passes.prepare import prepare
from qonnx.passes.rescale_channels import RescaleChannels
from qonnx.plan import QuantPlan
from qonnx.recipe import load_recipe
from tests.graphs import model_of
from tests.helpers import assert_same_function, operators

Batches = list[dict[str, npt.NDArray[np.float32]]]
C = 16
# One block of MobileNetV2: expansion, depthwise convolution, projection.
BLOCK = (
    f"g (float[n,{C},8,8] x, float[32,{C},1,1] w1, float[32] b1, float[32,1,3,3] w2, float[32] b2,"
    f"   float[{C},32,1,1] w3, float[{C}] b3) => (float[n,{C},8,8] y) <float zero = {{0}}, float six = {{6}}>"
    "{ [up] a = Conv(x, w1, b1) c = Clip(a, zero, six) [deep] d = Conv <group = 32, pads = [1, 1, 1, 1]> (c, w2, b2)"
    "  e = Clip(d, zero, six) [down] y = Conv(e, w3, b3) }"
)
WEIGHTS = "w1 w2 w3 b1 b2 b3 g b"


def model(text: str = BLOCK, seed: int = 0) -> ir.Model:
    """Convolutions whose channels differ in size by a factor of up to 50, as folded normalisations leave them."""
    made = model_of(text, weights=WEIGHTS, scale=0.4, opset=21)
    rng = np.random.default_rng(seed)
    for name in ("w1", "w2"):
        stored = made.graph.initializers.get(name)
        if stored is not None and stored.const_value is not None:
            array = stored.const_value.numpy()
            factors = np.exp(rng.uniform(-3, 1, array.shape[0])).reshape(-1, *[1] * (array.ndim - 1))
            stored.const_value = ir.tensor((array * factors).astype(np.float32), name=name)
    prepare(made)
    return made


def data(count: int = 8, seed: int = 0, rows: int = 16) -> Batches:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((rows, C, 8, 8)).astype(np.float32)} for _ in range(count)]


def run(
    made: ir.Model,
    method: Equalization | None = None,
    quantizers: Quantizers | None = None,
    batches: Batches | None = None,
) -> dict[str, GroupReport]:
    """Equalizes a model, checks that it computes what it did, and returns the reports by value."""
    method, batches, before = method or Equalization(), batches or data(2), made.clone()
    groups = find_groups(made, explicit=method.nodes, pad=method.pad, bounds=True)
    axes = channel_axes(groups)
    statistics = observe(made, list(axes), batches, channel_axes=axes)
    samples = collect_inputs(made, groups, batches)
    rescalings, reports = equalize(groups, method, statistics, samples, quantizers or Quantizers())
    RescaleChannels(rescalings)(made)
    assert_same_function(before, made, batches[0], rtol=2e-5)
    for report in reports:
        assert bool(report.method) != bool(report.reason), report
        assert bool(report.changed) == bool(report.method)
    return {report.value: report for report in reports}


def test_a_block_gets_factors_and_an_offset_and_no_node() -> None:
    made = model()
    reports = run(made)
    assert operators(made) == ["Conv", "Relu", "Min", "Conv", "Clip", "Conv"]
    wide, moved = reports["a"], reports["d"]
    assert (wide.method, wide.nodes) == ("equalized", 0)
    assert wide.changed > 20
    assert wide.crest is not None
    assert wide.smoothed_crest is not None
    assert wide.crest > 2
    assert wide.smoothed_crest < 1.1
    assert moved.method == "moved to the middle, 6.0 dB"
    assert (moved.nodes, moved.changed) == (0, 32)
    for report in (wide, moved):
        assert report.sqnr_db is not None
        assert report.smoothed_sqnr_db is not None
        assert report.smoothed_sqnr_db > report.sqnr_db + 1


def test_padding_in_nodes_of_its_own() -> None:
    made = model()
    reports = run(made, Equalization(pad=True))
    assert reports["a"].method.startswith("equalized and moved to the middle")
    assert reports["a"].nodes == 1
    assert operators(made) == ["Conv", "Clip", "Min", "Pad", "Conv", "Clip", "Conv"]


def test_weights_with_one_scale_are_equalized_across_layers() -> None:
    made = model()
    reports = run(made, Equalization(shift=False), Quantizers(per_channel=False))
    assert {value for value, report in reports.items() if report.method == "equalized"} == {"a", "d"}
    assert "Min" in operators(made)


@pytest.mark.parametrize(
    ("method", "quantizers", "reason"),
    [
        (Equalization(shift=False), Quantizers(), "offsets are not wanted"),
        (Equalization(), Quantizers(symmetric=False), "has a zero point"),
        (Equalization(), Quantizers(correct_biases=False), "an offset needs corrected biases"),
    ],
)
def test_offsets_that_would_gain_nothing_or_do_harm(method: Equalization, quantizers: Quantizers, reason: str) -> None:
    reports = run(model(), method, quantizers)
    assert reason in reports["d"].reason
    assert reports["a"].method == "equalized"


def test_no_factors_where_the_recipe_wants_none() -> None:
    reports = run(model(), Equalization(factors=False))
    assert reports["a"].reason == "Conv 'deep' pads with zeros"
    assert reports["d"].method.startswith("moved")


GELU = (
    f"g (float[n,{C},8,8] x, float[32,{C},1,1] w1, float[32] b1, float[{C},32,1,1] w3) => (float[n,{C},8,8] y)"
    "{ [up] a = Conv(x, w1, b1) e = Gelu(a) [down] y = Conv(e, w3) }"
)


def test_behind_a_gelu_one_sub_that_must_pay() -> None:
    made = model(GELU)
    report = run(made)["e"]
    assert report.nodes == 1
    assert report.method.startswith("moved to the middle")
    assert operators(made) == ["Conv", "Gelu", "Sub", "Conv"]
    made = model(GELU)
    assert run(made, Equalization(nodes=False))["e"].reason == "e is made by Gelu 'Gelu_0', which cannot absorb factors"
    assert operators(made) == ["Conv", "Gelu", "Conv"]


def test_behind_a_swish() -> None:
    text = GELU.replace("e = Gelu(a)", "s = Sigmoid(a) e = Mul(a, s)")
    made = model(text)
    assert run(made)["e"].method.startswith("moved to the middle")
    assert operators(made) == ["Conv", "Sigmoid", "Mul", "Sub", "Conv"]


LEAVES_ALONE = {
    "a tensor around zero": ("[up] a = Conv(x, w1) [down] y = Conv(a, w3)", "its range is even"),
    "a residual connection": (
        "[up] a = Conv(x, w1) r = Relu(a) [down] t = Conv(r, w3) [again] u = Conv(t, w1) s = Add(u, r) y = Conv(s, w3)",
        "adds something else to it",
    ),
    "an output": ("[up] a = Conv(x, w1) z = Relu(a) [down] y = Conv(z, w3)", "is an output of the model"),
    "padding": ("[up] a = Conv(x, w1) r = Relu(a) [down] y = Conv <pads = [1, 1, 1, 1]> (r, w3)", "pads with zeros"),
    "two producers side by side": (
        "[up] a = Conv(x, w1) h = Tanh(x) k = Concat <axis = 1> (a, h) r = Relu(k) [down] y = Conv(r, w4)",
        "one bound serves channels that cannot move too",
    ),
}


@pytest.mark.parametrize("case", LEAVES_ALONE)
def test_left_alone_with_the_reason(case: str) -> None:
    body, reason = LEAVES_ALONE[case]
    more = f", float[n,32,8,8] z{'' if 'z = ' in body else '_'}" if " z = " in body else ""
    text = (
        f"g (float[n,{C},8,8] x, float[32,{C},1,1] w1, float[{C},32,1,1] w3, float[{C},48,1,1] w4)"
        f"=> (float[n,{C},K,L] y{more}) {{ {body} }}"
    )
    made = model_of(text, weights="w1 w3 w4", scale=0.3)
    prepare(made)
    reports = run(made, Equalization(nodes=False))
    assert reason in reports["a"].reason, reports["a"]


PLAIN = ("goal_sqnr_db=0", "minimum_sqnr_db=-100", "smooth.kind=none", "activations.calibrator.kind=average")


def quantized(tmp_path: Path, *settings: str, target: str = "a800") -> qonnx.Result:
    return qonnx.quantize(model(), data(), tmp_path / "q.onnx", target=target, settings=[*PLAIN, *settings])


def test_the_default_keeps_it_and_the_bounds_go(tmp_path: Path) -> None:
    without = quantized(tmp_path, "equalize.kind=none")
    result = quantized(tmp_path)
    assert result.comparison.outputs[0].sqnr_db > without.comparison.outputs[0].sqnr_db + 1
    assert any(note.startswith("equalized ") and note.endswith("dB more") for note in result.notes)
    assert {report.value for report in result.smoothing if report.method} >= {"a", "d"}
    assert without.smoothing == ()
    ops = [node.op_type for node in ir.load(result.output).graph if not node.op_type.endswith("Linear")]
    assert ops[-5:] == ["Conv", "Relu", "Conv", "Clip", "Conv"]


@pytest.mark.parametrize(
    "settings",
    [
        ("equalize.kind=always", "equalize.pad=true"),
        ("equalize.kind=always", "equalize.pad=false"),
        ("equalize.kind=always", "smooth.kind=smoothquant"),
        ("equalize.kind=always", "weights.granularity.kind=per_tensor"),
    ],
)
def test_a_plan_that_is_fed_back_does_the_same(settings: tuple[str, ...], tmp_path: Path) -> None:
    result = quantized(tmp_path, *settings)
    result.plan.save(tmp_path / "plan.json")
    assert QuantPlan.load(tmp_path / "plan.json") == result.plan
    assert any(plan.bounds for plan in result.plan.smoothing)
    again = tmp_path / "again.onnx"
    qonnx.quantize(model(), data(), again, plan=tmp_path / "plan.json", settings=[*PLAIN, *settings])
    assert again.read_bytes() == Path(result.output).read_bytes()


def test_a_runtime_with_zero_points_needs_no_offsets(tmp_path: Path) -> None:
    result = quantized(tmp_path, target="ort-cpu")
    reports = {report.value: report for report in result.smoothing}
    assert "zero point" in reports["d"].reason


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    statistics = qonnx.calibrate(model(), data())
    with pytest.raises(RecipeError, match=r"equalize\.kind=none"):
        qonnx.quantize(model(), data(), tmp_path / "q.onnx", statistics=statistics, settings=["equalize.kind=always"])
    with pytest.raises(RecipeError, match="unknown key"):
        load_recipe("int8", ["equalize.offset=true"])


def test_nothing_to_equalize_is_a_warning_for_who_asked_for_it(tmp_path: Path) -> None:
    text = f"g (float[n,{C},8,8] x, float[32,{C},1,1] w1) => (float[n,32,8,8] y) {{ y = Conv(x, w1) }}"
    made = model_of(text, weights="w1")
    settings = ["smooth.kind=none", "equalize.kind=always", "equalize.nodes=false"]
    result = qonnx.quantize(made, data(), tmp_path / "q.onnx", settings=settings)
    assert any(warning.startswith("nothing can be equalized: ") for warning in result.warnings)
    quiet = qonnx.quantize(made, data(), tmp_path / "q.onnx", settings=["smooth.kind=none"])
    assert not any("equalized" in warning for warning in quiet.warnings)
