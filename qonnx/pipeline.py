"""The one call: float model and data in, quantized model and an honest account of it out.

    load -> prepare -> observe -> plan, correct biases, insert, compare on batches that were held back -> write

Where the comparison misses the recipe's goal, the middle part is repeated with the most costly layers in float. Nothing
appears at the output path before the last step.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir

from qonnx.auto_ranges import best_throughout, least_disturbing
from qonnx.bias_correction import correct_biases
from qonnx.calibrators import EXTREMES, Auto
from qonnx.comparison import Comparison, compare
from qonnx.data import Batch, HoldOut, batches
from qonnx.errors import ModelError, OutputError
from qonnx.graph import all_graphs, first_line, is_float, load, parameters, publish, save, staging
from qonnx.numerics import Dtype
from qonnx.observation import Progress, observe
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.passes.prepare import prepare
from qonnx.placement import candidates, place
from qonnx.plan import QuantPlan, make_plan
from qonnx.ranges import Range, calibrated
from qonnx.recipe import Recipe, load_recipe, resolve
from qonnx.runtime import input_specs
from qonnx.sensitivity import LayerCost, layer_costs, most_costly
from qonnx.statistics import Statistics
from qonnx.targets import Target
from qonnx.targets import target as find_target

# At most one layer in so many is left in float to reach the recipe's goal.
_LARGEST_SHARE_LEFT = 4

# How much of the calibration data is kept for the steps that look at some of it again.
_SAMPLE_BATCHES = 8
_SAMPLE_BYTES = 128 * 1024 * 1024

# How many samples single layers are measured on: they are only ranked.
_COST_SAMPLES = 4

# How many samples the automatic choice of ranges is made on.
_AUTO_SAMPLES = 8

ModelSource = str | os.PathLike[str] | ir.Model
Report = Callable[[Progress], None]


class Result(msgspec.Struct, frozen=True):
    """What `quantize` did.

    Attributes:
        output: the file that was written.
        plan: every decision.
        comparison: float against quantized model, on batches that calibration did not see.
        held_out: the number of those batches; 0 when there was only one batch and it served for both.
        float_bytes: weights before, in bytes.
        quantized_bytes: weights after, in bytes.
        lookup_bytes: how many of them are embedding tables and the like, which are looked up and not multiplied; they
            stay in float.
        seconds: wall time per stage.
        notes: what preparation changed.
        warnings: what the user should know before using the file.
        costs: where the first attempt missed the recipe's goal, what each quantized layer alone did to the outputs,
            the worst first.
    """

    output: str
    plan: QuantPlan
    comparison: Comparison
    held_out: int
    float_bytes: int
    quantized_bytes: int
    lookup_bytes: int
    seconds: dict[str, float]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    costs: tuple[LayerCost, ...] = ()


def calibrate(
    model: ModelSource,
    data: Any,
    *,
    target: str = "a800",
    max_batches: int | None = None,
    progress: Report | None = None,
) -> Statistics:
    """Observes every tensor that any recipe for the target could want to quantize, in one pass over the data.

    Args:
        model: path of a float ONNX model, or the model itself (it is not changed).
        data: see `qonnx.data.batches`.
        target: what the quantized graph will be made for.
        max_batches: stop after this many batches.
        progress: called after every batch.
    """
    prepared, _ = _prepared(model)
    stream = batches(data, input_specs(prepared), max_batches=max_batches)
    placement = place(prepared, Recipe(), find_target(target))
    counted = [value for value in candidates(placement) if value not in placement.probabilities]
    return observe(prepared, candidates(placement), stream, distributions=counted, progress=progress)


def quantize(
    model: ModelSource,
    data: Any,
    output: str | os.PathLike[str],
    *,
    recipe: str | os.PathLike[str] | Recipe = "int8",
    target: str = "a800",
    settings: Sequence[str] = (),
    plan: str | os.PathLike[str] | QuantPlan | None = None,
    statistics: str | os.PathLike[str] | Statistics | None = None,
    max_batches: int | None = None,
    progress: Report | None = None,
) -> Result:
    """Quantizes a model and compares the result with the original before it lets go of it.

    Args:
        model: path of a float ONNX model, or the model itself (it is not changed).
        data: calibration batches, see `qonnx.data.batches`; one batch in eight is held back for the comparison.
        output: where the quantized model goes. Nothing is written when anything fails.
        recipe: the name of a built-in recipe, a YAML file, or a `Recipe`.
        target: the consumer of the graph, see `qonnx.targets`.
        settings: `key=value` changes to the recipe, such as `activations.calibrator.kind=average`.
        plan: use this plan instead of making one; the data then only serve the comparison.
        statistics: what `calibrate` measured, as a file or a value; the data then serve the comparison, the bias
            correction and the choice of `auto`.
        max_batches: use at most this many batches.
        progress: called after every calibration batch.

    Raises:
        QonnxError: one of `qonnx.errors`, in one line.
    """
    consumer = find_target(target)
    chosen = resolve(recipe if isinstance(recipe, Recipe) else load_recipe(recipe, settings), consumer)
    given = QuantPlan.load(plan) if isinstance(plan, str | os.PathLike) else plan
    output = Path(output)
    if not isinstance(model, ir.Model) and Path(model).resolve() == output.resolve():
        raise OutputError(f"{output}: would overwrite the float model; choose another name")
    clock = _Clock()
    with staging(output) as folder:
        prepared, notes = _prepared(model)
        clock.lap("prepare")
        held = HoldOut(batches(data, input_specs(prepared), max_batches=max_batches))
        sample: list[Batch] = []
        stream = _keeping(held, sample)
        if statistics is None:
            draft = place(prepared, chosen, consumer)
            needed = not isinstance(chosen.activations.calibrator, EXTREMES)
            counted = [value for value in candidates(draft) if needed and value not in draft.probabilities]
            measured = observe(prepared, candidates(draft), stream, distributions=counted, progress=progress)
        else:
            measured = statistics if isinstance(statistics, Statistics) else Statistics.load(statistics)
        deque(stream, maxlen=0)  # what was not read yet: the steps below need some of it
        clock.lap("calibrate")
        if given is None:
            attempt = _best(_Job(model, prepared, measured, chosen, consumer, sample, held, folder / output.name))
        else:
            attempt = _attempt(given, prepared, model, held, folder / output.name, chosen, consumer)
        clock.lap("plan, insert and compare")
        publish(folder, output.parent)
    return Result(
        output=str(output),
        plan=attempt.plan,
        comparison=attempt.comparison,
        held_out=0 if held.shared else len(held.kept),
        float_bytes=parameters(prepared)[1],
        quantized_bytes=attempt.bytes,
        lookup_bytes=_lookup_bytes(prepared),
        seconds=clock.laps,
        notes=notes,
        warnings=_warnings(attempt, held, chosen),
        costs=attempt.costs,
    )


@dataclass(frozen=True)
class _Job:
    """What stays the same over the attempts of one call."""

    model: ModelSource
    prepared: ir.Model
    statistics: Statistics
    recipe: Recipe
    target: Target
    sample: list[Batch]
    held: HoldOut
    file: Path


@dataclass(frozen=True)
class _Attempt:
    """One plan, and what it makes of the held-back batches."""

    plan: QuantPlan
    comparison: Comparison
    bytes: int
    costs: tuple[LayerCost, ...] = ()


def _best(job: _Job) -> _Attempt:
    """Plans, inserts and compares; where the goal is missed, leaves the most costly layers in float and tries again."""
    ranges = _ranges(job)
    leave: dict[str, str] = {}
    costs: tuple[LayerCost, ...] = ()
    while True:
        plan = make_plan(job.prepared, job.statistics, ranges, job.recipe, job.target, leave)
        if job.recipe.correct_biases:
            plan = correct_biases(job.prepared, plan, job.sample)
        attempt = _attempt(plan, job.prepared, job.model, job.held, job.file, job.recipe, job.target)
        reached = _worst_sqnr(attempt.comparison)
        if reached >= job.recipe.goal_sqnr_db or job.recipe.goal_sqnr_db <= 0 or not plan.quantized_layers:
            return replace(attempt, costs=costs)
        if not costs:
            costs = layer_costs(job.prepared, plan, _few_samples(job.prepared, job.sample[0], _COST_SAMPLES))
        remaining = [cost for cost in costs if cost.node in {layer.node for layer in plan.quantized_layers}]
        allowed = len(plan.layers) // _LARGEST_SHARE_LEFT - len(leave)
        more = most_costly(remaining, reached, job.recipe.goal_sqnr_db, allowed)
        if not more:
            return replace(attempt, costs=costs)
        leave |= {cost.node: f"quantized alone, it leaves {cost.sqnr_db:.1f} dB of the output" for cost in more}


def _ranges(job: _Job) -> dict[str, Range]:
    """The range of every candidate tensor, by the recipe's calibrator."""
    calibrator, dtype = job.recipe.activations.calibrator, job.recipe.activations.dtype
    grid = Dtype.INT8 if isinstance(dtype, msgspec.UnsetType) else dtype
    placement, symmetric = place(job.prepared, job.recipe, job.target), job.target.symmetric
    values = [value for value in candidates(placement) if value not in placement.probabilities]
    if not isinstance(calibrator, Auto):
        return calibrated(values, job.statistics, calibrator, grid, symmetric=symmetric)
    tried = [calibrated(values, job.statistics, each, grid, symmetric=symmetric) for each in calibrator.candidates]
    batch = _few_samples(job.prepared, job.held.kept[0], _AUTO_SAMPLES)
    tried.append(
        least_disturbing(
            job.prepared,
            placement,
            tried,
            batch,
            grid,
            symmetric=symmetric,
            biases_corrected=job.recipe.correct_biases,
        )
    )
    # All contestants quantize the edges of the first one; which layers no scale can save is decided once more later.
    first = make_plan(job.prepared, job.statistics, tried[0], job.recipe, job.target)
    leave = {layer.node: layer.reason for layer in first.float_layers}
    recipe = msgspec.structs.replace(job.recipe, minimum_sqnr_db=-math.inf)
    plans = [make_plan(job.prepared, job.statistics, each, recipe, job.target, leave) for each in tried]
    return tried[best_throughout(job.prepared, plans, batch)]


def _few_samples(model: ir.Model, batch: Batch, count: int) -> Batch:
    """The first samples of a batch, where the model takes batches of any size: single layers are measured on few."""
    sizes = {array.shape[0] if array.ndim else 0 for array in batch.values()}
    dynamic = all(
        spec.shape is not None and spec.shape and not isinstance(spec.shape[0], int) for spec in input_specs(model)
    )
    if not dynamic or len(sizes) != 1 or max(sizes) <= count:
        return batch
    return {name: array[:count] for name, array in batch.items()}


def _attempt(
    plan: QuantPlan,
    prepared: ir.Model,
    model: ModelSource,
    held: HoldOut,
    file: Path,
    recipe: Recipe,
    target: Target,
) -> _Attempt:
    """Writes the quantized model into the staging folder and compares it with the original."""
    quantized = prepared.clone()
    InsertQDQ(plan)(quantized)
    _stamp(quantized, recipe, target, held.digest)
    save(quantized, file)
    _check_valid(file)
    return _Attempt(plan, compare(model, file, held.kept), parameters(quantized)[1])


def _keeping(stream: Iterable[Batch], kept: list[Batch]) -> Iterator[Batch]:
    """Passes batches on and keeps the first few, for the steps that need to see some of the data again."""
    size = 0
    for batch in stream:
        size += sum(array.nbytes for array in batch.values())
        if len(kept) < _SAMPLE_BATCHES and (not kept or size < _SAMPLE_BYTES):
            kept.append(batch)
        yield batch


def _prepared(model: ModelSource) -> tuple[ir.Model, tuple[str, ...]]:
    prepared = model.clone() if isinstance(model, ir.Model) else load(model)
    if any("QuantizeLinear" in node.op_type for graph in all_graphs(prepared) for node in graph):
        raise ModelError("the model is quantized already; give the float model that it was made from")
    dtypes = {value.dtype for value in prepared.graph.initializers.values()}
    # Scales in float16 came with opset 19; per-channel scales with 13.
    half = bool(dtypes & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
    return prepared, prepare(prepared, minimum_opset=19 if half else 13)


def _check_valid(file: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(file), full_check=False)
    except Exception as error:
        raise ModelError(f"the quantized model is not valid ONNX ({first_line(error)}); please report this") from error


def _stamp(model: ir.Model, recipe: Recipe, target: Target, digest: str) -> None:
    """Writes into the file what someone who finds it needs to know."""
    model.producer_name = "qonnx"
    model.producer_version = importlib.metadata.version("qonnx-pipeline")
    model.metadata_props["qonnx.recipe"] = msgspec.json.encode(recipe).decode()
    model.metadata_props["qonnx.target"] = target.name
    model.metadata_props["qonnx.calibration_data"] = digest


def _worst_sqnr(comparison: Comparison) -> float:
    """The lowest signal-to-noise ratio of all outputs; -inf where finite values became NaN or infinite."""
    if any(output.nonfinite > output.nonfinite_reference for output in comparison.outputs):
        return -math.inf
    return min((output.sqnr_db for output in comparison.outputs if not math.isnan(output.sqnr_db)), default=math.inf)


def _warnings(attempt: _Attempt, held: HoldOut, recipe: Recipe) -> tuple[str, ...]:
    """What to say loudly."""
    warnings = []
    if not attempt.plan.quantized_layers:
        warnings.append("no layer was quantized: the file computes what the float model computes")
    for output in attempt.comparison.outputs:
        if output.nonfinite > output.nonfinite_reference:
            warnings.append(f"output {output.name}: {output.nonfinite} values are not finite")
        elif output.sqnr_db < recipe.goal_sqnr_db:
            warnings.append(
                f"output {output.name} keeps only {output.sqnr_db:.1f} dB (the goal is {recipe.goal_sqnr_db:g} dB): "
                "measure the task before you use this file; the layers that cost most are listed"
            )
        if output.agreement < 1:
            warnings.append(f"output {output.name}: {1 - output.agreement:.2%} of its integers differ")
        if output.mismatched_batches:
            warnings.append(f"output {output.name}: its shape differs in {output.mismatched_batches} batches")
    if held.shared:
        warnings.append("only one batch was given: the comparison uses the batch that calibration saw")
    return tuple(warnings)


def _lookup_bytes(model: ir.Model) -> int:
    """Bytes of embedding tables and the like, which are looked up and not multiplied, and stay in float."""
    return sum(
        int(value.const_value.nbytes)
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and is_float(value)
        and any(usage.node.op_type == "Gather" and usage.idx == 0 for usage in value.uses())
    )


class _Clock:
    """Wall time per stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = round(now - self._start, 3)
        self._start = now
