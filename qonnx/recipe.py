"""What to do, as a value: frozen, strict, the same in Python, YAML and on the command line."""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from qonnx.calibrators import Auto, Average, Calibrator, MinMax
from qonnx.errors import RecipeError
from qonnx.numerics import Dtype, PerTensor
from qonnx.targets import Target, check_types


class Format(enum.StrEnum):
    """How quantization is written into the graph."""

    QDQ = "qdq"


class PerChannel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="per_channel"):
    """One scale for each output channel of a weight; which axis that is depends on the operator."""


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How weights are quantized: symmetric, the scale from the largest absolute value."""

    dtype: Dtype = Dtype.INT8
    granularity: PerChannel | PerTensor = PerChannel()


class Activations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How activations are quantized; `dtype` left out means the target's default type."""

    dtype: Dtype | msgspec.UnsetType = msgspec.UNSET
    granularity: PerTensor = PerTensor()
    calibrator: Calibrator | Auto = Auto()


class Match(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which nodes a rule is about: every pattern given must match. Patterns are globs (`encoder.layer.0.*`)."""

    op: str = "*"
    path: str = "*"
    name: str = "*"


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An exception for some nodes; of two rules about the same node the later one wins."""

    match: Match
    skip: bool


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a run depends on besides model, data and target.

    Attributes:
        name: for people and for the metadata of the file that is written.
        weights: how weights are quantized.
        activations: how activations are quantized.
        attention: whether the two products inside attention (queries by keys, probabilities by values) are quantized.
        minimum_sqnr_db: a layer stays in float when one of its activations, rounded to its grid, would keep less
            than this signal-to-noise ratio.
        goal_sqnr_db: when an output of the quantized model keeps less than this, the layers that cost most are left in
            float, at most a quarter of all; 0 to never do that.
        correct_biases: whether biases take up the shift of the mean that rounding causes.
        format: how quantization is written into the graph.
        rules: exceptions for single nodes.
    """

    name: str = "int8"
    weights: Weights = Weights()
    activations: Activations = Activations()
    attention: bool = True
    minimum_sqnr_db: float = 10.0
    goal_sqnr_db: float = 16.0
    correct_biases: bool = True
    format: Format = Format.QDQ
    rules: tuple[Rule, ...] = ()


RECIPES: tuple[Recipe, ...] = (
    Recipe(name="int8"),
    Recipe(name="int8-minmax", activations=Activations(calibrator=MinMax())),
    Recipe(name="int8-average", activations=Activations(calibrator=Average())),
)


def load_recipe(name_or_file: str | os.PathLike[str], settings: Sequence[str] = ()) -> Recipe:
    """A built-in recipe by name, or one from a YAML file, with `key.key=value` settings applied on top.

    Example:
        >>> load_recipe("int8", ["activations.calibrator.kind=minmax"]).activations.calibrator
        MinMax()

    Raises:
        RecipeError: the recipe is unknown, is not valid YAML, or has an unknown key or a value of the wrong type.
    """
    where = str(name_or_file)
    document = _document(where)
    for setting in settings:
        _apply(document, setting)
    try:
        return msgspec.convert(document, Recipe)
    except msgspec.ValidationError as error:
        raise RecipeError(f"recipe {where}: {_explain(error)}") from error


def resolve(recipe: Recipe, target: Target) -> Recipe:
    """Fills in what the recipe leaves to the target.

    Raises:
        TargetError: the target cannot run what the recipe asks for.
    """
    dtype = recipe.activations.dtype
    if dtype is msgspec.UNSET:
        dtype = target.activations[0]
    check_types(target, dtype, recipe.weights.dtype)
    return msgspec.structs.replace(recipe, activations=msgspec.structs.replace(recipe.activations, dtype=dtype))


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back."""
    import yaml

    return str(yaml.safe_dump(msgspec.to_builtins(recipe), sort_keys=False))


def _document(where: str) -> dict[str, Any]:
    for recipe in RECIPES:
        if recipe.name == where:
            return dict(msgspec.to_builtins(recipe))
    path = Path(where)
    if not path.is_file():
        names = ", ".join(recipe.name for recipe in RECIPES)
        raise RecipeError(f"unknown recipe {where!r}: neither a file nor one of {names}")
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"recipe {where}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(document, dict):
        raise RecipeError(f"recipe {where}: expected keys and values, such as `name: int8`")
    return document


def _apply(document: dict[str, Any], setting: str) -> None:
    import yaml

    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise RecipeError(f"setting {setting!r}: expected KEY=VALUE, such as weights.granularity.kind=per_tensor")
    *parents, last = key.split(".")
    for parent in parents:
        document = document.setdefault(parent, {})
        if not isinstance(document, dict):
            raise RecipeError(f"setting {setting!r}: {parent} holds a value, not keys")
    if last == "kind":
        document.clear()  # another kind has parameters of its own
    try:
        document[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"setting {setting!r}: the value is not readable as YAML") from error


def _explain(error: msgspec.ValidationError) -> str:
    """`Object contains unknown field `x` - at `$.weights`` in the words of someone who writes YAML."""
    text = str(error).replace("Object contains unknown field", "unknown key").replace("Object missing", "missing")
    message, _, place = text.partition(" - at ")
    place = place.strip("`").removeprefix("$").removeprefix(".")
    return f"{message} in {place}" if place else message
