"""The `qonnx` command: parses arguments, calls the library, prints what it returns. Errors: one line, exit code 2."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qonnx.errors import DataError, EngineError, OutputError, QonnxError, RecipeError
from qonnx.progress import calibrating, working

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

app = typer.Typer(
    help="Turns a PyTorch or ONNX model into a quantized ONNX graph that TensorRT and ONNX Runtime run in INT8.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The float model.", show_default=False)]
Quantized = Annotated[Path, typer.Argument(metavar="QUANTIZED.onnx", help="The quantized model.", show_default=False)]
_DATA = typer.Option(
    "--data",
    metavar="FOLDER",
    help="Folder of .npz files, one batch each: an array per input of the model, under the input's name. "
    "Or a single .npz file.",
    show_default=False,
)
Data = Annotated[Path, _DATA]
MaxBatches = Annotated[
    int | None, typer.Option("--max-batches", metavar="N", min=1, help="Use the first N batches at most.")
]
TargetName = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="NAME",
        help="What will run the graph: ort-cpu for ONNX Runtime; for TensorRT a800, a100, h100, h800, h200, h20, l40s, "
        "l20, l4, t4, rtx3090, rtx4090 or orin; onnx for any other.",
    ),
]
DeviceName = Annotated[
    str, typer.Option("--device", metavar="NAME", help="Where the float model runs while it is measured: cpu or cuda.")
]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the whole result as JSON.")]


def main() -> None:
    """Runs the command line. Exit code 0: done; 2: an error, in one line on standard error; 130: stopped."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # not under nohup
            signal.signal(number, signal.default_int_handler)  # clean up, as on Ctrl-C
    try:
        # Without arguments: the help.
        code = app(sys.argv[1:] or ["--help"], prog_name="qonnx", standalone_mode=False) or 0
    except QonnxError as error:
        code = _failed(str(error))
    except typer.TyperException as error:
        code = _failed(f"{error.format_message().rstrip('.')}; `qonnx COMMAND --help` lists what it takes")
    except MemoryError:
        code = _failed("out of memory; make the batches smaller")
    except OSError as error:
        code = _failed(f"{error.filename or 'input or output'}: {error.strerror or error}")
    if code == 130:
        typer.echo("stopped", err=True)
    sys.exit(code)


def _failed(message: str) -> int:
    typer.echo(f"error: {' '.join(message.splitlines())}", err=True)
    return 2


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"qonnx {version('qonnx-pipeline')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Takes what stands before the command."""


@app.command()
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

    with _writing(output), working("exporting"):
        path = export_from(source, output, opset=opset, verify=verify)
    typer.echo(f"wrote {path}" if verify else f"wrote {path}, not compared with torch")


@app.command()
def calibrate(
    model: Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The statistics to write (.npz).", show_default=False)
    ],
    data: Annotated[Path | None, _DATA] = None,
    target: TargetName = "a800",
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
    from qonnx.tables import count

    version_number(tensorrt_version)
    chosen = load_recipe("int8", [f"activations.calibrator.kind={calibrator}"]).activations.calibrator
    if isinstance(chosen, Auto):
        raise RecipeError("--calibrator auto: chooses by running layers; name one calibrator for the cache")
    partial = output.parent / f"{output.stem}.partial.npz"
    if data is None and (resume or not merge):
        raise DataError("--data is missing: give a folder of .npz files")
    if resume and not partial.is_file():
        raise DataError(f"{partial}: no such file, so nothing was stopped here; leave out --resume")
    _check_distinct([path for path in (model, data, *(merge or ())) if path is not None], output, cache, partial)
    with _writing(output), _writing(cache) as write_cache:
        try:
            with calibrating() as progress:
                statistics = run(
                    model,
                    data,
                    target=target,
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


@app.command()
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
            "Recipes that measure nothing beforehand (`qonnx recipes`) need none; it then only serves the comparison.",
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
    _check_distinct(read, output, save_plan, json)
    with (
        _writing(save_plan) as write_plan,
        _writing(json) as write_json,
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
            skip_unprofitable=_sizes(dim or ()) if skip_unprofitable else None,
            progress=progress,
        )
        write_plan(result.plan.to_json())
        write_json(_json(result))
    _print(result_tables(result))
    if result.warnings and result.plan.quantized_layers:
        _next("compare", model, output, "--data", data or "FOLDER", "--layers")
    elif not result.warnings and find_target(target).compute_capability:
        _next("engine", output, "-o", output.with_suffix(".plan"), "--target", target)


@app.command()
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
    _check_distinct([reference, candidate, data], json)
    with _writing(json) as write_json, working("comparing"):
        comparison = run(reference, candidate, data, layers=layers, max_batches=max_batches)
        write_json(_json(comparison))
    _print(comparison_tables(comparison))


@app.command()
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
            help="Sizes of a dynamic dimension, such as sequence=1,128,256; may be repeated. "
            "The batch is 1,8,32 if not given.",
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
    from qonnx.tables import engine_tables

    _check_distinct([path for path in (model, data, calibration_cache) if path is not None], output, json, timing_cache)
    settings = Settings(
        workspace_mib=workspace,
        level=level,
        timing_cache=None if timing_cache is None else str(timing_cache),
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        refit=refit,
        weight_streaming=weight_streaming,
    )
    with _writing(json) as write_json, working("compiling") as say:
        report = build_engine(
            model,
            output,
            target=target,
            backend=backend,
            dims=_dims(dim or ()),
            data=data,
            float_type=float_type,
            settings=settings,
            calibrator=calibrator,
            calibration_cache=calibration_cache,
            progress=lambda step: say(f"compiling: {step.phase}, {step.done} of {step.total}"),
            timeout=timeout,
        )
        write_json(report.to_json())
    _print(engine_tables(report, layers))


@app.command()
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
    from qonnx.tables import bench_tables

    _check_distinct([path for path in (model, data, float_model) if path is not None], json)
    with _writing(json) as write_json, working("building and running"):
        report = run(
            model,
            data,
            float_model=float_model,
            target=target,
            backend=backend,
            dims=_dims(dim or ()),
            float_type=float_type,
            runs=runs,
            max_batches=max_batches or 8,
        )
        write_json(_json(report))
    _print(bench_tables(report))


@app.command()
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
    from qonnx.roofline import roofline as run
    from qonnx.roofline import unprofitable
    from qonnx.tables import roofline_tables

    _check_distinct([path for path in (model, plan) if path is not None], json)
    with _writing(json) as write_json, working("predicting"):
        result = run(model, device, dims=_sizes(dim or ()), plan=plan)
        write_json(_json(result))
    _print(roofline_tables(result, unprofitable(result), layers))


@app.command()
def lint(
    model: Annotated[Path, typer.Argument(metavar="QUANTIZED.onnx", help="A quantized graph of any tool.")],
    target: TargetName = "a800",
    fix: Annotated[bool, typer.Option("--fix", help="Repair what can be repaired, and write it to --output.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="With --fix: only repairs that change no result.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where --fix writes the repaired model.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print findings and repairs as JSON.")] = False,
) -> None:
    """Find what TensorRT refuses or runs in float.

    Exit code 1 when errors are left.
    """
    from qonnx import linter
    from qonnx.errors import OutputError
    from qonnx.graph import save
    from qonnx.linter.table import findings_table, fixes_table

    if fix != (output is not None):
        raise OutputError("--fix and --output belong together: qonnx lint MODEL.onnx --fix -o FIXED.onnx")
    fixed = linter.fix(model, target=target, exact_only=exact) if fix else None
    findings = linter.lint(model, target=target) if fixed is None else fixed.findings
    if fixed is not None and output is not None:
        save(fixed.model, output)
    if json:
        import msgspec

        report = {"findings": findings, "fixes": () if fixed is None else fixed.fixes}
        typer.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        from rich.console import Console

        console = Console(highlight=False)
        if fixed is not None and fixed.fixes:
            console.print(fixes_table(fixed.fixes))
        console.print(findings_table(findings))
    if any(finding.severity is linter.Severity.ERROR for finding in findings):
        raise typer.Exit(1)


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="A float or quantized graph of any tool.")],
    target: TargetName = "a800",
    layers: Annotated[bool, typer.Option("--layers", help="Show each layer in a row of its own.")] = False,
    plan: Annotated[
        Path | None, typer.Option("--save-plan", metavar="PLAN.json", help="Write the plan that the Q/DQ nodes follow.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a graph holds, and how each layer is quantized."""
    from qonnx import inspector
    from qonnx.graph import load
    from qonnx.inspector.table import inspection_tables

    loaded = load(model)
    found = inspector.inspect(loaded, target=target)
    if plan is not None:
        inspector.read_back(loaded, target=target).plan.save(plan)
    if json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    from rich.console import Console

    console = Console(highlight=False)
    for part in inspection_tables(found, layers):
        console.print(part)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Only this one.", show_default=False)] = None,
) -> None:
    """Show the built-in recipes as YAML, to start your own from.

    For example `qonnx recipes int8 > mine.yaml`, then `qonnx quantize --recipe mine.yaml`.
    """
    from qonnx.recipe import RECIPES, load_recipe, to_yaml

    chosen = RECIPES if name is None else (load_recipe(name),)
    typer.echo("---\n".join(to_yaml(recipe) for recipe in chosen), nl=False)


@app.command()
def view(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="Any ONNX model.", show_default=False)],
) -> None:
    """Show a graph in the browser, with Netron."""
    from qonnx.errors import DependencyError
    from qonnx.graph import load

    load(model)
    try:
        import netron
    except ImportError as error:
        raise DependencyError("viewing needs Netron: pip install 'qonnx-pipeline[view]'") from error
    netron.start(str(model))
    netron.wait()


def _check_distinct(inputs: Iterable[Path], *outputs: Path | None) -> None:
    """Refuses to write over a file that is read, or two results into one file."""
    taken = {path.resolve() for path in inputs}
    for path in outputs:
        if path is not None and path.resolve() in taken:
            raise OutputError(f"{path}: would overwrite another file of this command; choose another name")
        if path is not None:
            taken.add(path.resolve())


@contextlib.contextmanager
def _writing(path: Path | None) -> Iterator[Callable[[str], None]]:
    """A function that writes a text file, whole or not at all; a path that cannot be written is refused right away."""
    from qonnx.graph import publish, staging

    if path is None:
        yield lambda text: None
        return
    with staging(path) as folder:

        def write(text: str) -> None:
            (folder / path.name).write_text(text, encoding="utf-8")
            publish(folder, path.parent)

        yield write


def _json(result: object) -> str:
    """A result as JSON; figures that are infinite or not a number become null."""
    import msgspec

    return msgspec.json.encode(result).decode()


def _sizes(options: Iterable[str]) -> dict[str, int]:
    sizes = {}
    for option in options:
        name, _, size = option.rpartition("=")
        if not name or not size.isdecimal():
            raise DataError(f"--dim {option}: give NAME=SIZE, such as batch=8")
        sizes[name] = int(size)
    return sizes


def _dims(options: Iterable[str]) -> dict[str, tuple[int, int, int]]:
    dims = {}
    for option in options:
        name, _, sizes = option.partition("=")
        try:
            smallest, usual, largest = map(int, sizes.split(","))
        except ValueError:
            raise EngineError(f"--dim {option}: give NAME=MIN,USUAL,MAX, such as sequence=1,128,256") from None
        dims[name] = (smallest, usual, largest)
    return dims


def _print(lines: Iterable[Text]) -> None:
    """To a terminal with words wrapped, into a pipe line by line; names and figures stay whole in both."""
    from rich.console import Console

    console = Console(highlight=False)
    for line in lines:
        if line.no_wrap or not console.is_terminal:
            console.print(line, soft_wrap=True)
        else:
            console.print(*_wrapped(line, console), sep="\n")


def _wrapped(line: Text, console: Console) -> Iterator[Text]:
    """Broken between words, the following lines further in than the first."""
    from rich.text import Text

    text = line.plain.lstrip()
    indent = " " * (len(line.plain) - len(text))
    for number, part in enumerate(Text(text, line.style).wrap(console, max(console.width - len(indent) - 2, 20))):
        yield Text(indent + ("  " if number else ""), line.style).append_text(part)


def _next(*words: str | Path) -> None:
    """The command that comes next, ready to be copied."""
    typer.echo(f"\nnext: {shlex.join(['qonnx', *map(str, words)])}")
