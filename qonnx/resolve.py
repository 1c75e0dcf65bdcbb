"""A recipe for one target: what it leaves open is filled in, and what cannot be followed or run is refused."""

from __future__ import annotations

import msgspec

from qonnx.calibrators import Auto, Calibrator, MinMax
from qonnx.errors import RecipeError, TargetError
from qonnx.numerics import Dtype, PerTensor
from qonnx.recipe import Format, Operators, PerBlock, Recipe, Rule, changed
from qonnx.targets import Target, check_types


def resolve(recipe: Recipe, target: Target) -> Recipe:
    """Fills in what the recipe leaves to the target.

    Raises:
        RecipeError: the recipe says something that its format cannot follow.
        TargetError: the target cannot run what the recipe asks for.
    """
    _check_followed(recipe)
    dtype = _activation_dtype(recipe, target)
    resolved = msgspec.structs.replace(recipe, activations=msgspec.structs.replace(recipe.activations, dtype=dtype))
    _check(resolved, target)
    for number, rule in enumerate(recipe.rules, start=1):
        try:
            _check(_as_ruled(resolved, rule), target)
        except TargetError as error:
            raise TargetError(f"rule {number}: {error}") from error
    return resolved


def _as_ruled(recipe: Recipe, rule: Rule) -> Recipe:
    """The recipe as if the rule were about all nodes."""
    dtype = recipe.activations.dtype if rule.activations.dtype is msgspec.UNSET else rule.activations.dtype
    activations = msgspec.structs.replace(recipe.activations, dtype=dtype)
    return msgspec.structs.replace(recipe, weights=changed(recipe.weights, rule.weights), activations=activations)


def _check(recipe: Recipe, target: Target) -> None:
    dtype = recipe.activations.dtype
    _check_format(recipe, target)
    check_types(target, None if dtype is msgspec.UNSET else dtype, recipe.weights.dtype)


def _check_followed(recipe: Recipe) -> None:
    """Refuses what is said and would be passed over in silence by the format.

    Raises:
        RecipeError: with the key and the formats that follow it.
    """
    usual, kind = Recipe(), recipe.format
    if kind in (Format.QDQ, Format.DYNAMIC, Format.PER_TOKEN) and recipe.operators is not usual.operators:
        raise _not_followed("operators", kind, "format qoperator or weight_only")
    if kind.calibrated:
        return
    for key in ("product_outputs", "residuals", "minimum_sqnr_db"):
        if getattr(recipe, key) != getattr(usual, key):
            raise _not_followed(key, kind, "format qdq or qoperator")
    if recipe.activations.calibrator != usual.activations.calibrator:
        raise _not_followed("activations.calibrator", kind, "format qdq or qoperator")
    for number, rule in enumerate(recipe.rules, start=1):
        for key in rule.activations.__struct_fields__:
            fixed = key == "dtype" and kind is not Format.WEIGHT_ONLY  # `_check_format` compares it with that type
            if not fixed and getattr(rule.activations, key) is not msgspec.UNSET:
                raise _not_followed(f"activations.{key} of rule {number}", kind, "format qdq or qoperator")
    if kind is Format.WEIGHT_ONLY:
        for key in ("dtype", "granularity"):
            if getattr(recipe.activations, key) != getattr(usual.activations, key):
                raise _not_followed(f"activations.{key}", kind, "a format that quantizes activations, such as qdq")
        if recipe.attention != usual.attention:
            raise _not_followed("attention", kind, "a format that quantizes activations, such as qdq")


def _not_followed(key: str, kind: Format, remedy: str) -> RecipeError:
    return RecipeError(f"{key} means nothing in format {kind}: leave it out, or use {remedy}")


def _activation_dtype(recipe: Recipe, target: Target) -> Dtype | msgspec.UnsetType:
    """What the recipe says, or what the operators of its format make; nothing where activations stay in float."""
    if recipe.activations.dtype is not msgspec.UNSET:
        return recipe.activations.dtype
    match recipe.format:
        case Format.DYNAMIC:
            return Dtype.UINT8
        case Format.PER_TOKEN:
            return Dtype.INT8
        case Format.WEIGHT_ONLY:
            return msgspec.UNSET
    return target.activations[0]


def _check_format(recipe: Recipe, target: Target) -> None:
    """Refuses operators that the target does not import, and granularities that the format cannot multiply.

    Raises:
        TargetError: with the reason and the alternative.
    """
    if not target.integer_operators:
        if recipe.format not in (Format.QDQ, Format.WEIGHT_ONLY):
            raise TargetError(
                f"format {recipe.format} needs integer operators, which {target.name} does not import; use format qdq, "
                "or target ort-cpu"
            )
        if recipe.operators is Operators.MICROSOFT:
            raise TargetError(
                f"operators of com.microsoft are not imported by {target.name}; use operators onnx, or target ort-cpu"
            )
    simulated = recipe.format is Format.QDQ and target.integer_operators
    blocked = isinstance(recipe.weights.granularity, PerBlock)
    if blocked and recipe.format is not Format.WEIGHT_ONLY and not simulated:
        raise TargetError(
            "blocked weights do not multiply with quantized activations; use granularity per_channel, or format "
            "weight_only"
        )
    if not isinstance(recipe.activations.granularity, PerTensor):
        _check_activation_scales(recipe, target)
    if recipe.format is Format.QOPERATOR:
        for dtype in (recipe.activations.dtype, recipe.weights.dtype):
            if dtype is not msgspec.UNSET and dtype.bits > 8:
                raise TargetError(f"integer operators take 8 bits, not {dtype}; use int8 or uint8, or format qdq")
    fixed = {Format.DYNAMIC: Dtype.UINT8, Format.PER_TOKEN: Dtype.INT8}.get(recipe.format)
    if fixed is not None and recipe.activations.dtype not in (msgspec.UNSET, fixed):
        raise TargetError(
            f"format {recipe.format} makes {fixed} activations, not {recipe.activations.dtype}; leave the type out"
        )


def _check_activation_scales(recipe: Recipe, target: Target) -> None:
    """Refuses activations of several scales where no kernel multiplies them, or their ranges are not measured."""
    if recipe.format is not Format.QDQ:
        raise TargetError(
            f"format {recipe.format} has one scale per activation; use granularity per_tensor, or format qdq"
        )
    if not target.simulates:
        reason = "its kernels fail on them" if target.integer_operators else "its layers then run in float"
        raise TargetError(
            f"activations of several scales do not run on integers on {target.name}: {reason}; use granularity "
            "per_tensor, or target onnx to see what they would gain"
        )
    odd = [each for each in calibrators(recipe) if not isinstance(each, MinMax)]
    if odd:
        raise TargetError(
            "activations of several scales have minmax ranges only: set activations.calibrator.kind=minmax"
        )


def calibrators(recipe: Recipe) -> list[Calibrator | Auto]:
    """Every calibrator that the recipe uses for some activation."""
    named = [rule.activations.calibrator for rule in recipe.rules]
    return [recipe.activations.calibrator, *(each for each in named if each is not msgspec.UNSET)]


def minimum_opset(recipe: Recipe) -> int:
    """The opset that a resolved recipe needs to be simulated before it is written.

    >>> from qonnx.recipe import load_recipe
    >>> minimum_opset(Recipe()), minimum_opset(load_recipe("fp8"))
    (13, 19)
    """
    if not recipe.format.calibrated:
        return 13  # nothing is simulated, and what is written raises the opset itself
    variants = [recipe, *(_as_ruled(recipe, rule) for rule in recipe.rules)]
    dtypes = [dtype for each in variants for dtype in (each.weights.dtype, each.activations.dtype)]
    blocked = any(isinstance(each.weights.granularity, PerBlock) for each in variants)
    return max(13, 21 if blocked else 13, *(dtype.opset for dtype in dtypes if dtype is not msgspec.UNSET))
