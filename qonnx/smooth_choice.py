"""Smooths a model where that pays: decided per group by estimate, and for the whole by what the outputs keep.

The factors are found on some calibration batches. With `auto`, channels that stick out too far for any factor are
repeated first (`qonnx.splitting`). Then the quantized network is built and run both ways, with the same layers on
integers, and the smoothed one is kept where its worst output is better on held-back batches. What takes nodes at run
time is tried last, and only where the goal may be missed without. At the end, values in attention get offsets that
suit the few codes of their probabilities.
All other statistics are measured on the model that this returns.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
import onnx_ir as ir

from qonnx.calibrators import Auto
from qonnx.equalization import equalize
from qonnx.errors import RecipeError
from qonnx.group_error import Quantizers, channel_axes
from qonnx.group_report import GroupReport
from qonnx.group_samples import collect_inputs
from qonnx.groups import SmoothGroup
from qonnx.numerics import PerTensor
from qonnx.observation import observe
from qonnx.passes.equalize import AutoEqualization, Equalization, NoEqualization
from qonnx.passes.split_channels import Split, SplitChannels
from qonnx.placement import Placement, candidates, place
from qonnx.plan import SmoothPlan
from qonnx.probabilities import ENDS, attentions, choose_grids
from qonnx.producers import Kind
from qonnx.ranges import Range
from qonnx.rebatch import Batch, rows
from qonnx.recipe import Recipe
from qonnx.smooth_plan import Look, apply, floats
from qonnx.smoothing import AutoSmoothing, Method, NoSmoothing, decide
from qonnx.splitting import find_splits, repeated
from qonnx.statistics import Statistics
from qonnx.targets import Target
from qonnx.text import count
from qonnx.trial import activation_dtype, outputs_keep, trial_plan

# What smoothing must gain at the outputs to be kept: less is as likely chance, and so is more where few samples tell.
_WORTH_IT_DB = 0.25
_WORTH_IT_ON_FEW_DB = 1.0
_FEW_SAMPLES = 8

# What it must gain to be kept where it takes nodes at run time.
_WORTH_NODES_DB = 1.0

# The same where convolutions hand each other integers: a node between two also takes a DequantizeLinear and a
# QuantizeLinear. 31 of them took a fifth of MobileNetV2's speed on a CPU, for 0.8 dB.
_WORTH_NODES_BETWEEN_INTEGERS_DB = 3.0

# What the outputs must keep beyond the recipe's goal in a trial for the goal to be safe. A trial has ranges of its own
# and judges on few batches: of a network that kept 2 dB more than the goal in it, a seventh was left in float later.
_SAFE_DB = 3.0

# Channels that are made equally wide are all cut off a little by data that calibration did not see, where before only
# the widest were: their extremes must be known. So many rows (tokens, pixels) of a tensor are enough.
_FEWEST_ROWS = 512

# How many rows that these extremes are not taken from are enough to choose on; where there are fewer, all rows serve.
_FEWEST_ROWS_TO_CHOOSE_ON = 256

# Methods that are kept where the outputs gain by them.
AUTOMATIC = (AutoSmoothing, AutoEqualization)

# Parts of what is told.
_NONE_GAINS = "no group of channels gains by it"
_SO_FAR = " without nodes at run time"

# What `RescaleChannels` says about the nodes that it puts in.
_RESCALED = "RescaleChannels"


@dataclass(frozen=True)
class Smoothed:
    """A model that computes what it did, and what was done to it.

    Attributes:
        model: the prepared model; the same object where nothing was done.
        plans: what was done, to be done again from a plan.
        reports: every group, in graph order.
        notes: how it went, a line for each method.
        warning: that nothing could be done although it was asked for, or that it was done by few data, or "".
        keeps_db: what the worst output keeps of the model in integers, where that was measured.
        probabilities: ranges of outputs of a Softmax that end before 1, by value name.
    """

    model: ir.Model
    plans: tuple[SmoothPlan, ...] = ()
    reports: tuple[GroupReport, ...] = ()
    notes: tuple[str, ...] = ()
    warning: str = ""
    keeps_db: float | None = None
    probabilities: Mapping[str, Range] = field(default_factory=dict)

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
            warning=self.warning if automatic else _join(self.warning, why),
        )


def smoothed(
    model: ir.Model, recipe: Recipe, target: Target, sample: Sequence[Batch], choose: Sequence[Batch]
) -> Smoothed:
    """Equalizes a model as a recipe says, and smooths it then.

    What `auto` finds takes no node at run time at first. Nodes are tried where the outputs miss the recipe's goal then.

    Args:
        model: prepared; it is not changed.
        recipe: resolved for the target.
        target: the consumer of the quantized graph.
        sample: calibration batches that factors are found on.
        choose: held-back batches that `auto` decides on.

    Raises:
        RecipeError: the recipe smooths, but its format does not measure activations beforehand.
    """
    result, costly = Smoothed(model), []
    # Equalization comes first: it needs no nodes for most of what smoothing would need some for.
    for method in (recipe.equalize, recipe.smooth):
        if isinstance(method, NoSmoothing | NoEqualization):
            continue
        if not recipe.format.calibrated:
            if isinstance(method, AUTOMATIC):
                continue
            word = "equalize" if isinstance(method, Equalization) else "smooth"
            raise RecipeError(
                f"format {recipe.format} fits its scales when the model runs: {word} with qdq or qoperator"
            )
        if isinstance(method, AUTOMATIC) and method.nodes:
            costly.append(method)
            method = msgspec.structs.replace(method, nodes=False)
        result = _next(result, method, recipe, target, sample, choose)
    # With nodes, smoothing gains more: it flattens what residual branches share with the layers of a transformer.
    for method in reversed(costly):
        result = _with_nodes(result, method, recipe, target, sample, choose)
    if isinstance(recipe.smooth, AutoSmoothing) and recipe.format.calibrated and activation_dtype(recipe).is_integer:
        result = _for_probabilities(result, recipe, target, sample, choose)
    return result


@dataclass(frozen=True, eq=False)
class _Found:
    """What a method would do with a model.

    Attributes:
        plans: what to do.
        reports: every group, those left out that are there by an earlier method.
        statistics: of all tensors that will be quantized, on the sample.
        rows: the fewest rows that were seen of a tensor of these groups.
    """

    plans: tuple[SmoothPlan, ...]
    reports: tuple[GroupReport, ...]
    statistics: Statistics
    rows: int

    @property
    def nodes(self) -> int:
        """How many nodes it takes at run time."""
        return sum(report.nodes for report in self.reports)

    def words(self, verb: str) -> str:
        """What is done, as the beginning of a sentence."""
        nodes = f", with {self.nodes} nodes at run time" if self.nodes else ""
        return f"{verb} {len(self.plans)} of {len(self.reports)} groups of channels{nodes}{_repeats(self.plans)}"


def _next(
    before: Smoothed,
    method: Method | Equalization,
    recipe: Recipe,
    target: Target,
    sample: Sequence[Batch],
    choose: Sequence[Batch],
) -> Smoothed:
    """What one more method makes of a model."""
    model, verb = before.model, _verb(method)
    draft = place(model, recipe, target)
    groups = _read_by(draft, Look.of(method).groups(model))
    if all(group.reason for group in groups):
        reports = decide(groups, AutoSmoothing(), Statistics({}), {}, _quantizers(recipe, target))[1]
        reason = reports[0].reason if reports else "no quantized layer reads channels"
        return before.unchanged(method, _told(reports, groups), f"nothing can be {verb}: {reason}")
    found = _find(model, method, draft, groups, _quantizers(recipe, target), sample, choose)
    if not found.plans:
        return before.unchanged(method, found.reports, f"not {verb}: {_NONE_GAINS}")
    changed = apply(model, found.plans)
    if not isinstance(method, AUTOMATIC):
        after = before.then(changed, found.plans, found.reports, found.words(verb))
        return after if found.rows >= _FEWEST_ROWS else replace(after, warning=_join(after.warning, _few(verb, found)))
    keeps = _keeps(before, recipe, target, sample, choose, found.statistics)
    would = outputs_keep(changed, trial_plan(changed, recipe, target, sample), choose)
    gain = _gain(keeps, would)
    if gain >= _worth_it(choose):
        note = f"{found.words(verb)}: the outputs keep {gain:.1f} dB more"
        return replace(before.then(changed, found.plans, found.reports, note), keeps_db=would)
    reports = tuple(_not_kept(report, verb, gain) for report in found.reports)
    how = "" if found.nodes else _SO_FAR  # with some, it may be yet
    note = f"not {verb}{how}: the outputs would keep {abs(gain):.1f} dB {_more(gain)}"
    return replace(before.then(model, (), reports, note), keeps_db=keeps)


def _with_nodes(
    before: Smoothed,
    method: AutoSmoothing | AutoEqualization,
    recipe: Recipe,
    target: Target,
    sample: Sequence[Batch],
    choose: Sequence[Batch],
) -> Smoothed:
    """What a method makes of the groups that it left alone without nodes, where the outputs may miss the goal."""
    model, verb = before.model, _verb(method)
    draft = place(model, recipe, target)
    done = {plan.value for plan in before.plans if plan.bounds == isinstance(method, Equalization)}
    groups = tuple(group for group in _read_by(draft, Look.of(method).groups(model)) if group.value not in done)
    if all(group.reason for group in groups):
        return before
    if _costly(groups):  # of which that was not meant
        notes = (note.replace(f"{verb}: {_NONE_GAINS}", f"{verb}{_SO_FAR}: {_NONE_GAINS}") for note in before.notes)
        before = replace(before, notes=tuple(notes))
    keeps = _keeps(before, recipe, target, sample, choose)
    before = replace(before, keeps_db=keeps)
    goal = recipe.goal_sqnr_db or Recipe().goal_sqnr_db  # 0 is no goal: it only leaves no layer in float
    if keeps >= goal + _SAFE_DB:
        if isinstance(method, AutoSmoothing):  # equalization with nodes is for few networks, and gains little there
            before = replace(before, notes=before.notes + _not_tried(groups, verb, keeps, goal))
        return before
    found = _find(model, method, draft, groups, _quantizers(recipe, target), sample, choose)
    if not found.nodes:
        return before
    changed = apply(model, found.plans)
    would = outputs_keep(changed, trial_plan(changed, recipe, target, sample), choose)
    gain = _gain(keeps, would)
    worth = _WORTH_NODES_BETWEEN_INTEGERS_DB if target.quantize_outputs else _WORTH_NODES_DB
    if gain >= worth:
        reports = tuple(report for report in found.reports if report.method)  # the others were told before
        note = f"{found.words(verb)}: the outputs keep {gain:.1f} dB more"
        return replace(before.then(changed, found.plans, reports, note), keeps_db=would)
    note = (
        f"not {verb} with {found.nodes} nodes at run time: the outputs would keep {abs(gain):.1f} dB {_more(gain)}, "
        f"and {worth:g} are what nodes must gain"
    )
    return replace(before, notes=(*before.notes, note))


def _costly(groups: Sequence[SmoothGroup]) -> int:
    """How many groups take nodes at run time."""
    return sum(bool(group.taps) or group.producer.kind is Kind.NONE for group in groups if not group.reason)


def _not_tried(groups: Sequence[SmoothGroup], verb: str, keeps: float, goal: float) -> tuple[str, ...]:
    """That more could be done at run time, where it could."""
    costly = _costly(groups)
    if not costly:
        return ()
    return (
        f"{count(costly, 'group')} of channels would take nodes at run time to be {verb}: not tried, as the outputs "
        f"keep {keeps:.1f} dB in a trial; below {goal + _SAFE_DB:g} dB (goal_sqnr_db and 3 more) they are",
    )


def _for_probabilities(
    before: Smoothed, recipe: Recipe, target: Target, sample: Sequence[Batch], choose: Sequence[Batch]
) -> Smoothed:
    """Grids of the probabilities in attention, and values with offsets that suit these: see `qonnx.probabilities`."""
    model, look = before.model, Look()
    draft = place(model, recipe, target)
    found = list(attentions(model, draft, look.groups(model))) if draft.probabilities else []
    if not found:
        return before
    grids = choose_grids(
        model,
        found,
        sample,
        choose,
        activation_dtype(recipe),
        symmetric=target.symmetric,
        biases_corrected=recipe.correct_biases,
        ends=ENDS if isinstance(recipe.activations.calibrator, Auto) else ENDS[:1],
    )
    if not grids.ranges and not grids.rescalings:
        return before
    plans = tuple(look.plan(rescaling, {}) for rescaling in grids.rescalings)
    changed = apply(model, plans)
    keeps = _keeps(before, recipe, target, sample, choose)
    would = outputs_keep(changed, trial_plan(changed, recipe, target, sample, known=grids.ranges), choose)
    gain = _gain(keeps, would)
    what = (
        f"{len(plans)} of {len(found)} attentions with values centred, {len(grids.ranges)} with probabilities cut off"
    )
    if gain < _worth_it(choose):
        note = f"not changed: {what}: the outputs would keep {abs(gain):.1f} dB {_more(gain)}"
        return replace(before, notes=(*before.notes, note))
    return replace(
        before,
        model=changed,
        plans=_with_offsets(before.plans, plans),
        notes=(*before.notes, f"{what}: the outputs keep {gain:.1f} dB more"),
        keeps_db=would,
        probabilities=grids.ranges,
    )


def _keeps(
    what: Smoothed,
    recipe: Recipe,
    target: Target,
    sample: Sequence[Batch],
    choose: Sequence[Batch],
    statistics: Statistics | None = None,
) -> float:
    """What the worst output keeps in a trial; measured once."""
    if what.keeps_db is not None:
        return what.keeps_db
    return outputs_keep(what.model, trial_plan(what.model, recipe, target, sample, statistics), choose)


def _with_offsets(plans: tuple[SmoothPlan, ...], more: Sequence[SmoothPlan]) -> tuple[SmoothPlan, ...]:
    """Plans with further offsets, of values as they are behind these plans: (x - z) / s - c = (x - z - s c) / s."""
    merged = list(plans)
    for plan in more:
        index = max((number for number, one in enumerate(merged) if one.value == plan.value), default=None)
        if index is None:
            merged.append(plan)
            continue
        scale = np.array(merged[index].scale)
        shift = np.array(merged[index].shift or 0.0) + scale * np.array(plan.shift)
        method = f"{merged[index].method}, {plan.method}"
        merged[index] = msgspec.structs.replace(merged[index], shift=floats(shift), method=method)
    return tuple(merged)


def _find(
    model: ir.Model,
    method: Method | Equalization,
    draft: Placement,
    groups: Sequence[SmoothGroup],
    quantizers: Quantizers,
    sample: Sequence[Batch],
    choose: Sequence[Batch],
) -> _Found:
    """Measures the channels of groups on a sample and decides on other rows what to do with each.

    Every channel of the sample ends where its own elements do. Were the error measured there too, it would be least
    where all channels are equally wide; other data stick out of each then.
    """
    look, quantized = Look.of(method), _quantized(draft)
    axes = channel_axes(groups)
    statistics = observe(model, [*dict.fromkeys([*axes, *candidates(draft)])], sample, channel_axes=axes)
    seen = {group.value: _rows_seen(group, statistics) for group in groups if not group.reason}
    samples = collect_inputs(model, groups, choose)
    if min(map(len, samples.values()), default=0) < _FEWEST_ROWS_TO_CHOOSE_ON:
        samples = collect_inputs(model, groups, sample)
    leave = _little_known(seen) if isinstance(method, AUTOMATIC) else {}
    splits: dict[str, Split] = {}
    if isinstance(method, Equalization):
        rescalings, reports = equalize(groups, method, statistics, samples, quantizers, quantized, leave)
    else:
        wide = statistics
        if isinstance(method, AutoSmoothing):
            known = [group for group in groups if group.value not in leave]
            splits = find_splits(model, known, statistics, samples, quantizers)
            values = {group.value for group in groups}
            groups = _read_by(draft, look.groups(_split(model, splits.values())))
            groups = tuple(group for group in groups if group.value in values)
            wide, samples = repeated(statistics, samples, splits, groups)
        rescalings, reports = decide(groups, method, wide, samples, quantizers, quantized, leave)
    plans = tuple(look.plan(rescaling, splits) for rescaling in rescalings)
    fewest = min((seen[plan.value] for plan in plans), default=0)
    return _Found(plans, _told(reports, groups), statistics, fewest)


def _verb(method: Method | Equalization) -> str:
    return "equalized" if isinstance(method, Equalization) else "smoothed"


def _gain(before: float, after: float) -> float:
    return 0.0 if after == before else after - before  # both may be infinite


def _worth_it(choose: Sequence[Batch]) -> float:
    return _WORTH_IT_DB if sum(map(rows, choose)) >= _FEW_SAMPLES else _WORTH_IT_ON_FEW_DB


def _few(verb: str, found: _Found) -> str:
    return (
        f"{verb} by {found.rows} rows (tokens, pixels) only, as the recipe says: give data with {_FEWEST_ROWS} or more"
    )


def _join(*parts: str) -> str:
    return "; ".join(filter(None, parts))


def _told(reports: Sequence[GroupReport], groups: Sequence[SmoothGroup]) -> tuple[GroupReport, ...]:
    """The reports without those on nodes that an earlier method put in and that nothing is done with."""
    own = {group.value for group in groups if _inserted(group)}
    return tuple(report for report in reports if report.method or report.value not in own)


def _inserted(group: SmoothGroup) -> bool:
    node = group.producer.node
    return node is not None and group.producer.linear is None and node.metadata_props.get("qonnx.pass") == _RESCALED


def _repeats(plans: Sequence[SmoothPlan]) -> str:
    """How many channels were repeated, in the words of the end of a sentence."""
    extra = [sum(plan.copies) - len(plan.copies) for plan in plans if plan.copies]
    return f", and repeated {sum(extra)} channels of {len(extra)} layers" if extra else ""


def _quantized(draft: Placement) -> set[str]:
    return {layer.node for layer in draft.layers if not layer.reason}


def _read_by(draft: Placement, groups: Sequence[SmoothGroup]) -> tuple[SmoothGroup, ...]:
    """The groups that a layer reads which will be quantized."""
    quantized = _quantized(draft)
    return tuple(group for group in groups if any(one.linear.node.name in quantized for one in group.consumers))


def _split(model: ir.Model, splits: Collection[Split]) -> ir.Model:
    """The model with copies of channels; the same object where there are none to make."""
    if not splits:
        return model
    copy = model.clone()
    SplitChannels(tuple(splits))(copy)
    return copy


def _rows_seen(group: SmoothGroup, statistics: Statistics) -> int:
    """How many rows (tokens, pixels) of its tensors were seen at least."""
    return min(statistics.tensors[name].count // max(index.size, 1) for name, (_, index) in group.inputs.items())


def _little_known(seen: Mapping[str, int]) -> dict[str, str]:
    """The groups whose channels were seen too seldom, by value, and why they are left alone."""
    return {
        value: f"only {count} rows were seen: too few to know how far every channel reaches"
        for value, count in seen.items()
        if count < _FEWEST_ROWS
    }


def _not_kept(report: GroupReport, verb: str, gain: float) -> GroupReport:
    if not report.method:
        return report
    reason = f"{report.method}: with all groups {verb}, the outputs would keep {abs(gain):.1f} dB {_more(gain)}"
    return msgspec.structs.replace(report, changed=0, method="", parameter=None, nodes=0, reason=reason)


def _more(gain: float) -> str:
    return "more" if gain > 0 else "less"


def _quantizers(recipe: Recipe, target: Target) -> Quantizers:
    return Quantizers(
        activations=activation_dtype(recipe),
        symmetric=target.symmetric,
        weights=recipe.weights.dtype,
        per_channel=not isinstance(recipe.weights.granularity, PerTensor),
        correct_biases=recipe.correct_biases,
    )
