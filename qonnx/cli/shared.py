"""What commands share: arguments that mean the same everywhere, files written whole, lines on a terminal."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qonnx.errors import DataError, EngineError, OutputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Model = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The float model.", show_default=False)]
Quantized = Annotated[Path, typer.Argument(metavar="QUANTIZED.onnx", help="The quantized model.", show_default=False)]
DATA_OPTION = typer.Option(
    "--data",
    metavar="FOLDER",
    help="Folder of .npz files, one batch each: an array per input of the model, under the input's name. "
    "Or a single .npz file.",
    show_default=False,
)
Data = Annotated[Path, DATA_OPTION]
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


def check_distinct(inputs: Iterable[Path], *outputs: Path | None) -> None:
    """Refuses to write over a file that is read, or two results into one file."""
    taken = {path.resolve() for path in inputs}
    for path in outputs:
        if path is not None and path.resolve() in taken:
            raise OutputError(f"{path}: would overwrite another file of this command; choose another name")
        if path is not None:
            taken.add(path.resolve())


@contextlib.contextmanager
def writing(path: Path | None) -> Iterator[Callable[[str], None]]:
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


def to_json(result: object) -> str:
    """A result as JSON; figures that are infinite or not a number become null."""
    import msgspec

    return msgspec.json.encode(result).decode()


def sizes_of(options: Iterable[str]) -> dict[str, int]:
    """NAME=SIZE, read."""
    sizes = {}
    for option in options:
        name, _, size = option.rpartition("=")
        if not name or not size.isdecimal():
            raise DataError(f"--dim {option}: give NAME=SIZE, such as batch=8")
        sizes[name] = int(size)
    return sizes


def dims_of(options: Iterable[str]) -> dict[str, tuple[int, int, int]]:
    """NAME=MIN,USUAL,MAX, read."""
    dims = {}
    for option in options:
        name, _, sizes = option.partition("=")
        try:
            smallest, usual, largest = map(int, sizes.split(","))
        except ValueError:
            raise EngineError(f"--dim {option}: give NAME=MIN,USUAL,MAX, such as sequence=1,128,256") from None
        dims[name] = (smallest, usual, largest)
    return dims


def show(lines: Iterable[Text]) -> None:
    """To a terminal with words wrapped, into a pipe line by line; names and figures stay whole in both."""
    from rich.console import Console

    console = Console(highlight=False)
    for line in lines:
        if line.no_wrap or not console.is_terminal:
            console.print(line, soft_wrap=True)
        else:
            console.print(*_wrapped(line, console), sep="\n")


def _wrapped(line: Text, console: Console) -> Iterator[Text]:
    """Broken between words, the following lines further in than the first; where columns precede, under the last."""
    from rich.text import Text

    column = re.match(r"\S.{0,12}? {2,}| {6,}", line.plain)
    text = line.plain[column.end() :] if column else line.plain.lstrip()
    first = line.plain[: len(line.plain) - len(text)]
    indent = " " * (len(first) if column else len(first) + 2)
    for number, part in enumerate(Text(text, line.style).wrap(console, max(console.width - len(indent), 20))):
        yield Text(indent if number else first, line.style).append_text(part)


def suggest(*words: str | Path) -> None:
    """The command that comes next, ready to be copied."""
    typer.echo(f"\nnext: {shlex.join(['qonnx', *map(str, words)])}")
