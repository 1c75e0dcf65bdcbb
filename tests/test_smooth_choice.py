"""Smoothing inside the one call: kept where it pays, said where it cannot, repeated from a plan."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

import qonnx
from qonnx import smooth_choice
from qonnx.errors import RecipeError
from qonnx.groups import find_groups
from qonnx.passes.prepare import prepare
from qonnx.plan import QuantPlan, SmoothPlan
from qonnx.recipe import Recipe, load_recipe
from qonnx.resolve import resolve
from qonnx.runtime import session
from qonnx.smooth_choice import Smoothed, smoothed
from qonnx.smooth_plan import apply
from qonnx.statistics import Statistics
from qonnx.tables import result_tables
from qonnx.targets import target
from qonnx.trial import trial_plan
from tests.graphs import model_of
from tests.helpers import assert_same_function

Batches = list[dict[str, npt.NDArray[np.float32]]]

PRE_NORM = (
    "g (float[n,32] x, float[32] g, float[32] b, float[32,64] w1, float[64] b1, float[64,32] w2) => (float[n,32] y)"
    "{ [norm] s = LayerNormalization(x, g, b) [up] m = MatMul(s, w1) a = Add(m, b1) e = Gelu(a)"
    "  [down] d = MatMul(e, w2) y = Add(d, x) }"
)
POST_NORM = PRE_NORM.replace("Add(d, x)", "Add(d, s)")
# A goal that the post-norm block reaches with smoothing only, for which it takes nodes.
MISSED = "goal_sqnr_db=37"


def model(text: str = PRE_NORM, outliers: float = 30.0) -> ir.Model:
    """A block whose norm makes two channels that stick out."""
    made = model_of(text, weights="g b w1 b1 w2", scale=0.2, opset=21)
    for name, channels in (("g", {1: outliers}), ("b", {3: outliers})):
        stored = made.graph.initializers[name]
        array = np.full(32, 1.0 if name == "g" else 0.0, np.float32)
        for channel, value in channels.items():
            array[channel] = value
        stored.const_value = ir.tensor(array, name=name)
    return made


def data(count: int = 10, seed: int = 0, rows: int = 256) -> Batches:
    rng = np.random.default_rng(seed)
    return [{"x": rng.uniform(-1, 1, (rows, 32)).astype(np.float32)} for _ in range(count)]


def run(
    recipe: str, settings: tuple[str, ...] = (), text: str = PRE_NORM, outliers: float = 30.0, consumer: str = "a800"
) -> Smoothed:
    prepared = model(text, outliers)
    prepare(prepared)
    chosen = resolve(load_recipe(recipe, ("equalize.kind=none", *settings)), target(consumer))
    return smoothed(prepared, chosen, target(consumer), data(4), data(1, seed=1))


@pytest.mark.parametrize("recipe", ["int8", "int8-smoothquant", "int8-os+"])
@pytest.mark.parametrize("text", [PRE_NORM, POST_NORM], ids=["pre-norm", "post-norm"])
def test_outputs_keep_more_with_all_layers_on_integers(recipe: str, text: str, tmp_path: Path) -> None:
    settings = [MISSED if recipe == "int8" else "goal_sqnr_db=0", "minimum_sqnr_db=-100"]
    bare = ["goal_sqnr_db=0", "minimum_sqnr_db=-100"]
    plain = qonnx.quantize(model(text), data(), tmp_path / "plain.onnx", recipe="int8-unsmoothed", settings=bare)
    result = qonnx.quantize(model(text), data(), tmp_path / "smoothed.onnx", recipe=recipe, settings=settings)
    assert plain.smoothing == ()
    assert plain.plan.smoothing == ()
    assert not result.plan.float_layers
    assert result.comparison.outputs[0].sqnr_db > plain.comparison.outputs[0].sqnr_db + 5
    (norm,) = [report for report in result.smoothing if report.value == "s" and report.method]
    assert norm.producer == "LayerNormalization 'norm'"
    assert norm.consumers == ("up",)
    assert norm.method
    assert norm.crest is not None
    assert norm.smoothed_crest is not None
    assert norm.smoothed_crest < norm.crest


@pytest.mark.parametrize("text", [PRE_NORM, POST_NORM], ids=["pre-norm", "post-norm"])
def test_a_plan_that_is_fed_back_smooths_the_same_way(text: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one.onnx", tmp_path / "two.onnx"
    result = qonnx.quantize(model(text), data(), one, settings=[MISSED])
    assert result.plan.smoothing
    assert QuantPlan.load(_saved(result.plan, tmp_path)) == result.plan
    qonnx.quantize(model(text), data(), two, plan=tmp_path / "plan.json", settings=[MISSED])
    assert one.read_bytes() == two.read_bytes()


def _saved(plan: QuantPlan, folder: Path) -> Path:
    plan.save(folder / "plan.json")
    return folder / "plan.json"


def test_a_plan_for_another_model_is_refused() -> None:
    prepared = model()
    prepare(prepared)
    with pytest.raises(RecipeError, match="the plan smooths 'elsewhere', which this model lacks"):
        apply(prepared, [SmoothPlan("elsewhere", "by hand", (1.0,))])


def test_the_model_computes_what_it_did_and_is_left_alone() -> None:
    prepared = model(POST_NORM)
    prepare(prepared)
    before = ir.to_onnx_text(prepared)
    result = run("int8", text=POST_NORM)
    assert_same_function(prepared, result.model, data(1)[0], rtol=2e-5)
    assert_same_function(prepared, apply(prepared, result.plans), data(1)[0], rtol=2e-5)
    assert ir.to_onnx_text(prepared) == before


def test_auto_does_not_keep_what_the_outputs_do_not_gain_by() -> None:
    text = "g (float[n,32] x, float[32] g, float[32] b, float[32,64] w1) => (float[n,64] y)"
    text += "{ s = LayerNormalization(x, g, b) y = MatMul(s, w1) }"
    prepared = model_of(text, weights="w1 b g", scale=0.2)
    for name, value in (("g", 1.0), ("b", 0.0)):
        prepared.graph.initializers[name].const_value = ir.tensor(np.full(32, value, np.float32), name=name)
    rng = np.random.default_rng(0)
    signs = [{"x": rng.choice([-1.0, 1.0], (256, 32)).astype(np.float32)} for _ in range(5)]
    prepare(prepared)
    result = smoothed(prepared, resolve(Recipe(), target("a800")), target("a800"), signs[:4], signs[4:])
    assert result.model is prepared
    assert result.plans == ()
    assert not any(report.method for report in result.reports)
    assert all(report.reason for report in result.reports)
    assert [note.split(":")[0] for note in result.notes] == ["not equalized", "not smoothed without nodes at run time"]
    assert result.warning == ""


def test_no_gain_without_nodes_is_not_told_as_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm takes factors for the first product for free; for the second, which reads the input, a node would."""
    text = "g (float[n,32] x, float[32] g, float[32] b, float[32,64] w1, float[32,64] w2) => (float[n,64] y, "
    text += "float[n,64] z) { s = LayerNormalization(x, g, b) y = MatMul(s, w1) z = MatMul(x, w2) }"
    monkeypatch.setattr(smooth_choice, "_find", lambda *_: smooth_choice._Found((), (), Statistics({}), 99))
    notes = run("int8", text=text).notes
    assert "not smoothed without nodes at run time: no group of channels gains by it" in notes
    assert "would take nodes" in notes[-1]


def test_no_nodes_at_run_time_where_the_recipe_forbids_them() -> None:
    result = run("int8", ("smooth.nodes=false",), POST_NORM)
    assert [node.op_type for node in result.model.graph] == [node.op_type for node in _prepared(POST_NORM).graph]
    assert "adds something else to it" in result.reports[0].reason


def _prepared(text: str) -> ir.Model:
    made = model(text)
    prepare(made)
    return made


def test_nodes_at_run_time_only_where_the_goal_is_missed_without_them() -> None:
    unchanged = [node.op_type for node in _prepared(POST_NORM).graph]
    reached, missed = (run("int8", (goal,), POST_NORM) for goal in ("goal_sqnr_db=16", MISSED))
    assert [node.op_type for node in reached.model.graph] == unchanged
    assert not any(report.nodes for report in reached.reports)
    assert any(report.nodes for report in missed.reports)
    assert len(missed.model.graph) > len(unchanged)
    assert any("nodes at run time: the outputs keep" in note for note in missed.notes)
    assert "would take nodes at run time to be smoothed: not tried" in reached.notes[-1]
    assert "below 19 dB" in reached.notes[-1]
    assert not any("not tried" in note for note in missed.notes)
    assert missed.keeps_db is not None
    assert reached.keeps_db is not None
    assert missed.keeps_db >= reached.keeps_db + 1


@pytest.mark.parametrize(("beyond", "tried"), [(2.0, True), (4.0, False)])
def test_nodes_are_tried_where_a_trial_only_just_reaches_the_goal(beyond: float, tried: bool) -> None:
    without = run("int8", ("goal_sqnr_db=16",), POST_NORM).keeps_db
    assert without is not None
    result = run("int8", (f"goal_sqnr_db={without - beyond}",), POST_NORM)
    assert any(report.nodes for report in result.reports) == tried


def test_what_is_free_is_done_whatever_the_goal() -> None:
    for goal in ("goal_sqnr_db=0", "goal_sqnr_db=99"):
        result = run("int8", (goal,))
        assert [report.nodes for report in result.reports if report.value == "s" and report.method] == [0]


def test_nodes_must_gain_a_decibel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qonnx.smooth_choice._WORTH_NODES_DB", 100.0)
    result = run("int8", (MISSED,), POST_NORM)
    assert result.plans == ()
    assert result.notes[-1].startswith("not smoothed with ")
    assert result.notes[-1].endswith(" dB more, and 100 are what nodes must gain")


@pytest.mark.parametrize(("consumer", "kept"), [("a800", True), ("ort-cpu", False)])
def test_nodes_must_gain_more_where_convolutions_hand_each_other_integers(
    consumer: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qonnx.smooth_choice._WORTH_NODES_BETWEEN_INTEGERS_DB", 100.0)
    result = run("int8", ("goal_sqnr_db=99",), POST_NORM, consumer=consumer)
    assert any(report.nodes for report in result.reports) == kept
    assert any(note.startswith("smoothed") and "nodes at run time" in note for note in result.notes) == kept
    assert any(note.startswith("not smoothed with ") for note in result.notes) != kept


@pytest.mark.parametrize("rows", [1, 8])
def test_few_samples_must_tell_of_a_clearer_gain(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qonnx.smooth_choice._WORTH_IT_ON_FEW_DB", 100.0)
    chosen = resolve(load_recipe("int8", ("equalize.kind=none",)), target("a800"))
    result = smoothed(_prepared(PRE_NORM), chosen, target("a800"), data(4), data(1, seed=1, rows=rows))
    assert bool(result.plans) == (rows == 8)


@pytest.mark.parametrize("recipe", ["int8-os+", "int8-smoothquant"])
def test_who_asks_for_smoothing_gets_it_on_few_rows_and_is_told(recipe: str) -> None:
    chosen = resolve(load_recipe(recipe, ("equalize.kind=none",)), target("a800"))
    few, enough = (
        smoothed(_prepared(PRE_NORM), chosen, target("a800"), data(4, rows=rows), data(1)) for rows in (16, 128)
    )
    assert few.plans
    assert few.warning == "smoothed by 64 rows (tokens, pixels) only, as the recipe says: give data with 512 or more"
    assert enough.plans
    assert enough.warning == ""


def test_what_equalization_puts_in_is_no_group_of_smoothing() -> None:
    settings = ("goal_sqnr_db=0", "equalize.kind=always", "smooth.kind=auto")
    result = run("int8", settings, PRE_NORM, outliers=1.0)
    assert "Sub" in [node.op_type for node in result.model.graph]
    groups = {group.value for group in find_groups(_prepared(PRE_NORM), explicit=True)}
    assert {report.value for report in result.reports} <= groups


def test_nothing_to_smooth_is_a_warning_for_who_asked_for_it() -> None:
    for recipe, asked in (("int8", False), ("int8-smoothquant", True)):
        result = run(recipe, ("smooth.nodes=false", "rules=[{match: {name: up}, skip: true}]"))
        said = result.warning if asked else result.notes[0]
        assert said.startswith("nothing can be smoothed: ")
        assert "Gelu" in said
        assert bool(result.warning) == asked


def test_a_second_reader_that_stands_in_the_way_is_named() -> None:
    text = POST_NORM.replace("y = Add(d, s)", "[residual] y = Add(d, s)")
    result = run("int8-smoothquant", ("smooth.nodes=false",), text)
    assert result.warning == "nothing can be smoothed: Add 'residual' adds something else to it"
    assert [report.reason for report in result.reports if report.value == "s"] == [
        "Add 'residual' adds something else to it"
    ]


def test_layers_that_stay_in_float_do_not_count() -> None:
    result = run("int8", ("rules=[{match: {name: up}, skip: true}]",))
    assert [report.consumers for report in result.reports] == [("down",)]


def test_statistics_are_those_of_the_model_without_smoothing(tmp_path: Path) -> None:
    statistics = qonnx.calibrate(model(), data())
    with pytest.raises(RecipeError, match="leave out the statistics, or set smooth"):
        qonnx.quantize(model(), data(), tmp_path / "q.onnx", recipe="int8-os+", statistics=statistics)
    assert not (tmp_path / "q.onnx").exists()
    result = qonnx.quantize(model(), data(), tmp_path / "q.onnx", statistics=statistics)
    assert result.plan.smoothing == ()
    assert "not smoothed: statistics of the model without smoothing were given" in result.notes
    plain = qonnx.quantize(
        model(), data(), tmp_path / "p.onnx", statistics=statistics, settings=["smooth.kind=none", "equalize.kind=none"]
    )
    assert plain.plan == result.plan


ATTENTION = (
    "g (float[n,16,32] x, float[32,32] q, float[32,32] k, float[32,32] v, float[32,32] o) => (float[n,16,32] y) "
    "{ [q] a = MatMul(x, q) [k] b = MatMul(x, k) [v] c = MatMul(x, v) t = Transpose <perm = [0, 2, 1]> (b) "
    "  [scores] s = MatMul(a, t) p = Softmax(s) [mix] m = MatMul(p, c) [o] y = MatMul(m, o) }"
)


def test_trials_quantize_what_will_be_quantized() -> None:
    prepared = model_of(ATTENTION, weights="q k v o", scale=0.2)
    prepare(prepared)
    rng = np.random.default_rng(0)
    sample = [{"x": rng.standard_normal((8, 16, 32)).astype(np.float32)} for _ in range(2)]
    chosen = resolve(Recipe(minimum_sqnr_db=99), target("a800"))
    plan = trial_plan(prepared, chosen, target("a800"), sample)
    assert [layer.node for layer in plan.quantized_layers] == ["q", "k", "v", "scores", "mix", "o"]


def test_the_report_tells_every_group(tmp_path: Path) -> None:
    rules = ["rules=[{match: {name: down}, skip: true}]"]
    result = qonnx.quantize(model(POST_NORM), data(), tmp_path / "q.onnx", settings=[MISSED])
    lines = [str(line) for line in result_tables(result)]
    start = lines.index(next(line for line in lines if line.startswith("channels scaled or shifted: 2 of ")))
    assert lines[start + 1].split() == ["crest", "SQNR", "dB", "weights"]
    assert any(" s, Outlier Suppression+" in line or " s, SmoothQuant" in line for line in lines[start + 2 : start + 4])
    settings = [*rules, "smooth.nodes=false"]
    result = qonnx.quantize(model(POST_NORM), data(), tmp_path / "q.onnx", settings=settings)
    assert not any(line.startswith("channels scaled") for line in map(str, result_tables(result)))
    assert result.smoothing[0].reason.startswith("Add ")


def test_data_that_can_be_read_once_are_enough(tmp_path: Path) -> None:
    given = qonnx.quantize(model(), data(), tmp_path / "list.onnx")
    once = qonnx.quantize(model(), iter(data()), tmp_path / "once.onnx")
    assert given.plan == once.plan
    single = qonnx.quantize(model(), data(1, rows=1024), tmp_path / "single.onnx")
    assert single.plan.smoothing
    assert session(tmp_path / "single.onnx").run(data(1)[0])["y"].shape == (256, 32)


GATED = (
    "g (float[n,16] x, float[16,512] w1, float[16,512] w2, float[512,16] w3) => (float[n,16] y)"
    "{ [gate] a = MatMul(x, w1) s = Sigmoid(a) t = Mul(a, s) [up] u = MatMul(x, w2)"
    "  h = Mul(t, u) [down] y = MatMul(h, w3) }"
)


def massive() -> tuple[ir.Model, Batches]:
    """A gated MLP in which one token of 64 has two channels a thousand times wider than all others."""
    made = model_of(GATED, weights="w1 w2 w3", scale=0.5, opset=21)
    for name, factor in (("w1", 4.0), ("w2", 400.0)):
        stored = made.graph.initializers[name]
        assert stored.const_value is not None
        array = stored.const_value.numpy().copy()
        array[0] = 0
        array[0, [7, 300]] = factor
        stored.const_value = ir.tensor(array, name=name)
    rng = np.random.default_rng(0)
    batches = [{"x": rng.standard_normal((256, 16)).astype(np.float32)} for _ in range(10)]
    for batch in batches:
        batch["x"][:, 0] = np.arange(256) % 64 == 0
    return made, batches


def test_channels_that_stick_out_too_far_are_repeated(tmp_path: Path) -> None:
    made, batches = massive()
    settings = ["goal_sqnr_db=0", "minimum_sqnr_db=-100", "activations.calibrator.kind=minmax"]
    result = qonnx.quantize(made, batches, tmp_path / "one.onnx", settings=settings)
    (plan,) = [plan for plan in result.plan.smoothing if plan.copies]
    assert len(plan.copies) == 512
    assert sum(plan.copies) == len(plan.scale) == 528
    assert np.argsort(plan.copies)[-2:].tolist() in ([7, 300], [300, 7])
    assert any("repeated 16 channels of 1 layers" in note for note in result.notes)
    once = qonnx.quantize(made, batches, tmp_path / "q.onnx", settings=[*settings, "smooth.kind=outlier_suppression"])
    plain = qonnx.quantize(made, batches, tmp_path / "q.onnx", settings=[*settings, "smooth.kind=none"])
    reference = session(made).run(batches[0])["y"]
    quiet = np.arange(256) % 64 != 0

    def keeps(path: Path) -> float:
        noise = session(path).run(batches[0])["y"] - reference
        return float(10 * np.log10(np.square(reference[quiet]).sum() / np.square(noise[quiet]).sum()))

    qonnx.quantize(made, batches, tmp_path / "once.onnx", plan=once.plan)
    qonnx.quantize(made, batches, tmp_path / "plain.onnx", plan=plain.plan)
    assert keeps(tmp_path / "one.onnx") > keeps(tmp_path / "once.onnx") + 2 > keeps(tmp_path / "plain.onnx") + 10

    assert QuantPlan.load(_saved(result.plan, tmp_path)) == result.plan
    qonnx.quantize(made, batches, tmp_path / "two.onnx", plan=tmp_path / "plan.json", settings=settings)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
