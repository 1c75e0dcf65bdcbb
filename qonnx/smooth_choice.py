"""Smooths a model where that pays: decided per group by estimate, and for the whole by what the outputs keep.

The factors are found on some calibration batches. With `auto`, channels that stick out too far for any factor are
repeated first (`qonnx.splitting`). Then the quantized network is built and run both ways, with the same layers on
integers, and the smoothed one is kept where its worst output is better on a held-back batch.
All other statistics are measured on the model that this returns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import onnx_ir as ir

from qonnx.bias_correction import correct_biases
from qonnx.calibrators import Average
from qonnx.comparison import difference
from qonnx.equalization import equalize
from qonnx.errors import RecipeError
from qonnx.formats import insert
from qonnx.group_error import Quantizers, Vector, channel_axes
from qonnx.group_samples import collect_inputs
from qonnx.groups import Residual, SmoothGroup, find_groups
from qonnx.numerics import Dtype, PerTensor
from qonnx.observation import observe
from qonnx.passes.equalize import AutoEqualization, Equalization, NoEqualization
from qonnx.passes.infer_shapes import InferShapes
from qonnx.passes.rescale_channels import RescaleChannels, Rescaling
from qonnx.passes.split_channels import Split, SplitChannels
from qonnx.placement import candidates, place
from qonnx.plan import QuantPlan, SmoothPlan, make_plan
from qonnx.ranges import calibrated
from qonnx.rebatch import Batch
from qonnx.recipe import Format, Recipe
from qonnx.runtime import session
from qonnx.smoothing import AutoSmoothing, GroupReport, Method, NoSmoothing, decide
from qonnx.splitting import find_splits, repeated
from qonnx.statistics import Statistics
from qonnx.targets import Target

# What smoothing must gain at the outputs to be kept: less is as likely chance.
_WORTH_IT_DB = 0.25

# Channels that are made equally wide are all cut off a little by data that calibration did not see, where before only
# the widest were: their extremes must be known. So many rows (tokens, pixels) of a tensor are enough.
_FEWEST_ROWS = 512

# Methods that are kept where the outputs gain by them.
AUTOMATIC = (AutoSmoothing, AutoEqualization)


@dataclass(frozen=True)
class Smoothed:
    """A model that computes what it did, and what was done to it.

    Attributes:
        model: the prepared model; the same object where nothing was done.
        plans: what was done, to be done again from a plan.
        reports: every group, in graph order.
        notes: how it went, a line for each method.
        warning: that nothing could be done although it was asked for, or "".
        keeps_db: what the worst output keeps of the model in integers, where that was measured.
    """

    model: ir.Model
    plans: tuple[SmoothPlan, ...] = ()
    reports: tuple[GroupReport, ...] = ()
    notes: tuple[str, ...] = ()
    warning: str = ""
    keeps_db: float | None = None

    def then(
        self, model: ir.Model, plans: tuple[SmoothPlan, ...], reports: tuple[GroupReport, ...], note: str
    ) -> Smoothed:
        """This, and what one more method did."""
        return Smoothed(model, self.plans + plans, self.reports + reports, (*self.notes, note), self.warning)

    def unchanged(self, method: Method | Equalization, reports: tuple[GroupReport, ...], why: str) -> Smoothed:
        """This, and that a method found nothing to do: worth a warning where the recipe names it."""
        automatic = isinstance(method, AUTOMATIC)
        return replace(
            self,
            reports=self.reports + reports,
            notes=(*self.notes, why) if automatic else self.notes,
            warning=self.warning if automatic else "; ".join(filter(None, (self.warning, why))),
        )


def smoothed(
    model: ir.Model, recipe: Recipe, target: Target, sample: Sequence[Batch], choose: Sequence[Batch]
) -> Smoothed:
    """Smooths a model as a recipe says, and equalizes it then.

    Args:
        model: prepared; it is not changed.
        recipe: resolved for the target.
        target: the consumer of the quantized graph.
        sample: calibration batches that factors are found on.
        choose: held-back batches that `auto` decides on.

    Raises:
        RecipeError: the recipe smooths, but its format does not measure activations beforehand.
    """
    result = Smoothed(model)
    for method in (recipe.smooth, recipe.equalize):
        if isinstance(method, NoSmoothing | NoEqualization):
            continue
        if recipe.format.calibrated:
            result = _next(result, method, recipe, target, sample, choose)
        elif not isinstance(method, AUTOMATIC):
            word = "equalize" if isinstance(method, Equalization) else "smooth"
            raise RecipeError(
                f"format {recipe.format} fits its scales when the model runs: {word} with qdq or qoperator"
            )
    return result


def _next(
    before: Smoothed,
    method: Method | Equalization,
    recipe: Recipe,
    target: Target,
    sample: Sequence[Batch],
    choose: Sequence[Batch],
) -> Smoothed:
    """What one more method makes of a model."""
    model, quantizers = before.model, _quantizers(recipe, target)
    look = _Look.of(method)
    draft = place(model, recipe, target)
    quantized = {layer.node for layer in draft.layers if not layer.reason}
    groups = _read_by(quantized, look.groups(model))
    verb = "equalized" if isinstance(method, Equalization) else "smoothed"
    if all(group.reason for group in groups):
        reports = decide(groups, AutoSmoothing(), Statistics({}), {}, quantizers)[1]
        reason = reports[0].reason if reports else "no quantized layer reads channels"
        return before.unchanged(method, reports, f"nothing can be {verb}: {reason}")
    axes = channel_axes(groups)
    statistics = observe(model, [*dict.fromkeys([*axes, *candidates(draft)])], sample, channel_axes=axes)
    samples = collect_inputs(model, groups, sample)
    leave = _little_known(groups, statistics) if isinstance(method, AUTOMATIC) else {}
    splits: dict[str, Split] = {}
    if isinstance(method, Equalization):
        rescalings, reports = equalize(groups, method, statistics, samples, quantizers, quantized, leave)
    else:
        wide = statistics
        if isinstance(method, AutoSmoothing):
            known = [group for group in groups if group.value not in leave]
            splits = find_splits(model, known, statistics, samples, quantizers)
            groups = _read_by(quantized, look.groups(_split(model, splits.values())))
            wide, samples = repeated(statistics, samples, splits, groups)
        rescalings, reports = decide(groups, method, wide, samples, quantizers, quantized, leave)
    plans = tuple(look.plan(rescaling, splits) for rescaling in rescalings)
    if not plans:
        return before.unchanged(method, reports, f"not {verb}: no group of channels gains by it")
    changed = apply(model, plans)
    note = f"{verb} {len(plans)} of {len(reports)} groups of channels{_repeats(plans)}"
    if not isinstance(method, AUTOMATIC):
        return before.then(changed, plans, reports, note)
    keeps = before.keeps_db
    if keeps is None:
        keeps = _outputs_keep(model, trial_plan(model, recipe, target, sample, statistics), choose)
    after = _outputs_keep(changed, trial_plan(changed, recipe, target, sample), choose)
    gain = 0.0 if after == keeps else after - keeps  # both may be infinite
    if gain >= _WORTH_IT_DB:
        note = f"{note}: the outputs keep {gain:.1f} dB more"
        return replace(before.then(changed, plans, reports, note), keeps_db=after)
    reports = tuple(_not_kept(report, verb, gain) for report in reports)
    note = f"not {verb}: the outputs would keep {abs(gain):.1f} dB {_more(gain)}"
    return replace(before.then(model, (), reports, note), keeps_db=keeps)


def _repeats(plans: Sequence[SmoothPlan]) -> str:
    """How many channels were repeated, in the words of the end of a sentence."""
    extra = [sum(plan.copies) - len(plan.copies) for plan in plans if plan.copies]
    return f", and repeated {sum(extra)} channels of {len(extra)} layers" if extra else ""


def _read_by(quantized: Collection[str], groups: Sequence[SmoothGroup]) -> tuple[SmoothGroup, ...]:
    return tuple(group for group in groups if any(one.linear.node.name in quantized for one in group.consumers))


def _split(model: ir.Model, splits: Collection[Split]) -> ir.Model:
    """The model with copies of channels; the same object where there are none to make."""
    if not splits:
        return model
    copy = model.clone()
    SplitChannels(tuple(splits))(copy)
    return copy


def _little_known(groups: Sequence[SmoothGroup], statistics: Statistics) -> dict[str, str]:
    """The groups whose channels were seen too seldom, by value, and why they are left alone."""
    leave = {}
    for group in groups:
        if group.reason:
            continue
        rows = min(statistics.tensors[name].count // max(index.size, 1) for name, (_, index) in group.inputs.items())
        if rows < _FEWEST_ROWS:
            leave[group.value] = f"only {rows} rows were seen: too few to know how far every channel reaches"
    return leave


def apply(model: ir.Model, plans: Sequence[SmoothPlan]) -> ir.Model:
    """A copy of a prepared model with the factors and offsets of a plan folded in.

    Raises:
        RecipeError: the plan does not fit the model.
        ModelError: a factor or an offset cannot be folded in.
    """
    copy = model.clone()
    for look, same in itertools.groupby(plans, _Look.of):
        together = list(same)
        found = _found(look, copy, together)
        repeats = [plan for plan in together if plan.copies]
        if repeats:
            layers = {plan.value: found[plan.value].consumers[0].linear.node.name or "" for plan in repeats}
            SplitChannels(tuple(Split(layers[plan.value], plan.copies) for plan in repeats))(copy)
            found = _found(look, copy, together)
        rescalings = []
        for plan in together:
            scale = np.array(plan.scale, np.float64)
            shift = np.array(plan.shift, np.float64) if plan.shift else None
            rescalings.append(Rescaling(found[plan.value], scale, shift, plan.method))
        RescaleChannels(tuple(rescalings))(copy)
        InferShapes()(copy)
    return copy


def _found(look: _Look, model: ir.Model, plans: Sequence[SmoothPlan]) -> dict[str, SmoothGroup]:
    """The groups of a model by value; every plan has one, with a layer."""
    found = {group.value: group for group in look.groups(model)}
    for plan in plans:
        if plan.value not in found or not found[plan.value].consumers:
            missing = f"the plan smooths {plan.value!r}, which this model lacks"
            raise RecipeError(f"{missing}: it was made for another model")
    return found


@dataclass(frozen=True)
class _Look:
    """What groups may cost: plans of one method have it in common, and it tells those of two methods apart."""

    nodes: bool
    bounds: bool
    pad: bool

    @staticmethod
    def of(what: SmoothPlan | Method | Equalization) -> _Look:
        if isinstance(what, SmoothPlan):
            return _Look(what.nodes, what.bounds, what.pad)
        equalizes = isinstance(what, Equalization)
        return _Look(what.nodes, equalizes, isinstance(what, Equalization) and what.pad)

    def groups(self, model: ir.Model) -> tuple[SmoothGroup, ...]:
        # Equalization would rather have its own node behind x * sigmoid(x) than reach back to x and repair the Sigmoid.
        residual = Residual.MUL if self.nodes and not self.bounds else Residual.REFUSE
        return find_groups(model, residual=residual, explicit=self.nodes, pad=self.pad, bounds=self.bounds)

    def plan(self, rescaling: Rescaling, splits: Mapping[str, Split]) -> SmoothPlan:
        shift = _floats(rescaling.offset) if rescaling.offset.any() else ()
        scale = _floats(rescaling.scale)
        value, method = rescaling.group.value, rescaling.method
        copies = splits[value].copies if value in splits else ()
        return SmoothPlan(value, method, scale, shift, self.nodes, self.bounds, self.pad, copies)


def _floats(vector: Vector) -> tuple[float, ...]:
    """As the shortest decimals of their float32 values, so that a plan that was saved says the same."""
    return tuple(float(str(value)) for value in vector.astype(np.float32))


def _not_kept(report: GroupReport, verb: str, gain: float) -> GroupReport:
    if not report.method:
        return report
    reason = f"{report.method}: with all groups {verb}, the outputs would keep {abs(gain):.1f} dB {_more(gain)}"
    return msgspec.structs.replace(report, changed=0, method="", parameter=None, nodes=0, reason=reason)


def _more(gain: float) -> str:
    return "more" if gain > 0 else "less"


def _quantizers(recipe: Recipe, target: Target) -> Quantizers:
    return Quantizers(
        activations=_dtype(recipe),
        symmetric=target.symmetric,
        weights=recipe.weights.dtype,
        per_channel=not isinstance(recipe.weights.granularity, PerTensor),
        correct_biases=recipe.correct_biases,
    )


def _dtype(recipe: Recipe) -> Dtype:
    dtype = recipe.activations.dtype
    return Dtype.INT8 if isinstance(dtype, msgspec.UnsetType) else dtype


def trial_plan(
    model: ir.Model, recipe: Recipe, target: Target, sample: Sequence[Batch], statistics: Statistics | None = None
) -> QuantPlan:
    """A plan to try a model with: ranges of whole tensors from a sample, and all layers on integers that can be.

    Args:
        model: prepared.
        recipe: resolved for the target.
        target: the consumer of the quantized graph.
        sample: some calibration batches.
        statistics: of the sample, where it was observed already.
    """
    activations = msgspec.structs.replace(recipe.activations, granularity=PerTensor())
    recipe = msgspec.structs.replace(recipe, minimum_sqnr_db=-math.inf, activations=activations)
    draft = place(model, recipe, target)
    observed = statistics or observe(model, candidates(draft), sample)
    values = [value for value in candidates(draft) if value not in draft.probabilities]
    ranges = calibrated(values, observed, Average(), _dtype(recipe), symmetric=target.symmetric)
    plan = make_plan(model, observed, ranges, recipe, target)
    return correct_biases(model, plan, sample) if recipe.correct_biases else plan


def _outputs_keep(model: ir.Model, plan: QuantPlan, choose: Sequence[Batch]) -> float:
    """The signal-to-noise ratio in dB of the worst output once quantized."""
    quantized = model.clone()
    insert(quantized, msgspec.structs.replace(plan, format=Format.QDQ))
    reference, candidate, worst = session(model), session(quantized), math.inf
    for batch in choose:
        expected, given = reference.run(batch), candidate.run(batch)
        ratios = [difference(name, expected[name], given[name]).sqnr_db for name in expected]
        worst = min((ratio for ratio in (worst, *ratios) if not math.isnan(ratio)), default=math.inf)
    return worst
