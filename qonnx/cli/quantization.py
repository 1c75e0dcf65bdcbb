"""From a float model to a quantized one: export, calibrate, quantize, compare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qonnx.cli.shared import (
    DATA_OPTION,
    Data,
    DeviceName,
    Json,
    MaxBatches,
    Model,
    Quantized,
    TargetName,
    check_distinct,
    show,
    sizes_of,
    suggest,
    to_json,
    writing,
)
from qonnx.errors import DataError, EngineError, RecipeError
from qonnx.progress import calibrating, working


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="PACKAGE.MODULE:FACTORY, a function that returns (module, example inputs) or (module, example inputs, "
            "dynamic shapes); or the directory of a Hugging Face model.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The model to write (.onnx).", show_default=False)
    ],
    opset: Annotated[int, typer.Option(metavar="N", help="The ONNX operator set, 18 to 25.")] = 21,
    verify: Annotated[bool, typer.Option(help="Compare the model with torch before it is written.")] = True,
) -> None:
    """Export a PyTorch model to ONNX, and check it against torch.

    The result is compared with torch on the example inputs and, where there are dynamic dimensions, in a second size.
    """
    from qonnx.exporter import export_from

    with writing(output), working("exporting"):
        path = export_from(source, output, opset=opset, verify=verify)
    typer.echo(f"wrote {path}" if verify else f"wrote {path}, not compared with torch")


def calibrate(
    model: Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The statistics to write (.npz).", show_default=False)
    ],
    data: Annotated[Path | None, DATA_OPTION] = None,
    target: TargetName = "a800",
    recipe: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="A recipe that wants more tensors than others, such as residuals.")
    ] = "int8",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the same command was stopped, by Ctrl-C for example.")
    ] = False,
    merge: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Add what was measured over other data; may be repeated."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write ranges as a calibration cache, for TensorRT up to 10 without QDQ."
        ),
    ] = None,
    tensorrt_version: Annotated[
        str, typer.Option(metavar="X.Y.Z", help="The TensorRT that will read the cache; others ignore it.")
    ] = "10.16.1",
    calibrator: Annotated[
        str, typer.Option(metavar="KIND", help="Of the cache: minmax, average, ema, percentile, entropy or mse.")
    ] = "entropy",
    max_batches: MaxBatches = None,
    device: DeviceName = "cpu",
) -> None:
    """Measure the tensors of a model over calibration data.

    When stopped, it keeps what was measured.
    """
    from qonnx.calibrators import Auto
    from qonnx.engine.calibration_cache import dumps, magnitudes, version_number
    from qonnx.observation import Interrupted
    from qonnx.pipeline import calibrate as run
    from qonnx.recipe import load_recipe
    from qonnx.text import count

    version_number(tensorrt_version)
    chosen = load_recipe("int8", [f"activations.calibrator.kind={calibrator}"]).activations.calibrator
    if isinstance(chosen, Auto):
        raise RecipeError("--calibrator auto: chooses by running layers; name one calibrator for the cache")
    partial = output.parent / f"{output.stem}.partial.npz"
    if data is None and (resume or not merge):
        raise DataError("--data is missing: give a folder of .npz files")
    if resume and not partial.is_file():
        raise DataError(f"{partial}: no such file, so nothing was stopped here; leave out --resume")
    if data is not None and not resume and partial.is_file():
        raise DataError(f"{partial}: kept from a run that was stopped; go on with --resume, or delete it to start anew")
    check_distinct([path for path in (model, data, *(merge or ())) if path is not None], output, cache, partial)
    with writing(output), writing(cache) as write_cache:
        try:
            with calibrating() as progress:
                statistics = run(
                    model,
                    data,
                    target=target,
                    recipe=recipe,
                    max_batches=max_batches,
                    device=device,
                    resume=partial if resume else None,
                    merge=merge or (),
                    progress=progress,
                )
        except Interrupted as stopped:
            if not stopped.statistics.batches:
                raise
            stopped.statistics.save(partial)
            batches = count(stopped.statistics.batches, "batch")
            typer.echo(f"stopped after {batches}, kept in {partial}: the same command with --resume goes on", err=True)
            sys.exit(130)
        text = dumps(magnitudes(statistics, chosen), tensorrt_version) if cache else ""
        statistics.save(output)
        write_cache(text)
    if resume:
        partial.unlink(missing_ok=True)
    tensors, batches = count(len(statistics.tensors), "tensor"), count(statistics.batches, "batch")
    typer.echo(f"wrote {output}: {tensors} over {batches}")
    for warning in statistics.warnings:
        typer.echo(f"warning: {warning}")
    if cache:
        typer.echo(f"wrote {cache}: ranges by {calibrator}, for TensorRT {tensorrt_version}")


def quantize(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="The quantized model to write (.onnx).", show_default=False
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of .npz files, one batch each: an array per input of the model, under the input's name. "
            "Recipes that measure nothing beforehand (`qonnx recipes`) need none; with it, all but int8-dynamic gain.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="A built-in recipe (`qonnx recipes`) or a YAML file.  [default: int8]"),
    ] = None,
    target: TargetName = "a800",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting of the recipe, such as activations.calibrator.kind=minmax; may be repeated.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Follow this plan instead of making one; the data then only judge it."),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What `qonnx calibrate` measured, instead of measuring again."),
    ] = None,
    save_plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the plan, which lists every decision, as JSON.")
    ] = None,
    skip_unprofitable: Annotated[
        bool,
        typer.Option(
            "--skip-unprofitable", help="Leave layers in float that INT8 makes no faster, see `qonnx roofline`."
        ),
    ] = False,
    dim: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SIZE", help="For that: size of a dynamic dimension, such as batch=8; or the batch is 1."
        ),
    ] = None,
    json: Json = None,
    max_batches: MaxBatches = None,
    device: DeviceName = "cpu",
) -> None:
    """Quantize a model, and compare it with the original.

    Some of the batches are held back from calibration, and the two models are compared on these. Layers that cost too
    much accuracy stay in float.
    """
    from qonnx.pipeline import quantize as run
    from qonnx.tables import result_tables
    from qonnx.targets import target as find_target

    if plan is not None and (recipe is not None or set_):
        raise RecipeError(f"plan {plan}: decides what a recipe would; leave out --recipe and --set")
    if dim and not skip_unprofitable:
        raise RecipeError(f"--dim {dim[0]}: only serves --skip-unprofitable; leave it out, or add that")
    read = [path for path in (model, data, plan, statistics) if path is not None]
    check_distinct(read, output, save_plan, json)
    with (
        writing(save_plan) as write_plan,
        writing(json) as write_json,
        calibrating(then="planning and comparing") as progress,
    ):
        result = run(
            model,
            data,
            output,
            recipe=recipe or "int8",
            target=target,
            settings=set_ or (),
            plan=plan,
            statistics=statistics,
            max_batches=max_batches,
            device=device,
            skip_unprofitable=sizes_of(dim or ()) if skip_unprofitable else None,
            progress=progress,
        )
        write_plan(result.plan.to_json())
        write_json(to_json(result))
    show(result_tables(result))
    if result.warnings and result.plan.quantized_layers:
        suggest("compare", model, output, "--data", data or "FOLDER", "--layers")
    elif not result.warnings and find_target(target).compute_capability:
        suggest("engine", output, "-o", output.with_suffix(".plan"), "--target", target, *_sizes(output, data))


def _sizes(model: Path, data: Path | None) -> tuple[str | Path, ...]:
    """The option that gives an engine the sizes of dynamic dimensions; none where it needs no sizes."""
    from qonnx.engine.profiles import profiles_of
    from qonnx.graph import load

    try:
        profiles_of(load(model))
    except EngineError:  # a dimension other than the batch is dynamic
        return "--data", data or "FOLDER"
    return ()


def compare(
    reference: Model,
    candidate: Quantized,
    data: Data,
    layers: Annotated[bool, typer.Option("--layers", help="Also compare the result of every layer.")] = False,
    json: Json = None,
    max_batches: MaxBatches = None,
) -> None:
    """Measure how far a quantized model is from the original.

    For every output, over all batches: signal-to-quantization-noise ratio (SQNR, 20 dB is an error of 10 % of the
    signal, 40 dB of 1 %), cosine similarity and the largest absolute error.
    """
    from qonnx.comparison import compare as run
    from qonnx.graph import load
    from qonnx.tables import comparison_tables

    for model in (reference, candidate):
        load(model)  # says what is wrong with a damaged file better than ONNX Runtime does
    check_distinct([reference, candidate, data], json)
    with writing(json) as write_json, working("comparing"):
        comparison = run(reference, candidate, data, layers=layers, max_batches=max_batches)
        write_json(to_json(comparison))
    show(comparison_tables(comparison))
