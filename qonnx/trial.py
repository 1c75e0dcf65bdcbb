"""A quantized network to try a choice with: made quickly, run on held-back batches, and thrown away."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import msgspec
import onnx_ir as ir

from qonnx.bias_correction import correct_biases
from qonnx.calibrators import Average
from qonnx.comparison import difference
from qonnx.formats import insert
from qonnx.numerics import Dtype, PerTensor
from qonnx.observation import observe
from qonnx.placement import candidates, place
from qonnx.plan import QuantPlan
from qonnx.planner import make_plan
from qonnx.ranges import Range, calibrated
from qonnx.rebatch import Batch, rows
from qonnx.recipe import Format, Recipe
from qonnx.runtime import session
from qonnx.statistics import Statistics
from qonnx.targets import Target

# Samples that the means of layers are taken from: a trial is only compared with others.
_SAMPLES = 32


def activation_dtype(recipe: Recipe) -> Dtype:
    """The type of the codes of activations; where the recipe leaves it open, int8."""
    dtype = recipe.activations.dtype
    return Dtype.INT8 if isinstance(dtype, msgspec.UnsetType) else dtype


def trial_plan(
    model: ir.Model,
    recipe: Recipe,
    target: Target,
    sample: Sequence[Batch],
    statistics: Statistics | None = None,
    known: Mapping[str, Range] | None = None,
) -> QuantPlan:
    """A plan to try a model with: ranges of whole tensors from a sample, and all layers on integers that can be.

    Args:
        model: prepared.
        recipe: resolved for the target.
        target: the consumer of the quantized graph.
        sample: some calibration batches.
        statistics: of the sample, where it was observed already.
        known: ranges that are not to be found anew, by value name.
    """
    activations = msgspec.structs.replace(recipe.activations, granularity=PerTensor())
    recipe = msgspec.structs.replace(recipe, minimum_sqnr_db=-math.inf, activations=activations)
    draft = place(model, recipe, target)
    observed = statistics or observe(model, candidates(draft), sample)
    values = [value for value in candidates(draft) if value not in draft.probabilities]
    ranges = calibrated(values, observed, Average(), activation_dtype(recipe), symmetric=target.symmetric)
    plan = make_plan(model, observed, {**ranges, **(known or {})}, recipe, target)
    return correct_biases(model, plan, _few(sample)) if recipe.correct_biases else plan


def _few(sample: Sequence[Batch]) -> Sequence[Batch]:
    """The first batches with enough samples between them."""
    samples = itertools.accumulate(map(rows, sample))
    return sample[: 1 + next((number for number, count in enumerate(samples) if count >= _SAMPLES), len(sample))]


def outputs_keep(model: ir.Model, plan: QuantPlan, choose: Sequence[Batch]) -> float:
    """The signal-to-noise ratio in dB of the worst output once quantized, on the worst batch.

    Args:
        model: prepared.
        plan: of this model.
        choose: held-back batches.
    """
    quantized = model.clone()
    insert(quantized, msgspec.structs.replace(plan, format=Format.QDQ))
    reference, candidate, worst = session(model), session(quantized), math.inf
    for batch in choose:
        expected, given = reference.run(batch), candidate.run(batch)
        ratios = [difference(name, expected[name], given[name]).sqnr_db for name in expected]
        worst = min((ratio for ratio in (worst, *ratios) if not math.isnan(ratio)), default=math.inf)
    return worst
