"""From a graph to a GPU: engine, bench, roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qonnx.cli.shared import (
    Data,
    Json,
    MaxBatches,
    Model,
    Quantized,
    TargetName,
    check_distinct,
    dims_of,
    show,
    sizes_of,
    to_json,
    writing,
)
from qonnx.progress import working


def engine(
    model: Quantized,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The engine to write.", show_default=False)
    ],
    target: TargetName = "a800",
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The compiler: tensorrt-rtx needs no GPU, tensorrt builds on the GPU of the target.  [default: "
            "tensorrt where it and that GPU are, else tensorrt-rtx]",
        ),
    ] = None,
    dim: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=MIN,USUAL,MAX",
            help="Sizes of a dynamic dimension, such as sequence=1,128,256, or ids.1=1,128,256 for one without a name; "
            "may be repeated. The batch is 1,8,32 if not given.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Batches to take sizes from, and to calibrate on.", show_default=False),
    ] = None,
    float_type: Annotated[
        str, typer.Option("--float", metavar="TYPE", help="What is not on INT8 computes in fp32, fp16 or bf16.")
    ] = "fp32",
    workspace: Annotated[
        int | None, typer.Option(metavar="MIB", help="GPU memory that a kernel may use for itself.")
    ] = None,
    level: Annotated[int | None, typer.Option(metavar="N", help="How long to search for kernels, 0 to 5.")] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Kernel times to use again, and to add to.")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Later versions of TensorRT can load the engine.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="All GPUs from Ampere on can load the engine.")
    ] = False,
    refit: Annotated[bool, typer.Option("--refit", help="Weights of the engine can be replaced.")] = False,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Weights may stay in host memory.")
    ] = False,
    calibrator: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="For a graph without Q/DQ, TensorRT up to 10: calibrate on --data by entropy-2, minmax, entropy or "
            "legacy.",
        ),
    ] = None,
    calibration_cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For such a graph: ranges from `qonnx calibrate --cache`.")
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Give up after this long.")] = 600,
    layers: Annotated[bool, typer.Option("--layers", help="List all layers, and the kernels of the engine.")] = False,
    json: Json = None,
) -> None:
    """Build a TensorRT engine, and show what runs on INT8.

    TensorRT for RTX builds without a GPU: pip install 'qonnx-pipeline[rtx]'.
    """
    from qonnx.engine import Settings, build_engine
    from qonnx.engine_tables import engine_tables

    check_distinct([path for path in (model, data, calibration_cache) if path is not None], output, json, timing_cache)
    settings = Settings(
        workspace_mib=workspace,
        level=level,
        timing_cache=None if timing_cache is None else str(timing_cache),
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        refit=refit,
        weight_streaming=weight_streaming,
    )
    with writing(json) as write_json, working("compiling") as say:
        report = build_engine(
            model,
            output,
            target=target,
            backend=backend,
            dims=dims_of(dim or ()),
            data=data,
            float_type=float_type,
            settings=settings,
            calibrator=calibrator,
            calibration_cache=calibration_cache,
            progress=lambda step: say(f"compiling: {step.phase}, {step.done} of {step.total}"),
            timeout=timeout,
        )
        write_json(report.to_json())
    show(engine_tables(report, layers))


def bench(
    model: Quantized,
    data: Data,
    float_model: Annotated[
        Path | None,
        typer.Option("--reference", metavar="MODEL.onnx", help="The float model, to compare with.", show_default=False),
    ] = None,
    target: TargetName = "a800",
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="The compiler, see `qonnx engine`.")] = None,
    dim: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MIN,USUAL,MAX", help="Sizes that the engine accepts; from the data if not given."),
    ] = None,
    float_type: Annotated[
        str, typer.Option("--float", metavar="TYPE", help="What is not on INT8 computes in fp32, fp16 or bf16.")
    ] = "fp16",
    runs: Annotated[int, typer.Option(metavar="N", min=1, help="How often the first batch is run.")] = 200,
    json: Json = None,
    max_batches: MaxBatches = 8,
) -> None:
    """Measure an engine on the GPU of this machine.

    The first batch is timed, and the outputs of all are compared with ONNX Runtime's. Without a GPU: `qonnx roofline`.
    """
    from qonnx.engine.bench import bench as run
    from qonnx.engine_tables import bench_tables

    check_distinct([path for path in (model, data, float_model) if path is not None], json)
    with writing(json) as write_json, working("building and running"):
        report = run(
            model,
            data,
            float_model=float_model,
            target=target,
            backend=backend,
            dims=dims_of(dim or ()),
            float_type=float_type,
            runs=runs,
            max_batches=max_batches or 8,
        )
        write_json(to_json(report))
    show(bench_tables(report))


def roofline(
    model: Model,
    device: Annotated[str, typer.Option(metavar="NAME|FILE", help="A device such as a800, or a YAML file.")] = "a800",
    dim: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SIZE", help="Size of a dynamic dimension, such as batch=8; the batch is 1 if not given."
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Predict what this plan gains.", show_default=False)
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer.")] = False,
    json: Json = None,
) -> None:
    """Predict the least time a model needs on a GPU."""
    from qonnx.engine_tables import roofline_tables
    from qonnx.roofline import roofline as run
    from qonnx.roofline import unprofitable

    check_distinct([path for path in (model, plan) if path is not None], json)
    with writing(json) as write_json, working("predicting"):
        result = run(model, device, dims=sizes_of(dim or ()), plan=plan)
        write_json(to_json(result))
    show(roofline_tables(result, unprofitable(result), layers))
