"""What to do, as a value: frozen, strict, the same in Python, YAML and on the command line."""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from qonnx.calibrators import Auto, Average, Calibrator, MinMax, Percentile
from qonnx.errors import RecipeError
from qonnx.explain import explain
from qonnx.numerics import Dtype, PerTensor
from qonnx.passes.equalize import AutoEqualization, Equalization, NoEqualization
from qonnx.passes.outlier_suppression import OutlierSuppression
from qonnx.passes.smooth_quant import SmoothQuant
from qonnx.roles import Role
from qonnx.smoothing import AutoSmoothing, NoSmoothing, Smoothing


class Format(enum.StrEnum):
    """How quantization is written into the graph, and with that when activations are measured."""

    QDQ = "qdq"
    """QuantizeLinear and DequantizeLinear around float operators: the runtime makes integer kernels of them."""

    QOPERATOR = "qoperator"
    """Integer operators such as QLinearConv, for ONNX Runtime."""

    DYNAMIC = "dynamic"
    """Activations by the range that they have at run time, one scale a tensor, for ONNX Runtime."""

    PER_TOKEN = "per_token"
    """Activations by the range that each row has at run time, for ONNX Runtime."""

    WEIGHT_ONLY = "weight_only"
    """Weights alone; the arithmetic stays in float."""

    @property
    def calibrated(self) -> bool:
        """Whether ranges of activations have to be measured before."""
        return self in (Format.QDQ, Format.QOPERATOR)


class Operators(enum.StrEnum):
    """Which operators may be written."""

    ONNX = "onnx"
    """Standard ones only, for any runtime."""

    MICROSOFT = "microsoft"
    """Also those of the domain com.microsoft, such as MatMulNBits and QGemm, which ONNX Runtime alone has."""


class PerChannel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="per_channel"):
    """One scale for each output channel of a weight, or each channel of an activation; the operator tells the axis."""


class PerBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="blocked"):
    """One scale for `block_size` neighbours along the axis of a weight that is summed over, fewer on a short axis."""

    block_size: int = 128

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise RecipeError(f"block_size {self.block_size} is not possible: give a size of 1 or more")


class Clip(enum.StrEnum):
    """Where the grid of a weight ends."""

    NONE = "none"
    """At the largest magnitude."""

    MSE = "mse"
    """Where the mean squared error of the group that shares a scale is least."""


class Rounding(enum.StrEnum):
    """How the code of each element of a weight is chosen."""

    NEAREST = "nearest"
    """The nearest one."""

    GPTQ = "gptq"
    """So that the result of the layer changes least, measured on data: see `qonnx.gptq`. Without data, the nearest."""


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How weights are quantized: signed types symmetrically, unsigned ones of weight-only formats with zero points."""

    dtype: Dtype = Dtype.INT8
    granularity: PerChannel | PerTensor | PerBlock = PerChannel()
    clip: Clip = Clip.NONE
    rounding: Rounding = Rounding.NEAREST


class Activations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How activations are quantized; `dtype` left out means the target's default type.

    Scales per channel or per block of channels are computed in float: see `qonnx.activation_scales`.
    """

    dtype: Dtype | msgspec.UnsetType = msgspec.UNSET
    granularity: PerTensor | PerChannel | PerBlock = PerTensor()
    calibrator: Calibrator | Auto = Auto()


class Match(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which nodes a rule is about: everything given must match. Patterns are globs (`encoder.layer.0.*`).

    Attributes:
        op: of the operator, such as `Conv`.
        path: of the module that made the node.
        name: of the node.
        value: of a value that the node reads or writes, such as the name of a weight.
        role: the part that the node plays.
    """

    op: str = "*"
    path: str = "*"
    name: str = "*"
    value: str = "*"
    role: Role | msgspec.UnsetType = msgspec.UNSET


class WeightChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a rule changes about weights."""

    dtype: Dtype | msgspec.UnsetType = msgspec.UNSET
    granularity: PerChannel | PerTensor | PerBlock | msgspec.UnsetType = msgspec.UNSET
    clip: Clip | msgspec.UnsetType = msgspec.UNSET
    rounding: Rounding | msgspec.UnsetType = msgspec.UNSET


class ActivationChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a rule changes about the activations that a node reads."""

    dtype: Dtype | msgspec.UnsetType = msgspec.UNSET
    calibrator: Calibrator | msgspec.UnsetType = msgspec.UNSET


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An exception for some nodes; of two rules that say something about the same node the later one wins.

    Attributes:
        match: the nodes.
        skip: whether they stay in float.
        weights: what is different about their weights.
        activations: what is different about their activations.
        optional: whether nothing is said when no node matches.
    """

    match: Match
    skip: bool | msgspec.UnsetType = msgspec.UNSET
    weights: WeightChange = WeightChange()
    activations: ActivationChange = ActivationChange()
    optional: bool = False


def changed(weights: Weights, change: WeightChange) -> Weights:
    """The weights of a recipe as a rule changes them."""
    given = {name: value for name in change.__struct_fields__ if (value := getattr(change, name)) is not msgspec.UNSET}
    return msgspec.structs.replace(weights, **given)


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a run depends on besides model, data and target.

    Attributes:
        name: for people and for the metadata of the file that is written.
        smooth: how activations are made flatter before they are observed, at no change of what the model computes.
            `auto` keeps what it finds only where that makes the outputs better, and what takes nodes at run time only
            where they may miss `goal_sqnr_db` without, and gain 1 dB.
        equalize: how channels are made equally wide, and tensors moved to the middle of their range, before that, in
            the same way.
        weights: how weights are quantized.
        activations: how activations are quantized.
        attention: whether the two products inside attention (queries by keys, probabilities by values) are quantized.
        product_outputs: whether the result of every quantized matrix product is quantized too, before its bias.
        residuals: whether what is added to the result of a quantized matrix product is quantized too.
        minimum_sqnr_db: a layer stays in float when one of its activations, rounded to its grid, would keep less
            than this signal-to-noise ratio.
        goal_sqnr_db: when an output of the quantized model keeps less than this, the layers that cost most are left in
            float, at most a quarter of all; 0 to never do that.
        correct_biases: whether biases take up the shift of the mean that rounding causes. It is measured on data; in
            format dynamic it never is.
        format: how quantization is written into the graph.
        operators: which operators may be written.
        rules: exceptions for single nodes.
    """

    name: str = "int8"
    smooth: Smoothing = AutoSmoothing()
    equalize: NoEqualization | Equalization | AutoEqualization = AutoEqualization()
    weights: Weights = Weights()
    activations: Activations = Activations()
    attention: bool = True
    product_outputs: bool = False
    residuals: bool = False
    minimum_sqnr_db: float = 10.0
    goal_sqnr_db: float = 16.0
    correct_biases: bool = True
    format: Format = Format.QDQ
    operators: Operators = Operators.ONNX
    rules: tuple[Rule, ...] = ()


_EIGHT = WeightChange(Dtype.INT8, PerChannel(), Clip.NONE, Rounding.NEAREST)
# What 4 bits hurt most and gain least: filters have few weights, and so has each word.
_IN_8_BITS = (
    Rule(Match(op="Conv*"), weights=_EIGHT, optional=True),
    Rule(Match(role=Role.EMBEDDING), weights=_EIGHT, optional=True),
    Rule(Match(role=Role.LM_HEAD), weights=_EIGHT, optional=True),
)

RECIPES: tuple[Recipe, ...] = (
    Recipe(name="int8"),
    Recipe(name="int8-minmax", activations=Activations(calibrator=MinMax())),
    Recipe(name="int8-average", activations=Activations(calibrator=Average())),
    Recipe(name="int8-smoothquant", smooth=SmoothQuant()),
    Recipe(name="int8-os+", smooth=OutlierSuppression()),
    Recipe(name="int8-unsmoothed", smooth=NoSmoothing(), equalize=NoEqualization()),
    Recipe(
        name="fp8",
        weights=Weights(Dtype.FLOAT8E4M3FN),
        activations=Activations(dtype=Dtype.FLOAT8E4M3FN),
    ),
    Recipe(
        name="bert-int8-mode1",
        smooth=NoSmoothing(),
        equalize=NoEqualization(),
        activations=Activations(calibrator=Percentile(99.999)),
        minimum_sqnr_db=-100.0,
        goal_sqnr_db=0.0,
    ),
    Recipe(
        name="bert-int8-mode2",
        smooth=NoSmoothing(),
        equalize=NoEqualization(),
        weights=Weights(granularity=PerTensor()),
        activations=Activations(calibrator=Percentile(99.999)),
        product_outputs=True,
        residuals=True,
        minimum_sqnr_db=-100.0,
        goal_sqnr_db=0.0,
    ),
    Recipe(name="int8-qoperator", format=Format.QOPERATOR),
    Recipe(name="int8-dynamic", format=Format.DYNAMIC, attention=False),
    Recipe(name="int8-per-token", format=Format.PER_TOKEN, attention=False),
    Recipe(name="w8", format=Format.WEIGHT_ONLY),
    *(
        Recipe(name=name, format=Format.WEIGHT_ONLY, weights=weights, operators=operators, rules=_IN_8_BITS)
        for name, weights, operators in (
            ("w4", Weights(Dtype.INT4, PerBlock(128), Clip.MSE, Rounding.GPTQ), Operators.ONNX),
            ("w4-block32", Weights(Dtype.INT4, PerBlock(32), Clip.MSE, Rounding.GPTQ), Operators.ONNX),
            ("w4-nbits", Weights(Dtype.INT4, PerBlock(32), Clip.MSE, Rounding.GPTQ), Operators.MICROSOFT),
        )
    ),
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
        raise RecipeError(f"recipe {where}: {explain(error, Recipe)}") from error


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
