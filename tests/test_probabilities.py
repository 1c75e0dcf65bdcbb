"""Grids of probabilities, and offsets of the values that they are multiplied by."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

import qonnx
from qonnx.groups import find_groups
from qonnx.numerics import Dtype
from qonnx.passes.prepare import prepare
from qonnx.placement import place
from qonnx.plan import QuantPlan
from qonnx.probabilities import Attention, Grids, Looks, _Probe, attentions, choose_grids
from qonnx.recipe import Recipe, load_recipe
from qonnx.resolve import resolve
from qonnx.runtime import session, with_outputs
from qonnx.smooth_choice import smoothed
from qonnx.smooth_plan import apply
from qonnx.targets import target
from tests.graphs import model_of
from tests.helpers import assert_same_function

Batches = list[dict[str, npt.NDArray[np.float32]]]

# Two heads of sixteen elements over as many keys as there are rows.
ATTENTION = """g (float[n,l,32] x, float[32,32] wq, float[32,32] wk, float[32,32] wv, float[32] bq, float[32] bk,
  float[32] bv, float[32,32] wo, float[32] bo) => (float[n,l,32] y)
<int64[4] heads = {0, 0, 2, 16}, int64[3] whole = {0, 0, 32}, float root = {0.25}> {
  [q] q0 = MatMul(x, wq) q1 = Add(q0, bq) q2 = Reshape(q1, heads) q = Transpose<perm = [0, 2, 1, 3]>(q2)
  [k] k0 = MatMul(x, wk) k1 = Add(k0, bk) k2 = Reshape(k1, heads) k = Transpose<perm = [0, 2, 3, 1]>(k2)
  [v] v0 = MatMul(x, wv) v1 = Add(v0, bv) v2 = Reshape(v1, heads) v = Transpose<perm = [0, 2, 1, 3]>(v2)
  [scores] s0 = MatMul(q, k) s = Mul(s0, root) p = Softmax<axis = -1>(s)
  [mix] c0 = MatMul(p, v) c1 = Transpose<perm = [0, 2, 1, 3]>(c0) c = Reshape(c1, whole)
  [out] o = MatMul(c, wo) y = Add(o, bo) }"""
WEIGHTS = "wq wk wv bq bk bv wo bo"
TARGET = target("a800")


def model(text: str = ATTENTION, values: float = 3.0) -> ir.Model:
    """Its values have a mean of their own in every channel."""
    made = model_of(text, weights=WEIGHTS, scale=0.2)
    bias = made.graph.initializers["bv"]
    assert bias.const_value is not None
    bias.const_value = ir.tensor((bias.const_value.numpy() + values).astype(np.float32), name="bv")
    prepare(made)
    return made


def data(count: int, seed: int = 0, length: int = 96) -> Batches:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((4, length, 32)).astype(np.float32)} for _ in range(count)]


def found(made: ir.Model) -> list[Attention]:
    placement = place(made, resolve(Recipe(), TARGET), TARGET)
    return list(attentions(made, placement, find_groups(made)))


def chosen(made: ir.Model, corrected: bool = False, ends: tuple[float, ...] = (1.0, 0.85, 0.7, 0.6)) -> Grids:
    return choose_grids(
        made, found(made), data(2), data(1, seed=1), Dtype.INT8, symmetric=True, biases_corrected=corrected, ends=ends
    )


def rounded(x: npt.NDArray[np.float64], end: float) -> npt.NDArray[np.float64]:
    return np.clip(np.rint(x * 127 / end), -128, 127) * end / 127


def operands(made: ir.Model, batches: Batches) -> list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    runner = session(with_outputs(made, ["p", "v"]))
    return [(r["p"].astype(np.float64), r["v"].astype(np.float64)) for r in map(runner.run, batches)]


def test_an_attention_is_found_with_the_channels_of_its_values() -> None:
    (one,) = found(model())
    assert (one.probabilities, one.values) == ("p", "v")
    assert one.group is not None
    assert one.channels is not None
    assert one.group.value == "v1"
    assert one.channels.axes == (1, 3)
    np.testing.assert_array_equal(one.channels.index, np.arange(32).reshape(2, 16))


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("p = Softmax<axis = -1>(s)", "p = Sigmoid(s)", "rows of a sigmoid sum to anything"),
        ("c0 = MatMul(p, v)", "c9 = MatMul(p, v) c0 = Relu(c9)", "an offset does not pass a Relu"),
        ("[v] v0 = MatMul(x, wv)", "[v] v9 = MatMul(x, wv) v0 = Tanh(v9)", "values are no linear layer's"),
        ("c0 = MatMul(p, v)", "p2 = Mul(p, root) c0 = MatMul(p2, v)", "rows sum to a half"),
    ],
)
def test_no_offset_where_it_would_change_the_function(old: str, new: str, why: str) -> None:
    made = model(ATTENTION.replace(old, new))
    for one in found(made):
        assert one.group is None or one.group.value != "v1", why
    for rescaling in chosen(made).rescalings:
        assert rescaling.group.value != "v1", why


@pytest.mark.parametrize("corrected", [False, True])
def test_offsets_are_those_of_a_regression(corrected: bool) -> None:
    made = model()
    (rescaling,) = chosen(made, corrected, ends=(0.5,)).rescalings
    assert (rescaling.scale == 1).all()
    for head in range(2):
        for element in range(16):
            sums, errors = [], []
            for p, v in operands(made, data(2)):
                d = rounded(p[:, head], 0.5) - p[:, head]
                sums += list(d.sum(axis=-1).ravel())
                errors += list((d @ v[:, head, :, element, None])[..., 0].ravel())
            s, e = np.array(sums), np.array(errors)
            if corrected:
                s, e = s - s.mean(), e - e.mean()
            np.testing.assert_allclose(rescaling.offset[head * 16 + element], (s @ e) / (s @ s), rtol=1e-3)


def test_the_grid_ends_where_the_product_has_the_least_error() -> None:
    made = model()
    grids = chosen(made)
    (rescaling,) = grids.rescalings
    errors = {}
    for end in (1.0, 0.85, 0.7, 0.6):
        (offsets,) = (one.offset for one in chosen(made, ends=(end,)).rescalings)
        ((p, v),) = operands(made, data(1, seed=1))
        moved = v - offsets.reshape(1, 2, 1, 16)
        reach = np.abs(moved).max()
        errors[end] = np.square(rounded(p, end) @ rounded(moved, reach) - p @ moved).sum()
    best = min(errors, key=lambda end: errors[end])
    assert best < 1
    assert grids.ranges["p"].high == best
    assert rescaling.group.value == "v1"


def test_peaks_are_not_cut_off() -> None:
    made = model_of(ATTENTION.replace("root = {0.25}", "root = {40.0}"), weights=WEIGHTS, scale=0.2)
    prepare(made)
    assert not chosen(made).ranges


def test_long_sequences_are_looked_at_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    (whole,) = operands(made, data(1))
    monkeypatch.setattr("qonnx.probabilities._ELEMENTS", 96 * 96)  # a sample has two heads: every second query
    (few,) = Looks(made, found(made), data(1)[0]).at(data(1))
    np.testing.assert_allclose(few["p"], whole[0][:1, :, ::2], rtol=1e-5)
    np.testing.assert_allclose(few["v"], whole[1][:1], rtol=1e-5)


@pytest.mark.parametrize("smoothing", ["smooth.kind=auto", "smooth.nodes=false"])
def test_it_is_kept_where_outputs_gain_and_repeated_from_the_plan(smoothing: str, tmp_path: Path) -> None:
    made = model()
    recipe = resolve(load_recipe("int8", [smoothing, "equalize.kind=none"]), TARGET)
    result = smoothed(made, recipe, TARGET, data(4), data(2, seed=1))
    assert any("1 of 1 attentions with values centred" in note for note in result.notes), result.notes
    assert_same_function(made, result.model, data(1, seed=2)[0])
    assert_same_function(result.model, apply(made, result.plans), data(1, seed=2)[0])
    assert result.probabilities["p"].high < 1


def test_the_plan_has_the_grid_and_the_outputs_gain(tmp_path: Path) -> None:
    made, batches = model(), data(16)
    kept = {}
    for smoothing in ("auto", "none"):
        settings = [f"smooth.kind={smoothing}", "equalize.kind=none", "goal_sqnr_db=0"]
        result = qonnx.quantize(made, batches, tmp_path / "q.onnx", target="a800", settings=settings)
        kept[smoothing] = result.comparison.outputs[0].sqnr_db
        (grid,) = (tensor for tensor in result.plan.activations if tensor.value == "p")
        assert (grid.high < 1) == (smoothing == "auto")
        result.plan.save(tmp_path / "plan.json")
        again = qonnx.quantize(made, batches, tmp_path / "r.onnx", plan=QuantPlan.load(tmp_path / "plan.json"))
        assert again.comparison.outputs[0].sqnr_db == pytest.approx(kept[smoothing], abs=0.2)
    assert kept["auto"] > kept["none"] + 2


def test_a_calibrator_of_extremes_cuts_nothing_off() -> None:
    recipe = resolve(load_recipe("int8-minmax", ["equalize.kind=none"]), TARGET)
    assert not smoothed(model(), recipe, TARGET, data(4), data(2, seed=1)).probabilities


def flat(made: ir.Model) -> ir.Model:
    """With scores so close to each other that every key gets nearly the same probability."""
    root = made.graph.initializers["root"]
    root.const_value = ir.tensor(np.array(0.002, np.float32), name="root")
    return made


@pytest.mark.parametrize("corrected", [False, True])
def test_small_probabilities_get_a_grid_of_their_size(corrected: bool) -> None:
    """Over 300 keys, a step of 1/127 rounds all of them to 0."""
    made = flat(model())
    batches = data(2, length=300)
    grids = choose_grids(
        made, found(made), batches, batches[1:], Dtype.INT8, symmetric=True, biases_corrected=corrected
    )
    largest = max(p.max() for p, _ in operands(made, batches))
    assert 1 / 300 < grids.ranges["p"].high <= largest < 0.01


@pytest.mark.parametrize("calibrator", ["auto", "minmax"])
def test_attention_over_many_keys_is_quantized(calibrator: str, tmp_path: Path) -> None:
    """With values that hardly count in the output, nothing is chosen for them; still none of them round to 0."""
    settings = [f"activations.calibrator.kind={calibrator}", "smooth.kind=none", "equalize.kind=none"]
    result = qonnx.quantize(flat(model()), data(6, length=300), tmp_path / "q.onnx", settings=settings)
    assert not result.plan.float_layers
    (grid,) = (one for one in result.plan.activations if one.value == "p")
    assert 1 / 300 < 127 * float(grid.scale[0]) < 0.02
    assert result.comparison.outputs[0].sqnr_db > 30


def test_offsets_stay_among_the_values() -> None:
    """Where all probabilities round to 0, the sum of their errors is the same for all queries."""
    made = flat(model())
    batches = data(2, length=300)
    one = found(made)[0]
    looks = Looks(made, [one], batches[0])
    results = looks.at(batches)
    assert one.group is not None
    assert one.channels is not None
    offsets = _Probe(one, results, results, Dtype.INT8, True, True)._offsets(1.0, one.group, one.channels)
    assert np.abs(offsets).max() <= max(np.abs(result["v"]).max() for result in results)


def test_values_that_two_products_share_are_centred_by_the_one_that_reads_them(tmp_path: Path) -> None:
    text = (
        "g (float[1,256,32] x, float[32,32] wq, float[32,32] wk, float[32,32] wv, float[32] bv, float[32,32] wo) "
        "=> (float[1,256,32] y) { q = MatMul(x, wq) k = MatMul(x, wk) v0 = MatMul(x, wv) v = Add(v0, bv) "
        "q1, q2 = Split <axis = -1, num_outputs = 2> (q) k1, k2 = Split <axis = -1, num_outputs = 2> (k) "
        "v1, v2 = Split <axis = -1, num_outputs = 2> (v) k1t = Transpose <perm = [0,2,1]> (k1) "
        "k2t = Transpose <perm = [0,2,1]> (k2) s1 = MatMul(q1, k1t) p1 = Softmax(s1) c1 = MatMul(p1, v1) "
        "s2 = MatMul(q2, k2t) p2 = Softmax(s2) c2 = MatMul(p2, v2) c = Concat <axis = -1> (c1, c2) y = MatMul(c, wo) }"
    )
    model = model_of(text, weights="wq wk wv bv wo", scale=0.1)
    rng = np.random.default_rng(0)
    batches = [{"x": rng.standard_normal((1, 256, 32)).astype(np.float32)} for _ in range(8)]
    result = qonnx.quantize(model, batches, tmp_path / "quantized.onnx")
    assert result.comparison.outputs[0].sqnr_db > 20


def test_rows_that_lost_a_sink_let_no_offset_pass() -> None:
    """They sum to less than 1; where their grid ends is chosen all the same."""
    text = ATTENTION.replace("float root", "int64[1] zero = {0}, int64[1] one = {1}, int64[1] last = {-1}, float root")
    text = text.replace("float root", "int64[1] end = {1000}, float root", 1).replace(
        "p = Softmax<axis = -1>(s)",
        "r = Slice(s, zero, one, last) t = Concat<axis = -1>(r, s) u = Softmax<axis = -1>(t) "
        "p = Slice(u, one, end, last)",
    )
    (attention,) = found(model(text))
    assert (attention.probabilities, attention.group) == ("p", None)
