"""The `qonnx` command: parses arguments, calls the library, prints what it returns. Errors: one line, exit code 2."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Annotated

import typer

from qonnx.cli import engines, graphs, quantization
from qonnx.errors import QonnxError

app = typer.Typer(
    help="Turns a PyTorch or ONNX model into a quantized ONNX graph that TensorRT and ONNX Runtime run in INT8.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Runs the command line. Exit code 0: done; 2: an error, in one line on standard error; 130: stopped."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # not under nohup
            signal.signal(number, signal.default_int_handler)  # clean up, as on Ctrl-C
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # of what it warns of our own errors tell
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


# In the order of the help.
for command in (
    quantization.export,
    quantization.calibrate,
    quantization.quantize,
    quantization.compare,
    engines.engine,
    engines.bench,
    engines.roofline,
    graphs.lint,
    graphs.inspect,
    graphs.recipes,
    graphs.view,
):
    app.command()(command)
