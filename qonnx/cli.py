"""The `qonnx` command: parses arguments, calls the library, prints what it returns. Errors: one line, exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qonnx.errors import QonnxError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qonnx.calibrate import Progress

app = typer.Typer(
    help="Turns a PyTorch or ONNX model into a quantized ONNX graph that TensorRT and ONNX Runtime run in INT8.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The float model.")]
Data = Annotated[
    Path, typer.Option("--data", help="Folder of .npz files, one batch each, keys named like the model's inputs.")
]
MaxBatches = Annotated[int | None, typer.Option("--max-batches", min=1, help="Use at most this many batches.")]
TargetName = Annotated[str, typer.Option("--target", help="Who will run the graph: a800 or ort-cpu.")]


def main() -> None:
    """Runs the command line. Exit code 0: done; 2: an error, in one line on standard error."""
    try:
        app()
    except QonnxError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(130)


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="PACKAGE.MODULE:FACTORY | HF_DIRECTORY")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The ONNX file to write.")],
    opset: Annotated[int, typer.Option(help="18 to 25.")] = 21,
) -> None:
    """Exports a torch module, checks it against torch on two shapes, and writes ONNX."""
    from qonnx.exporter import export_from

    path = export_from(source, output, opset=opset)
    typer.echo(f"wrote {path}")


@app.command()
def calibrate(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", help="The statistics file to write (.npz).")],
    target: TargetName = "a800",
    max_batches: MaxBatches = None,
) -> None:
    """Observes the tensors of a model over calibration data, in one pass."""
    from qonnx.pipeline import calibrate as run

    with _Progress() as progress:
        statistics = run(model, data, target=target, max_batches=max_batches, progress=progress)
    statistics.save(output)
    typer.echo(f"wrote {output}: {len(statistics.tensors)} tensors over {statistics.batches} batches")


@app.command()
def quantize(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", help="The quantized model to write.")],
    recipe: Annotated[str, typer.Option(help="A built-in recipe (see `qonnx recipes`) or a YAML file.")] = "int8",
    target: TargetName = "a800",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting of the recipe.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Use this plan instead of making one.")] = None,
    save_plan: Annotated[Path | None, typer.Option(help="Write the plan as JSON.")] = None,
    max_batches: MaxBatches = None,
) -> None:
    """Quantizes a model, compares it with the original on held-back batches, and writes it."""
    from qonnx.pipeline import quantize as run
    from qonnx.tables import result_tables

    with _Progress() as progress:
        result = run(
            model,
            data,
            output,
            recipe=recipe,
            target=target,
            settings=set_ or (),
            plan=plan,
            max_batches=max_batches,
            progress=progress,
        )
    if save_plan is not None:
        result.plan.save(save_plan)
    _print(*result_tables(result))


@app.command()
def compare(
    reference: Model,
    candidate: Annotated[Path, typer.Argument(metavar="QUANTIZED.onnx", help="The quantized model.")],
    data: Data,
    layers: Annotated[bool, typer.Option("--layers", help="Also compare the result of every layer.")] = False,
    max_batches: MaxBatches = None,
) -> None:
    """Signal-to-quantization-noise ratio, cosine and largest error of every output."""
    from qonnx.comparison import compare as run
    from qonnx.tables import comparison_tables

    _print(*comparison_tables(run(reference, candidate, data, layers=layers, max_batches=max_batches)))


@app.command()
def engine(
    model: Annotated[Path, typer.Argument(metavar="QUANTIZED.onnx")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The engine to write.")],
    target: TargetName = "a800",
) -> None:
    """Builds a TensorRT engine for the target; tensorrt-rtx does so without a GPU."""
    from qonnx.engine import build_engine
    from qonnx.tables import engine_tables

    _print(*engine_tables(build_engine(model, output, target=target)))


@app.command()
def recipes() -> None:
    """Lists the built-in recipes as YAML to start from."""
    from qonnx.recipe import RECIPES, to_yaml

    typer.echo("\n".join(to_yaml(recipe) for recipe in RECIPES))


@app.command()
def view(model: Annotated[Path, typer.Argument(metavar="MODEL.onnx")]) -> None:
    """Shows a graph in Netron, in the browser."""
    from qonnx.errors import DependencyError
    from qonnx.graph import load

    load(model)
    try:
        import netron
    except ImportError as error:
        raise DependencyError("viewing needs Netron: pip install 'qonnx-pipeline[view]'") from error
    netron.start(str(model))
    netron.wait()


def _print(*parts: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for part in parts:
        console.print(part)


class _Progress:
    """A line on the terminal that says how far calibration is; nothing when the output is not a terminal."""

    def __enter__(self) -> Callable[[Progress], None]:
        from rich.console import Console
        from rich.status import Status

        self._status = Status("calibrating", console=Console(stderr=True))
        self._status.start()
        return self._show

    def _show(self, progress: Progress) -> None:
        self._status.update(f"calibrating: {progress.batches} batches, {progress.rate:.1f} samples/s")

    def __exit__(self, *exception: object) -> None:
        self._status.stop()
