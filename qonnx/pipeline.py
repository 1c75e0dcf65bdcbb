"""The one call: float model and data in, quantized model and an honest account of it out.

    load -> prepare -> smooth -> observe -> plan, correct biases, insert, compare on held-back batches -> write

Where the comparison misses the recipe's goal, the middle part is repeated with the most costly layers in float. Nothing
appears at the output path before the last step.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qonnx.activation_scales import channel_axes
from qonnx.attempts import Job, best_attempt, corrects_stored_weights, given_attempt, only_attempt
from qonnx.calibrators import EXTREMES
from qonnx.comparison import NOTHING_COMPARED, Comparison, compare
from qonnx.custom_operators import left_alone, runnable
from qonnx.data import HoldOut, batches, expected_rows
from qonnx.diagnostics import Diagnostics, diagnose
from qonnx.errors import DataError, ModelError, OutputError, QonnxError, RecipeError, TargetError
from qonnx.fingerprint import fingerprint
from qonnx.given_plan import without_left_layers
from qonnx.graph import all_graphs, load, parameters, publish, staging
from qonnx.numerics import PerTensor
from qonnx.observation import Progress, observe
from qonnx.passes.equalize import NoEqualization
from qonnx.passes.prepare import prepare
from qonnx.placement import Placement, candidates, place
from qonnx.plan import QuantPlan
from qonnx.rebatch import Batch, rows, spread
from qonnx.recipe import RECIPES, Format, Recipe, Rounding, load_recipe
from qonnx.resolve import calibrators, minimum_opset, resolve
from qonnx.result import Result, by_default, loading, lookup_bytes, warnings_of
from qonnx.roofline import roofline, unprofitable
from qonnx.rules import unmatched
from qonnx.runtime import Device, input_specs
from qonnx.smooth_choice import AUTOMATIC, Smoothed, smoothed
from qonnx.smooth_plan import apply
from qonnx.smoothing import NoSmoothing
from qonnx.statistics import Statistics
from qonnx.targets import Target
from qonnx.targets import target as find_target
from qonnx.validity import check_graph, check_operators
from qonnx.weight_rounding import asks_for_data

# The built-in recipes that need no calibration.
_FREE = ", ".join(recipe.name for recipe in RECIPES if not recipe.format.calibrated)

_QUANTIZED_OPERATORS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"})
_QUANTIZED_OPERATORS |= {"ConvInteger", "QLinearConv", "QLinearMatMul", "QGemm", "MatMulNBits"}

# How much of the calibration data is kept for the steps that look at some of it again: so many batches, and more where
# they hold few samples, as long as they are small.
_SAMPLE_BATCHES = 8
_SAMPLES = 64
_SAMPLE_BYTES = 128 * 1024 * 1024


ModelSource = str | os.PathLike[str] | ir.Model
StatisticsSource = str | os.PathLike[str] | Statistics
Report = Callable[[Progress], None]


def calibrate(
    model: ModelSource,
    data: Any = None,
    *,
    target: str = "a800",
    recipe: str | os.PathLike[str] | Recipe = "int8",
    max_batches: int | None = None,
    device: str = "cpu",
    resume: StatisticsSource | None = None,
    merge: Sequence[StatisticsSource] = (),
    progress: Report | None = None,
) -> Statistics:
    """Observes every tensor that recipes for the target want to quantize, in one pass over the data.

    Ctrl-C raises `qonnx.observation.Interrupted`, which holds what was measured until then: give that as `resume`, and
    the result is what one run would have given.

    Args:
        model: path of a float ONNX model, or the model itself (it is not changed).
        data: see `qonnx.data.batches`; None to merge only.
        target: what the quantized graph will be made for.
        recipe: one that wants more tensors than others do: results of products, or residuals.
        max_batches: stop after this many batches.
        device: where the float model runs: cpu or cuda.
        resume: what an interrupted run over the same data measured; its batches are skipped.
        merge: what was measured over other data, on this or another machine: it is added, and counts and extremes are
            those of one run over everything.
        progress: called after every batch.

    Raises:
        QonnxError: one of `qonnx.errors`, in one line.
        Interrupted: on Ctrl-C.
    """
    on = _device(device)
    prepared, _, mark = _prepared(runnable(_loaded(model)))
    consumer = find_target(target)
    chosen = resolve(recipe if isinstance(recipe, Recipe) else load_recipe(recipe), consumer)
    placements = [place(prepared, each, consumer) for each in (Recipe(), chosen)]
    values = tuple(dict.fromkeys(name for placement in placements for name in candidates(placement)))
    probabilities = frozenset[str]().union(*(placement.probabilities for placement in placements))
    others = [_fitting(source, values, mark) for source in merge]
    total = Statistics({}, model=mark) if resume is None else _fitting(resume, values, mark)
    if data is not None:
        expected = expected_rows(data, input_specs(prepared), max_batches)
        total = observe(
            prepared,
            values,
            _stream(prepared, data, max_batches),
            distributions=[value for value in values if value not in probabilities],
            device=on,
            earlier=total,
            total=None if expected is None else len(expected),
            progress=progress,
        )
    elif not others:
        raise DataError("nothing to calibrate on: give data, or statistics to merge")
    merged = functools.reduce(Statistics.merge, [*others, total])
    return dataclasses.replace(merged, warnings=_counted_twice([*others, total]))


def _counted_twice(parts: Sequence[Statistics]) -> tuple[str, ...]:
    seen = Counter(part.data for part in parts if part.batches)
    return tuple(
        f"{times} of the merged parts were measured on the same data: these count {times} times; merge each part once"
        for times in seen.values()
        if times > 1
    )


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
    device: str = "cpu",
    skip_unprofitable: Mapping[str, int] | None = None,
    progress: Report | None = None,
) -> Result:
    """Quantizes a model and compares the result with the original before it lets go of it.

    Args:
        model: path of a float ONNX model, or the model itself (it is not changed).
        data: calibration batches, see `qonnx.data.batches`; a single large one is cut into parts. One batch in four is
            held back, up to four, or more when they are small; the first half of these serves to choose on, the other
            to judge by. Formats that measure no activation beforehand take None, too: then nothing is compared,
            weights are rounded to nearest, and biases stay. They are judged by all that was held back, and by the first
            eight batches, or more when they are small, where nothing was learned from them.
        output: where the quantized model goes. Nothing is written when anything fails.
        recipe: the name of a built-in recipe, a YAML file, or a `Recipe`.
        target: the consumer of the graph, see `qonnx.targets`.
        settings: `key=value` changes to the recipe, such as `activations.calibrator.kind=average`.
        plan: use this plan instead of making one; the data then only serve the comparison, and where weights of it are
            rounded by GPTQ, their codes and all biases.
        statistics: what `calibrate` measured, as a file or a value; the data then serve the comparison, the bias
            correction and the choice of `auto`. They are those of the model without smoothing, which is left out.
        max_batches: use at most this many batches.
        device: where the float model runs while its tensors are measured: cpu or cuda. Results are compared on the CPU.
        skip_unprofitable: leaves layers in float that INT8 makes no faster on the target, by `qonnx.roofline`, when the
            model runs at these sizes of its dynamic dimensions: `{"batch": 8}`. The batch is 1 if not given.
        progress: called after every calibration batch.

    Raises:
        QonnxError: one of `qonnx.errors`, in one line.
    """
    consumer, on = find_target(target), _device(device)
    chosen = resolve(recipe if isinstance(recipe, Recipe) else load_recipe(recipe, settings), consumer)
    given = QuantPlan.load(plan) if isinstance(plan, str | os.PathLike) else plan
    output = Path(output)
    whole = _loaded(model)
    _check_output(model, whole, output)
    part = runnable(whole)
    alone, unmeasured = ((), ()) if part is whole else left_alone(whole)
    model = model if part is whole else part
    calibrated = chosen.format.calibrated if given is None else given.format.calibrated
    if data is None and given is None and calibrated:
        if statistics is not None:
            raise DataError(
                "statistics do not tell what the outputs lose: give data, too, for the choice of ranges, for the bias "
                "correction and for the comparison"
            )
        raise DataError(f"recipe {chosen.name} needs calibration data; give some, or take one that needs none: {_FREE}")
    if statistics is not None and not calibrated:
        raise DataError(f"format {chosen.format} measures activations when the model runs, or none: omit statistics")
    if given is not None and skip_unprofitable is not None:
        raise RecipeError("skip_unprofitable: a plan decides already which layers stay in float; leave out one of them")
    if given is not None and given.target != consumer.name:
        raise TargetError(f"the plan was made for {given.target}, not for {consumer.name}: make it again, or use that")
    clock = _Clock()
    with staging(output) as folder:
        prepared, notes, mark = _prepared(model, minimum_opset(chosen))
        clock.lap("prepare")
        held = HoldOut(() if data is None else _stream(prepared, data, max_batches))
        leave = {} if skip_unprofitable is None else _unprofitable(prepared, chosen, consumer, skip_unprofitable)
        stream = iter(held)
        rounds = _rounds_by_data(chosen) if given is None else asks_for_data(given)
        learns = calibrated or rounds or (corrects_stored_weights(chosen) if given is None else bool(given.biases))
        sample = _first(stream, everything=rounds and not calibrated)
        lost = unmatched(prepared.graph, chosen) if given is None else ()
        if given is not None:
            smooth = Smoothed(apply(prepared, given.smoothing), given.smoothing)
        elif statistics is not None:
            smooth = _unsmoothed(prepared, chosen)
        else:
            # The beginning of what is chosen on later: never judged by.
            known = _split(held, sample, calibrated=calibrated, learns=learns)[0]
            smooth = smoothed(prepared, chosen, consumer, sample, known or sample[:1])
        clock.lap("smooth")
        draft = place(smooth.model, chosen, consumer)
        if statistics is not None:
            measured = _fitting(statistics, candidates(draft), mark)
        elif given is None and calibrated:
            needed = any(not isinstance(calibrator, EXTREMES) for calibrator in calibrators(chosen))
            counted = [value for value in candidates(draft) if needed and value not in draft.probabilities]
            expected = expected_rows(data, input_specs(prepared), max_batches)
            total = None if expected is None else HoldOut.passes(expected)
            every = itertools.chain(sample, stream)
            measured = observe(
                smooth.model,
                candidates(draft),
                every,
                distributions=counted,
                channel_axes=_channel_axes(smooth.model, chosen, draft),
                device=on,
                total=total,
                progress=progress,
            )
        deque(stream, maxlen=0)  # what was not read yet may hold batches to keep back
        seen = _seen(held, measured if statistics is not None and given is None else None) if learns else ""
        clock.lap("calibrate")
        file = folder / output.name
        chosen_on, judged = _split(held, sample, calibrated=calibrated, learns=learns)
        digest = "" if data is None else held.digest
        job = Job(
            model,
            smooth.model,
            chosen,
            consumer,
            sample,
            chosen_on,
            digest,
            file,
            smooth.plans,
            leave,
            smooth.probabilities,
            None if part is whole else whole,
        )
        if given is not None:
            attempt = given_attempt(job, without_left_layers(given, smooth.model.graph, chosen, consumer))
        else:
            attempt = best_attempt(job, measured) if calibrated else only_attempt(job)
        comparison = compare(model, file, judged) if judged else NOTHING_COMPARED
        usual = _by_default(model, file, judged, comparison) if judged and consumer.integer_operators else ()
        diagnostics = Diagnostics()
        if given is None and calibrated:
            calibrator, symmetric = chosen.activations.calibrator, consumer.symmetric
            diagnostics = diagnose(smooth.model, attempt.plan, measured, held.kept, calibrator, symmetric=symmetric)
        clock.lap("plan and write")
        publish(folder, output.parent)
    return Result(
        output=str(output),
        plan=attempt.plan,
        comparison=comparison,
        held_out=0 if seen else len(judged),
        float_bytes=parameters(prepared)[1],
        quantized_bytes=attempt.bytes,
        lookup_bytes=lookup_bytes(prepared, attempt.plan),
        seconds=clock.laps,
        notes=(*alone, *notes, *smooth.notes, *attempt.notes, *loading(comparison), *usual),
        warnings=(
            *unmeasured,
            *lost,
            *warnings_of(attempt, comparison, held, chosen, calibrated, (smooth.warning, seen)),
        ),
        costs=attempt.costs,
        diagnostics=diagnostics,
        smoothing=smooth.reports,
    )


def _by_default(model: ModelSource, file: Path, judged: list[Batch], comparison: Comparison) -> tuple[str, ...]:
    """What the file computes for someone who sets no option, where that is something else."""
    try:
        return by_default(comparison, compare(model, file, judged, default_options=True))
    except QonnxError as error:
        return by_default(comparison, error)


def _unprofitable(model: ir.Model, recipe: Recipe, consumer: Target, sizes: Mapping[str, int]) -> dict[str, str]:
    """The layers that INT8 makes no faster at these sizes, each with the reason."""
    if consumer.device is None:
        raise TargetError(f"skip_unprofitable: nothing is known of how fast {consumer.name} is; leave it out")
    if recipe.format is not Format.QDQ:
        raise RecipeError(f"skip_unprofitable: weighs layers on INT8, not format {recipe.format}; leave it out")
    return unprofitable(roofline(model, consumer.device, dims=sizes))


def _split(held: HoldOut, sample: list[Batch], *, calibrated: bool, learns: bool) -> tuple[list[Batch], list[Batch]]:
    """The batches to choose on and those to judge by; all are left where nothing was learned from any."""
    if not calibrated:
        return [], held.kept if held.shared or learns else sample + held.kept
    half = max(1, len(held.kept) // 2)
    return held.kept[:half], held.kept[half:] or held.kept


def _seen(held: HoldOut, given: Statistics | None) -> str:
    """Why the batches to judge by are none that calibration did not see, or ""."""
    if held.shared:
        return "only one batch was given: the comparison uses the batch that calibration saw"
    if given is not None and given.data == held.digest:
        return "the statistics are of the same data: the comparison uses batches that calibration saw; give others"
    return ""


def _channel_axes(model: ir.Model, recipe: Recipe, draft: Placement) -> dict[str, int]:
    """The axes along which channels are measured one by one, where the recipe gives each a scale."""
    if isinstance(recipe.activations.granularity, PerTensor):
        return {}
    return channel_axes(model.graph, candidates(draft))


def _device(name: str) -> Device:
    if name not in tuple(Device):
        raise TargetError(f"unknown device {name!r}; choose one of {', '.join(Device)}")
    return Device(name)


def _loaded(model: ModelSource) -> ir.Model:
    return model if isinstance(model, ir.Model) else load(model)


def _check_output(model: ModelSource, loaded: ir.Model, output: Path) -> None:
    """Refuses to write over the float model or over the file that holds its weights."""
    if output.is_dir():
        return  # `staging` refuses it
    sources = set() if isinstance(model, ir.Model) else {Path(model).resolve()}
    for graph in all_graphs(loaded):
        for value in graph.initializers.values() if isinstance(graph, ir.Graph) else ():
            if isinstance(value.const_value, ir.ExternalTensor):
                sources.add(Path(value.const_value.path).resolve())
    for path in (output, output.with_name(output.name + ".data")):
        if path.resolve() in sources:
            raise OutputError(f"{path}: would overwrite the float model; choose another name")


def _fitting(source: StatisticsSource, values: Sequence[str], mark: str) -> Statistics:
    """Statistics that were measured on the model with this fingerprint, of all of these values."""
    statistics = source if isinstance(source, Statistics) else Statistics.load(source)
    what = "the statistics" if isinstance(source, Statistics) else f"{os.fspath(source)}: the statistics"
    if statistics.model and statistics.model != mark:
        raise DataError(f"{what} were measured on another model, or with other weights; calibrate again")
    missing = [value for value in values if value not in statistics.tensors]
    if missing:
        raise DataError(
            f"{what} do not hold {missing[0]!r} ({len(missing)} tensors are missing): they were measured on "
            "another model or for another target, or the recipe wants more tensors than most do: calibrate with it"
        )
    return statistics


def _stream(prepared: ir.Model, data: Any, max_batches: int | None) -> Iterator[Batch]:
    inputs = input_specs(prepared)
    return spread(batches(data, inputs, max_batches=max_batches), inputs)


def _rounds_by_data(recipe: Recipe) -> bool:
    """Whether codes of weights are chosen by what their layers read."""
    return Rounding.GPTQ in (recipe.weights.rounding, *(rule.weights.rounding for rule in recipe.rules))


def _first(stream: Iterator[Batch], *, everything: bool = False) -> list[Batch]:
    """The first few batches, or as many as may be kept, for the steps that need to see some of the data again."""
    first: list[Batch] = []
    size = 0
    for batch in stream:
        first.append(batch)
        size += sum(array.nbytes for array in batch.values())
        enough = len(first) >= _SAMPLE_BATCHES and sum(map(rows, first)) >= _SAMPLES
        if (enough and not everything) or size >= _SAMPLE_BYTES:
            break
    return first


def _unsmoothed(prepared: ir.Model, recipe: Recipe) -> Smoothed:
    """The model as it is, for statistics that were measured on it."""
    methods = [each for each in (recipe.smooth, recipe.equalize) if not isinstance(each, NoSmoothing | NoEqualization)]
    if not all(isinstance(method, AUTOMATIC) for method in methods):
        raise RecipeError(
            "the statistics are those of the model without smoothing, and the recipe smooths: leave out the "
            "statistics, or set smooth.kind=none and equalize.kind=none"
        )
    note = "not smoothed: statistics of the model without smoothing were given"
    return Smoothed(prepared, notes=(note,) if methods else ())


def _prepared(model: ModelSource, minimum_opset: int = 13) -> tuple[ir.Model, tuple[str, ...], str]:
    """The model in normal form, what was changed, and the fingerprint of what it was before."""
    if isinstance(model, ir.Model):
        check_graph(model, model.graph.name or "model")
    prepared = model.clone() if isinstance(model, ir.Model) else load(model)
    check_operators(prepared)
    mark = fingerprint(prepared)
    nodes = [node for graph in all_graphs(prepared) for node in graph]
    found = next((node for node in nodes if node.op_type in _QUANTIZED_OPERATORS), None)
    if found is not None:
        raise ModelError(
            f"the model holds {found.op_type}: quantized already; give the float model that it was made from"
        )
    notes = prepare(prepared, minimum_opset=minimum_opset)
    values = [value for node in prepared.graph for value in (*node.inputs, *node.outputs) if value is not None]
    # Scales in float16 came with opset 19; per-channel scales with 13.
    if any(value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) for value in values):
        notes += prepare(prepared, minimum_opset=19)
    return prepared, notes, mark


class _Clock:
    """Wall time per stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = round(now - self._start, 3)
        self._start = now
