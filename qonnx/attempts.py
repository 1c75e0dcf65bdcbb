"""From statistics to the quantized file: plan, write, compare, and try again with the most costly layers in float.

What is chosen here - ranges, and layers to leave in float - is chosen on some held-back batches. How good the result
is, is measured on others.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import onnx_ir as ir

from qonnx.auto_ranges import best_throughout, least_disturbing
from qonnx.bias_correction import activation_behind, bias_edges, correct_biases
from qonnx.calibrators import Auto, Average, MinMax
from qonnx.comparison import NOTHING_COMPARED, Comparison, ModelSource, compare
from qonnx.custom_operators import attach, runnable
from qonnx.errors import ModelError
from qonnx.few_samples import few_samples
from qonnx.formats import insert
from qonnx.graph import FLOAT_REASON, first_line, load, parameters, save
from qonnx.judged import judged_model
from qonnx.numerics import Dtype
from qonnx.passes.cast_first import CastFirst
from qonnx.passes.drop_bounds import DropBounds
from qonnx.passes.insert_qdq import InsertQDQ, check_tensor
from qonnx.placement import candidates, place
from qonnx.plan import QuantPlan, SmoothPlan
from qonnx.planner import make_plan
from qonnx.ranges import Range, calibrated
from qonnx.rebatch import Batch, rows
from qonnx.recipe import Format, Recipe
from qonnx.runtime import with_outputs
from qonnx.sensitivity import LayerCost, layer_costs, most_costly
from qonnx.statistics import Statistics
from qonnx.stored_weights import with_stored_weights
from qonnx.targets import Target
from qonnx.text import count
from qonnx.weight_rounding import Rounded, asks_for_data, round_weights

# At most one layer in so many is left in float to reach the recipe's goal, and always one.
_LARGEST_SHARE_LEFT = 4

# What must be reached beyond the recipe's goal where choices are made, for it to be reached where they are judged.
_GOAL_MARGIN_DB = 0.25

# How many samples single layers are measured on: they are only ranked.
_COST_SAMPLES = 4

# How many samples the automatic choice of ranges is made on: at least so many, and more as long as they have no more
# activations than this in all; fewer where these alone would fill the memory. And what a choice must gain over
# `average`: on few samples the best of many is best by chance.
_AUTO_SAMPLES = 16
_AUTO_ELEMENTS = 1 << 24
_MOST_AUTO_SAMPLES = 1024
_MOST_AUTO_ELEMENTS = 1 << 27
_AUTO_MARGIN_DB = 0.5


@dataclass(frozen=True)
class Job:
    """What stays the same over all attempts.

    Attributes:
        model: the float model as it was given.
        prepared: the same in normal form.
        recipe: resolved for the target.
        target: the consumer of the quantized graph.
        sample: some of the batches that are not held back, for bias correction and GPTQ.
        choose: the held-back batches that choices are made on; none for a format that needs no calibration, or for
            a plan that was given.
        digest: of the calibration data, or "".
        file: where the quantized model is written.
        smoothing: what was done to the prepared model before.
        leave: node names of layers to leave in float from the start, each with the reason.
        probabilities: ranges of outputs of a Softmax, where these are not from 0 to 1.
        whole: the model, where `model` is the part of it that ONNX Runtime can compute.
    """

    model: ModelSource
    prepared: ir.Model
    recipe: Recipe
    target: Target
    sample: Sequence[Batch]
    choose: Sequence[Batch]
    digest: str
    file: Path
    smoothing: tuple[SmoothPlan, ...] = ()
    leave: Mapping[str, str] = field(default_factory=dict)
    probabilities: Mapping[str, Range] = field(default_factory=dict)
    whole: ir.Model | None = None


@dataclass(frozen=True)
class Attempt:
    """One plan, written.

    Attributes:
        plan: what was written.
        comparison: with the float model, on the batches that choices are made on; empty without any.
        bytes: of the weights.
        costs: what each layer alone does to the outputs, the worst first, where that was measured.
        notes: what is to be said about the weights.
    """

    plan: QuantPlan
    comparison: Comparison
    bytes: int
    costs: tuple[LayerCost, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sqnr_db(self) -> float:
        """The lowest signal-to-noise ratio of all outputs; -inf where finite values became NaN or infinite."""
        outputs = self.comparison.outputs
        if any(output.nonfinite > output.nonfinite_reference for output in outputs):
            return -math.inf
        return min((output.sqnr_db for output in outputs if not math.isnan(output.sqnr_db)), default=math.inf)


def best_attempt(job: Job, statistics: Statistics) -> Attempt:
    """Plans, writes and compares; where the goal is missed, leaves the most costly layers in float and tries again.

    The file of the best attempt is the one that is left.
    """
    ranges = _as_ruled(job, statistics, _ranges(job, statistics))
    leave = dict(job.leave)
    costs: tuple[LayerCost, ...] = ()
    best: Attempt | None = None
    kept: Rounded | None = None  # its codes
    notes: tuple[str, ...] = ()
    while True:
        plan = make_plan(job.prepared, statistics, ranges, job.recipe, job.target, leave)
        plan = msgspec.structs.replace(plan, smoothing=job.smoothing)
        rounded = _rounded(job, plan, job.recipe.correct_biases)
        latest = write(job, rounded.plan, rounded)
        if best is None or latest.sqnr_db > best.sqnr_db:
            best, kept = latest, rounded
        goal = job.recipe.goal_sqnr_db + _GOAL_MARGIN_DB
        if latest.sqnr_db >= goal or job.recipe.goal_sqnr_db <= 0 or not plan.quantized_layers:
            break
        if not costs:
            costs = layer_costs(
                judged_model(job.prepared), plan, few_samples(job.prepared, job.sample, _COST_SAMPLES)[0]
            )
        quantized = {layer.node for layer in plan.quantized_layers}
        remaining = [cost for cost in costs if cost.node in quantized]
        allowed = max(1, len(plan.layers) // _LARGEST_SHARE_LEFT) - len(leave) + len(job.leave)
        more = most_costly(remaining, latest.sqnr_db, goal, allowed)
        if not more:
            notes = (_missed(goal, len(leave) - len(job.leave), allowed),)
            break
        leave |= {cost.node: f"quantized alone, it leaves {cost.sqnr_db:.1f} dB of the output" for cost in more}
    if best is not latest:
        best = write(job, best.plan, kept)
    return replace(best, costs=costs, notes=(*best.notes, *notes))


def _missed(goal: float, left: int, allowed: int) -> str:
    """Why no more layers are left in float, although the outputs keep less than was wanted where choices are made."""
    why = f"no more than one in {_LARGEST_SHARE_LEFT} may be" if allowed <= 0 else "no other layer costs anything alone"
    return (
        f"{goal:g} dB (goal_sqnr_db and {_GOAL_MARGIN_DB:g} more) were not reached with {count(left, 'layer')} left in "
        f"float, and {why}: skip more by rules, or leave activations in float (recipe w8)"
    )


def only_attempt(job: Job) -> Attempt:
    """Plans and writes in a format that measures activations when the model runs, or not at all."""
    plan = make_plan(job.prepared, Statistics({}), {}, job.recipe, job.target)
    rounded = _rounded(job, plan, corrects_stored_weights(job.recipe))
    return write(job, rounded.plan, rounded)


def given_attempt(job: Job, plan: QuantPlan) -> Attempt:
    """Writes a plan that was given. Biases that fit codes which depend on data are found anew together with these.

    Raises:
        RecipeError: the plan does not fit the model.
    """
    nodes = {node.name: node for node in job.prepared.graph if node.name}
    for tensor in plan.weights:
        check_tensor(nodes, tensor)
    if not asks_for_data(plan) or not plan.biases:
        return write(job, plan)
    if job.sample:
        rounded = _rounded(job, msgspec.structs.replace(plan, biases=()), True)
        return write(job, rounded.plan, rounded)
    attempt = write(job, msgspec.structs.replace(plan, biases=()))
    note = f"the biases of {len(plan.biases)} layers stay: the plan's are for codes that were chosen on data; give some"
    return replace(attempt, notes=(*attempt.notes, note))


def _rounded(job: Job, plan: QuantPlan, corrects: bool) -> Rounded:
    """Chooses the codes of all weights of a plan, and corrects biases where that is wanted."""
    if not corrects or not job.sample:
        return round_weights(job.prepared, plan, job.sample)
    # Behind an activation, biases take up the mean of what counts there, not that over all samples.
    corrected = {node.name or "" for node in bias_edges(job.prepared, plan) if activation_behind(node) is None}
    found = _corrected(job, round_weights(job.prepared, plan, job.sample, corrected))
    made = {bias.node for bias in found.plan.biases}
    if asks_for_data(found.plan) and corrected - made:  # few samples do not tell a mean: then it counts in the choice
        found = _corrected(job, round_weights(job.prepared, plan, job.sample, corrected & made))
    return found


def _corrected(job: Job, rounded: Rounded) -> Rounded:
    if rounded.plan.format.calibrated:
        simulated = rounded.model.clone()
        InsertQDQ(rounded.plan)(simulated)
    else:
        simulated = with_stored_weights(rounded.model, rounded.plan)
    return rounded._replace(plan=correct_biases(job.prepared, rounded.plan, job.sample, simulated))


def corrects_stored_weights(recipe: Recipe) -> bool:
    """Whether biases take up what rounded weights alone do to the mean, in a format whose activations are not measured.

    Not where activations have one range found at run time: rounding these moves the mean, too, and by what is not
    known beforehand.
    """
    return recipe.correct_biases and recipe.format in (Format.WEIGHT_ONLY, Format.PER_TOKEN)


def write(job: Job, plan: QuantPlan, rounded: Rounded | None = None) -> Attempt:
    """Writes the quantized model and compares it with the original where there are batches to choose on.

    Args:
        job: what to write, and where.
        plan: what to write.
        rounded: the same with the codes of its weights, where these were chosen before.

    Raises:
        RecipeError: the plan does not fit the model.
        ModelError: what came out is not valid ONNX.
    """
    rounded = rounded or round_weights(job.prepared, plan, job.sample)
    quantized = rounded.model.clone()
    insert(quantized, rounded.plan)
    DropBounds()(quantized)
    if job.target.device is not None:
        CastFirst()(quantized)
    _stamp(quantized, rounded.plan, job)
    size = parameters(quantized)[1]
    if job.whole is not None:
        attach(quantized, job.whole)
    save(quantized, job.file)
    _check_valid(quantized, job.file)
    return Attempt(rounded.plan, _compared(job), size, notes=rounded.notes)


def _compared(job: Job) -> Comparison:
    if not job.choose:
        return NOTHING_COMPARED
    judged, written = judged_model(job.prepared), runnable(load(job.file))
    made = {value.name for node in written.graph for value in node.outputs}
    names = [value.name for value in judged.graph.outputs[len(job.prepared.graph.outputs) :] if value.name in made]
    if not names:
        return compare(job.model, job.file, list(job.choose))
    reference, candidate = (with_outputs(model, filter(None, names)) for model in (job.prepared, written))
    return compare(reference, candidate, list(job.choose))


def _ranges(job: Job, statistics: Statistics) -> dict[str, Range]:
    """The range of every candidate tensor, by the recipe's calibrator."""
    calibrator, dtype = job.recipe.activations.calibrator, job.recipe.activations.dtype
    grid = Dtype.INT8 if isinstance(dtype, msgspec.UnsetType) else dtype
    placement, symmetric = place(job.prepared, job.recipe, job.target), job.target.symmetric
    values = [value for value in candidates(placement) if value not in placement.probabilities]
    if isinstance(calibrator, Auto) and not grid.is_integer:
        calibrator = MinMax()  # a float grid is as fine around 0 wherever it ends: nothing is gained by clipping
    if not isinstance(calibrator, Auto):
        return {**calibrated(values, statistics, calibrator, grid, symmetric=symmetric), **job.probabilities}
    tried = [calibrated(values, statistics, each, grid, symmetric=symmetric) for each in calibrator.candidates]
    # Calibration saw the sample, which makes wide ranges look better there than they are: the harmless mistake.
    few = few_samples(job.prepared, [*job.choose, *job.sample], _auto_samples(statistics, job.sample))
    corrected = job.recipe.correct_biases and len(few) == 1  # the mean of a few rows is all that there is of them
    per_tensor = least_disturbing(
        job.prepared,
        placement,
        tried,
        few,
        grid,
        symmetric=symmetric,
        biases_corrected=corrected,
    )
    tried = [{**each, **job.probabilities} for each in (*tried, per_tensor)]
    # All contestants quantize the edges of the first one; which layers no scale can save is decided once more later.
    first = make_plan(job.prepared, statistics, tried[0], job.recipe, job.target, job.leave)
    leave = {layer.node: layer.reason for layer in first.float_layers}
    recipe = msgspec.structs.replace(job.recipe, minimum_sqnr_db=-math.inf)
    plans = [make_plan(job.prepared, statistics, each, recipe, job.target, leave) for each in tried]
    kinds = [isinstance(candidate, Average) for candidate in calibrator.candidates]
    usual = kinds.index(True) if any(kinds) else 0
    best = best_throughout(
        judged_model(job.prepared), plans, few, biases_corrected=corrected, usual=usual, margin_db=_AUTO_MARGIN_DB
    )
    return tried[best]


def _auto_samples(statistics: Statistics, sample: Sequence[Batch]) -> int:
    """How many samples the choice of ranges is made on."""
    elements = sum(tensor.count for tensor in statistics.tensors.values()) / max(statistics.batches, 1)
    per_sample = max(elements / (sum(map(rows, sample)) / max(len(sample), 1) or 1), 1)
    wanted = min(max(_AUTO_SAMPLES, int(_AUTO_ELEMENTS / per_sample)), _MOST_AUTO_SAMPLES)
    return max(1, min(wanted, int(_MOST_AUTO_ELEMENTS / per_sample)))


def _as_ruled(job: Job, statistics: Statistics, ranges: dict[str, Range]) -> dict[str, Range]:
    """The ranges with those of other calibrators where a rule names one for a layer that reads the tensor."""
    placement, usual = place(job.prepared, job.recipe, job.target), job.recipe.activations
    for layer in placement.layers:
        dtype = layer.settings.activation or usual.dtype
        calibrator = layer.settings.calibrator
        values = [operand.value for operand in layer.operands if operand.channel_axis is None]
        if calibrator is not None and not isinstance(dtype, msgspec.UnsetType):
            own = [value for value in values if value not in placement.probabilities]
            ranges = {**ranges, **calibrated(own, statistics, calibrator, dtype, symmetric=job.target.symmetric)}
    return ranges


def _check_valid(model: ir.Model, file: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(file), full_check=False)
    except Exception as error:
        if "No Op registered" in str(error):
            return  # so was the float model, and runtimes know more operators
        if any(value.shape is None for value in (*model.graph.inputs, *model.graph.outputs)):
            return  # so was the float model: the specification wants a rank, runtimes do not
        raise ModelError(f"the quantized model is not valid ONNX ({first_line(error)}); please report this") from error


def _stamp(model: ir.Model, plan: QuantPlan, job: Job) -> None:
    """Writes into the file what someone who finds it needs to know."""
    reasons = {layer.node: layer.reason for layer in plan.float_layers}
    for node in model.graph:
        if node.name in reasons:
            node.metadata_props[FLOAT_REASON] = reasons[node.name]
    model.producer_name = "qonnx"
    model.producer_version = importlib.metadata.version("qonnx-pipeline")
    recipe = msgspec.json.encode(job.recipe).decode() if plan.recipe == job.recipe.name else plan.recipe
    model.metadata_props["qonnx.recipe"] = recipe
    model.metadata_props["qonnx.target"] = job.target.name
    if (plan.format.calibrated or asks_for_data(plan) or plan.biases) and job.digest:
        model.metadata_props["qonnx.calibration_data"] = job.digest
