"""Recipes: strict in, readable out."""

import re
from pathlib import Path

import pytest

from qonnx.calibrators import MinMax
from qonnx.errors import RecipeError, TargetError
from qonnx.numerics import Dtype, PerTensor
from qonnx.recipe import RECIPES, Format, Operators, Recipe, Rule, load_recipe, to_yaml
from qonnx.resolve import resolve
from qonnx.targets import TARGETS, target


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_built_in_recipes_survive_yaml(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe))
    assert load_recipe(file) == recipe


def test_a_file_may_leave_out_everything_that_has_a_default(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nrules:\n  - match: {op: Conv, path: 'stem.*'}\n    skip: true\n")
    recipe = load_recipe(file)
    assert recipe.name == "mine"
    assert isinstance(recipe.rules[0], Rule)
    assert recipe.rules[0].skip


def test_settings_change_single_values() -> None:
    recipe = load_recipe("int8", ["weights.granularity.kind=per_tensor", "activations.calibrator.kind=minmax"])
    assert recipe.weights.granularity == PerTensor()
    assert recipe.activations.calibrator == MinMax()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nam: x", "unknown key `nam`"),
        ("weights: {dtyp: int8}", "unknown key `dtyp` in weights"),
        ("weights: {dtype: int9}", "weights.dtype"),
        ("weights: {granularity: {kind: per_row}}", "per_row"),
        ("activations: {calibrator: {kind: minmax, bins: 3}}", "bins"),
        ("minimum_sqnr_db: much", "minimum_sqnr_db"),
        ("rules: [{skip: true}]", "match"),
        ("- a", "expected keys and values"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_the_place(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


BLOCKED = "weights.granularity={kind: blocked"
CALIBRATORS = "minmax, average, ema, percentile, entropy, mse"
DTYPES = ", ".join(Dtype)


@pytest.mark.parametrize(
    ("setting", "end"),
    [
        ("smooth.kind=smooth_quant", "in smooth.kind: choose one of none, smoothquant, outlier_suppression, auto"),
        ("smooth=none", "in smooth: give kind, one of none, smoothquant, outlier_suppression, auto"),
        ("smooth={}", "`kind` in smooth: give kind, one of none, smoothquant, outlier_suppression, auto"),
        ("equalize.kind=x", "in equalize.kind: choose one of none, always, auto"),
        ("weights.dtype=int9", f"in weights.dtype: choose one of {DTYPES}"),
        ("weights.clip=x", "in weights.clip: choose one of none, mse"),
        ("weights.granularity.kind=x", "choose one of per_channel, per_tensor, blocked"),
        ("activations.dtype=int9", f"in activations.dtype: choose one of {DTYPES}"),
        ("activations.granularity.kind=x", "choose one of per_tensor, per_channel, blocked"),
        ("activations.calibrator.kind=x", f"choose one of {CALIBRATORS}, auto"),
        (
            "activations.calibrator.candidates=[{kind: ema}]",
            "candidates[0].kind: choose one of minmax, average, percentile, entropy, mse",
        ),
        ("format=x", "in format: choose one of qdq, qoperator, dynamic, per_token, weight_only"),
        ("operators=x", "in operators: choose one of onnx, microsoft"),
        ("rules=[{match: {role: x}}]", "role: choose one of first, last, attention, mlp, lm_head, embedding"),
        ("rules=[{match: {}, weights: {clip: x}}]", "in rules[0].weights.clip: choose one of none, mse"),
        ("rules=[{match: {}, activations: {calibrator: {kind: x}}}]", f"choose one of {CALIBRATORS}"),
        (BLOCKED + ", block_size: x}", "Expected `int`, got `str` in weights.granularity.block_size"),
        (BLOCKED + ", size: 3}", "unknown key `size` in weights.granularity: choose one of kind, block_size"),
        ("weights.dtyp=int8", "unknown key `dtyp` in weights: choose one of dtype, granularity, clip, rounding"),
        ("activations.calibrator.percentile=99", "`percentile` in activations.calibrator: only kind percentile has it"),
    ],
)
def test_a_wrong_choice_names_the_right_ones(setting: str, end: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("int8", [setting])
    assert str(error.value).endswith(end)
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="int8-minmax"):
        load_recipe("int9")


@pytest.mark.parametrize("setting", ["weights", "=1", "name.x=1"])
def test_a_wrong_setting_is_refused(setting: str) -> None:
    with pytest.raises(RecipeError, match="setting"):
        load_recipe("int8", [setting])


def test_the_target_fills_in_the_activation_type() -> None:
    assert resolve(Recipe(), target("a800")).activations.dtype is Dtype.INT8
    assert resolve(Recipe(), target("ort-cpu")).activations.dtype is Dtype.UINT8


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_built_in_recipes_say_nothing_that_their_format_passes_over(recipe: Recipe) -> None:
    fitting = []
    for each in TARGETS:
        try:
            resolve(recipe, each)
        except TargetError:  # a RecipeError is let through
            continue
        fitting.append(each.name)
    everywhere = {each.name for each in TARGETS}
    expected = {
        Format.QDQ: everywhere,
        Format.WEIGHT_ONLY: everywhere,
        Format.QOPERATOR: {"ort-cpu"},
        Format.DYNAMIC: {"ort-cpu"},
        Format.PER_TOKEN: {"ort-cpu"},
    }[recipe.format]
    if recipe.operators is Operators.MICROSOFT:
        expected = {"ort-cpu"}
    without = {"fp8": {"a800", "a100", "t4", "rtx3090", "orin", "ort-cpu"}}
    without |= {name: {"t4"} for name in ("w8", "w4", "w4-block32")}
    assert set(fitting) == expected - without.get(recipe.name, set())


FIXED = ["format=dynamic", "format=per_token", "format=weight_only"]
RULE = "rules=[{match: {}, activations: {calibrator: {kind: minmax}}}]"
RULE_TYPE = "rules=[{match: {}, skip: true}, {match: {}, activations: {dtype: int8}}]"


@pytest.mark.parametrize(
    ("formats", "setting", "key"),
    [
        (["format=qdq", *FIXED[:2]], "operators=microsoft", "operators"),
        (FIXED, "product_outputs=true", "product_outputs"),
        (FIXED, "residuals=true", "residuals"),
        (FIXED, "minimum_sqnr_db=20", "minimum_sqnr_db"),
        (FIXED, "activations.calibrator.kind=minmax", "activations.calibrator"),
        (FIXED, RULE, "activations.calibrator of rule 1"),
        (FIXED[2:], "activations.dtype=int8", "activations.dtype"),
        (FIXED[2:], "activations.granularity.kind=per_channel", "activations.granularity"),
        (FIXED[2:], "attention=false", "attention"),
        (FIXED[2:], RULE_TYPE, "activations.dtype of rule 2"),
    ],
)
def test_what_a_format_would_pass_over_in_silence_is_refused(formats: list[str], setting: str, key: str) -> None:
    for chosen in formats:
        kind = chosen.removeprefix("format=")
        words = f"{re.escape(key)} means nothing in format {kind}: leave it out, or use .*format"
        with pytest.raises(RecipeError, match=words):
            resolve(load_recipe("int8", [chosen, setting]), target("ort-cpu"))


def test_what_a_format_makes_anyway_may_be_said() -> None:
    for name, kind in (("int8-dynamic", "uint8"), ("int8-per-token", "int8")):
        rule = f"rules=[{{match: {{}}, activations: {{dtype: {kind}}}}}]"
        chosen = resolve(load_recipe(name, [f"activations.dtype={kind}", rule]), target("ort-cpu"))
        assert resolve(chosen, target("ort-cpu")) == chosen
    for name in ("int8", "int8-qoperator", "w8", "w4-nbits"):
        chosen = resolve(load_recipe(name), target("ort-cpu"))
        assert resolve(chosen, target("ort-cpu")) == chosen


def test_what_a_target_cannot_run_is_refused_with_the_alternative() -> None:
    with pytest.raises(TargetError, match="uint8 do not run on a800; use int8"):
        resolve(load_recipe("int8", ["activations.dtype=uint8"]), target("a800"))


def test_an_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(TargetError, match="a800"):
        target("b200")
