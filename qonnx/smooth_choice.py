"""Smooths a model where that pays: decided per group by estimate, and for the whole by what the outputs keep.

The factors are found on some calibration batches. With `auto`, the quantized network is then built and run both ways,
with the same layers on integers, and the smoothed one is kept where its worst output is better on a held-back batch.
All other statistics are measured on the model that this returns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import onnx_ir as ir

from qonnx.bias_correction import correct_biases
from qonnx.calibrators import Average
from qonnx.comparison import difference
from qonnx.errors import RecipeError
from qonnx.formats import insert
from qonnx.group_error import Quantizers, Vector, channel_axes
from qonnx.group_samples import collect_inputs
from qonnx.groups import Residual, SmoothGroup, find_groups
from qonnx.numerics import Dtype, PerTensor
from qonnx.observation import observe
from qonnx.passes.infer_shapes import InferShapes
from qonnx.passes.rescale_channels import RescaleChannels, Rescaling
from qonnx.placement import candidates, place
from qonnx.plan import SmoothPlan, make_plan
from qonnx.ranges import calibrated
from qonnx.rebatch import Batch
from qonnx.recipe import Format, Recipe
from qonnx.runtime import session
from qonnx.smoothing import AutoSmoothing, GroupReport, NoSmoothing, decide
from qonnx.statistics import Statistics
from qonnx.targets import Target

# What smoothing must gain at the outputs to be kept: less is as likely chance.
_WORTH_IT_DB = 0.25

# Channels that are made equally wide are all cut off a little by data that calibration did not see, where before only
# the widest were: their extremes must be known. So many rows (tokens, pixels) of a tensor are enough.
_FEWEST_ROWS = 512


@dataclass(frozen=True)
class Smoothed:
    """A model that computes what it did, and what was done to it.

    Attributes:
        model: the prepared model; the same object where nothing was done.
        plans: what was done, to be done again from a plan.
        reports: every group, in graph order.
        note: how it went, or "".
        warning: that nothing could be done although it was asked for, or "".
    """

    model: ir.Model
    plans: tuple[SmoothPlan, ...] = ()
    reports: tuple[GroupReport, ...] = ()
    note: str = ""
    warning: str = ""


def smoothed(
    model: ir.Model, recipe: Recipe, target: Target, sample: Sequence[Batch], choose: Sequence[Batch]
) -> Smoothed:
    """Smooths a model as a recipe says.

    Args:
        model: prepared; it is not changed.
        recipe: resolved for the target.
        target: the consumer of the quantized graph.
        sample: calibration batches that factors are found on.
        choose: held-back batches that `auto` decides on.

    Raises:
        RecipeError: the recipe smooths, but its format does not measure activations beforehand.
    """
    method = recipe.smooth
    if isinstance(method, NoSmoothing):
        return Smoothed(model)
    if not recipe.format.calibrated:
        if isinstance(method, AutoSmoothing):
            return Smoothed(model)
        raise RecipeError(f"format {recipe.format} fits its scales when the model runs: smooth with qdq or qoperator")
    groups = _groups(model, method.nodes)
    draft = place(model, recipe, target)
    quantized = {layer.node for layer in draft.layers if not layer.reason}
    groups = tuple(group for group in groups if any(one.linear.node.name in quantized for one in group.consumers))
    quantizers = _quantizers(recipe, target)
    if all(group.reason for group in groups):
        reports = decide(groups, method, Statistics({}), {}, quantizers)[1]
        reason = reports[0].reason if reports else "no quantized layer reads channels"
        return _unchanged(model, recipe, reports, f"nothing can be smoothed: {reason}")
    axes = channel_axes(groups)
    values = [value for value in candidates(draft) if value not in draft.probabilities]
    statistics = observe(model, [*dict.fromkeys([*axes, *values])], sample, channel_axes=axes)
    samples = collect_inputs(model, groups, sample)
    leave = _little_known(groups, statistics) if isinstance(method, AutoSmoothing) else {}
    rescalings, reports = decide(groups, method, statistics, samples, quantizers, quantized, leave)
    plans = tuple(_plan(rescaling, method.nodes) for rescaling in rescalings)
    if not plans:
        return _unchanged(model, recipe, reports, "smoothing changed nothing: no group of channels gains by it")
    changed = apply(model, plans)
    note = f"smoothed {len(plans)} of {len(reports)} groups of channels"
    if not isinstance(method, AutoSmoothing):
        return Smoothed(changed, plans, reports, note)
    after = _outputs_keep(changed, recipe, target, sample, choose)
    gain = after - _outputs_keep(model, recipe, target, sample, choose, statistics)
    if gain >= _WORTH_IT_DB:
        return Smoothed(changed, plans, reports, f"{note}: the outputs keep {gain:.1f} dB more")
    reports = tuple(_not_kept(report, gain) for report in reports)
    return Smoothed(model, (), reports, f"not smoothed: the outputs would keep {abs(gain):.1f} dB {_more(gain)}")


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


def _unchanged(model: ir.Model, recipe: Recipe, reports: tuple[GroupReport, ...], why: str) -> Smoothed:
    """The model as it is, which is worth a warning where the recipe names a method."""
    automatic = isinstance(recipe.smooth, AutoSmoothing)
    return Smoothed(model, (), reports, note=why if automatic else "", warning="" if automatic else why)


def apply(model: ir.Model, plans: Sequence[SmoothPlan]) -> ir.Model:
    """A copy of a prepared model with the factors and offsets of a plan folded in.

    Raises:
        RecipeError: the plan does not fit the model.
        ModelError: a factor or an offset cannot be folded in.
    """
    copy = model.clone()
    found = {nodes: {group.value: group for group in _groups(copy, nodes)} for nodes in {plan.nodes for plan in plans}}
    rescalings = []
    for plan in plans:
        group = found[plan.nodes].get(plan.value)
        if group is None:
            raise RecipeError(f"the plan smooths {plan.value!r}, which this model lacks: it was made for another model")
        scale = np.array(plan.scale, np.float64)
        shift = np.array(plan.shift, np.float64) if plan.shift else None
        rescalings.append(Rescaling(group, scale, shift, plan.method))
    RescaleChannels(tuple(rescalings))(copy)
    InferShapes()(copy)
    return copy


def _groups(model: ir.Model, nodes: bool) -> tuple[SmoothGroup, ...]:
    return find_groups(model, residual=Residual.MUL if nodes else Residual.REFUSE, explicit=nodes)


def _plan(rescaling: Rescaling, nodes: bool) -> SmoothPlan:
    shift = _floats(rescaling.offset) if rescaling.offset.any() else ()
    return SmoothPlan(rescaling.group.value, rescaling.method, _floats(rescaling.scale), shift, nodes)


def _floats(vector: Vector) -> tuple[float, ...]:
    """As the shortest decimals of their float32 values, so that a plan that was saved says the same."""
    return tuple(float(str(value)) for value in vector.astype(np.float32))


def _not_kept(report: GroupReport, gain: float) -> GroupReport:
    if not report.method:
        return report
    reason = f"{report.method}: with all groups smoothed, the outputs would keep {abs(gain):.1f} dB {_more(gain)}"
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


def _outputs_keep(
    model: ir.Model,
    recipe: Recipe,
    target: Target,
    sample: Sequence[Batch],
    choose: Sequence[Batch],
    statistics: Statistics | None = None,
) -> float:
    """The signal-to-noise ratio in dB of the worst output once quantized, with ranges from the sample."""
    recipe = msgspec.structs.replace(recipe, minimum_sqnr_db=-math.inf)  # the same layers on integers in every trial
    draft = place(model, recipe, target)
    values = [value for value in candidates(draft) if value not in draft.probabilities]
    observed = statistics or observe(model, values, sample)
    ranges = calibrated(values, observed, Average(), _dtype(recipe), symmetric=target.symmetric)
    plan = make_plan(model, observed, ranges, recipe, target)
    if recipe.correct_biases:
        plan = correct_biases(model, plan, sample)
    quantized = model.clone()
    insert(quantized, msgspec.structs.replace(plan, format=Format.QDQ))
    reference, candidate, worst = session(model), session(quantized), math.inf
    for batch in choose:
        expected, given = reference.run(batch), candidate.run(batch)
        ratios = [difference(name, expected[name], given[name]).sqnr_db for name in expected]
        worst = min((ratio for ratio in (worst, *ratios) if not math.isnan(ratio)), default=math.inf)
    return worst
