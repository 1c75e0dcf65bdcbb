"""The one call: float model and data in, quantized model and an honest account of it out.

    load -> prepare -> observe -> plan -> insert -> check and compare on batches that were held back -> write

Nothing appears at the output path before the last step.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir

from qonnx.calibrate import Progress, observe
from qonnx.compare import Comparison, compare
from qonnx.data import HoldOut, batches
from qonnx.errors import ModelError, OutputError
from qonnx.graph import all_graphs, first_line, load, parameters, publish, save, staging
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.passes.prepare import prepare
from qonnx.placement import candidates, place
from qonnx.plan import QuantPlan, make_plan
from qonnx.recipe import Recipe, load_recipe, resolve
from qonnx.runtime import session
from qonnx.sensitivity import LayerCost, layer_costs
from qonnx.statistics import Statistics
from qonnx.targets import Target
from qonnx.targets import target as find_target

# Below this output signal-to-noise ratio task metrics usually start to suffer, so the result carries a warning.
ACCEPTABLE_SQNR_DB = 15.0

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
        unquantized_bytes: how many of the bytes after are weights that no layer multiplies by, such as embedding
            tables, and that stay in float for that reason.
        seconds: wall time per stage.
        notes: what preparation changed.
        warnings: what the user should know before using the file.
        costs: when the output suffers, what each quantized layer alone does to it, the worst first.
    """

    output: str
    plan: QuantPlan
    comparison: Comparison
    held_out: int
    float_bytes: int
    quantized_bytes: int
    unquantized_bytes: int
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
    stream = batches(data, session(prepared).inputs, max_batches=max_batches)
    values = candidates(place(prepared, Recipe(), find_target(target)))
    return observe(prepared, values, stream, progress=progress)


def quantize(
    model: ModelSource,
    data: Any,
    output: str | os.PathLike[str],
    *,
    recipe: str | os.PathLike[str] | Recipe = "int8",
    target: str = "a800",
    settings: Sequence[str] = (),
    plan: str | os.PathLike[str] | QuantPlan | None = None,
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
        with_held_out = HoldOut(batches(data, session(prepared).inputs, max_batches=max_batches))
        values = candidates(place(prepared, chosen, consumer))
        statistics = observe(prepared, values, with_held_out, progress=progress)
        clock.lap("calibrate")
        decided = given or make_plan(prepared, statistics, chosen, consumer)
        quantized = prepared.clone()
        InsertQDQ(decided)(quantized)
        _stamp(quantized, chosen, consumer, with_held_out.digest)
        _check_opset(quantized)
        file = folder / output.name
        save(quantized, file)
        _check_valid(file)
        clock.lap("plan and insert")
        comparison = compare(model, file, with_held_out.kept)
        clock.lap("compare")
        warnings, suffers = _warnings(decided, comparison, with_held_out, statistics)
        costs = layer_costs(prepared, decided, with_held_out.kept[0]) if suffers else ()
        clock.lap("find costly layers")
        publish(folder, output.parent)
    return Result(
        output=str(output),
        plan=decided,
        comparison=comparison,
        held_out=0 if with_held_out.shared else len(with_held_out.kept),
        float_bytes=parameters(prepared)[1],
        quantized_bytes=parameters(quantized)[1],
        unquantized_bytes=_unquantized_bytes(quantized, decided),
        seconds=clock.laps,
        notes=notes,
        warnings=warnings,
        costs=costs,
    )


def _prepared(model: ModelSource) -> tuple[ir.Model, tuple[str, ...]]:
    prepared = model.clone() if isinstance(model, ir.Model) else load(model)
    if any("QuantizeLinear" in node.op_type for graph in all_graphs(prepared) for node in graph):
        raise ModelError("the model is quantized already; give the float model that it was made from")
    dtypes = {value.dtype for value in prepared.graph.initializers.values()}
    # Scales in float16 came with opset 19; per-channel scales with 13.
    half = bool(dtypes & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
    return prepared, prepare(prepared, minimum_opset=19 if half else 13)


def _check_opset(model: ir.Model) -> None:
    opset = model.opset_imports.get("", 0)
    if opset < 13:
        raise ModelError(f"the model stays at opset {opset}, per-channel scales need 13: export it at a higher opset")


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


def _warnings(
    plan: QuantPlan, comparison: Comparison, held_out: HoldOut, statistics: Statistics
) -> tuple[tuple[str, ...], bool]:
    """What to say loudly, and whether the output suffers so much that the layers to blame should be searched."""
    warnings = []
    suffers = False
    if not plan.quantized_layers:
        warnings.append("no layer was quantized: the file computes what the float model computes")
    for output in comparison.outputs:
        if output.nonfinite > output.nonfinite_reference:
            warnings.append(f"output {output.name} has {output.nonfinite} values that are not finite")
            suffers = True
        elif output.sqnr_db < ACCEPTABLE_SQNR_DB:
            warnings.append(
                f"output {output.name} keeps only {output.sqnr_db:.1f} dB of signal over quantization noise "
                f"(below {ACCEPTABLE_SQNR_DB:.0f} dB accuracy usually drops)"
            )
            suffers = True
    if held_out.shared:
        warnings.append("only one batch was given: the comparison uses the batch that calibration saw")
    return tuple(warnings), suffers


def _unquantized_bytes(model: ir.Model, plan: QuantPlan) -> int:
    """Bytes of float weights that no quantizable layer multiplies by: embedding tables, mostly."""
    readers = {layer.node for layer in plan.layers}
    total = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        looked_up = any(usage.node.op_type == "Gather" for usage in value.uses())
        if tensor is not None and looked_up and not any(usage.node.name in readers for usage in value.uses()):
            total += int(tensor.nbytes)
    return total


class _Clock:
    """Wall time per stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = round(now - self._start, 3)
        self._start = now


__all__ = ["ACCEPTABLE_SQNR_DB", "Result", "calibrate", "quantize"]
