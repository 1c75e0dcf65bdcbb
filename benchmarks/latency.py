"""INT8 on ONNX Runtime's CPU kernels: files of this tool beside those of its own `quantize_static`, `quantize_dynamic`.

    python -m benchmarks.latency [minilm] [mobilenet] [--threads 1] [--repeats 30]

All files are made from the same float model and the same calibration batches, and run in one process in turn, so that
what else the machine does hits all of them; the fastest of many runs counts. Sessions for latency have ONNX Runtime's
default options but for the threads: the option that keeps sums exact on CPUs without VNNI costs time, and users who
have VNNI need none. SQNR is measured with that option, on batches that no tool has seen.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

import qonnx
from benchmarks.accuracy import float_file
from qonnx.plan import QuantPlan
from qonnx.recipe import Format, Operators

Feeds = Mapping[str, npt.NDArray[Any]]

MODELS = ("minilm", "mobilenet")
CALIBRATION, TEST = slice(0, 8), slice(8, 12)
WARM_UP = 3


class _Reader:
    """Batches in the form that ONNX Runtime's quantizer reads."""

    def __init__(self, batches: Sequence[Feeds]) -> None:
        self._batches: Iterator[Feeds] = iter(batches)

    def get_next(self) -> Feeds | None:
        """The next batch."""
        return next(self._batches, None)


def onnxruntime_static(source: Path, output: Path, batches: Sequence[Feeds]) -> None:
    """What its documentation recommends: preprocessing, then Q/DQ, UINT8 activations, INT8 weights per channel."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    prepared = _preprocessed(source, output)
    quantize_static(
        prepared,
        output,
        _Reader(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def onnxruntime_dynamic(source: Path, output: Path, batches: Sequence[Feeds]) -> None:
    """Its other recommendation, for transformers."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(_preprocessed(source, output), output, per_channel=True, weight_type=QuantType.QInt8)


def _preprocessed(source: Path, output: Path) -> Path:
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    whole, prepared = output.with_suffix(".whole.onnx"), output.with_suffix(".prepared.onnx")
    onnx.save(onnx.load(source), whole)  # it does not find weights beside the file
    quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True)
    return prepared


def ours(recipe: str) -> Callable[[Path, Path, Sequence[Feeds]], None]:
    """A recipe of this tool."""

    def make(source: Path, output: Path, batches: Sequence[Feeds]) -> None:
        result = qonnx.quantize(source, list(batches), output, recipe=recipe, target="ort-cpu")
        result.plan.save(output.with_name(f"{recipe}.json"))

    return make


def integer_operators(operators: Operators) -> Callable[[Path, Path, Sequence[Feeds]], None]:
    """The plan of `int8`, written as integer operators."""

    def make(source: Path, output: Path, batches: Sequence[Feeds]) -> None:
        plan = QuantPlan.load(output.with_name("int8.json"))
        plan = msgspec.structs.replace(plan, format=Format.QOPERATOR, operators=operators)
        qonnx.quantize(source, list(batches), output, plan=plan, target="ort-cpu")

    return make


ROWS: dict[str, Callable[[Path, Path, Sequence[Feeds]], None]] = {
    "onnxruntime quantize_static": onnxruntime_static,
    "onnxruntime quantize_dynamic": onnxruntime_dynamic,
    "qonnx int8": ours("int8"),
    "qonnx int8-qoperator": integer_operators(Operators.ONNX),
    "... operators=microsoft": integer_operators(Operators.MICROSOFT),
    "qonnx int8-dynamic": ours("int8-dynamic"),
    "qonnx int8-per-token": ours("int8-per-token"),
    "qonnx w8": ours("w8"),
    "qonnx w4-nbits": ours("w4-nbits"),
}


def fastest(files: Sequence[Path], feeds: Feeds, threads: int, repeats: int) -> list[float]:
    """Seconds of the fastest run of each file, in turn."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    runners = [ort.InferenceSession(str(file), options) for file in files]
    best = [float("inf")] * len(files)
    for repeat in range(repeats + WARM_UP):
        for index, runner in enumerate(runners):
            start = time.perf_counter()
            runner.run(None, dict(feeds))
            if repeat >= WARM_UP:
                best[index] = min(best[index], time.perf_counter() - start)
    return best


def measure(name: str, console: Console, threads: int, repeats: int) -> None:
    """Prints the table of one model."""
    model = importlib.import_module(f"models.{name}")
    with tempfile.TemporaryDirectory() as folder:
        source = float_file(name, model, Path(folder))
        everything = list(model.calibration(batches=TEST.stop))
        made = {"float": source}
        failed = {}
        for number, (row, make) in enumerate(ROWS.items()):
            file = Path(folder) / f"{number}.onnx"
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    make(source, file, everything[CALIBRATION])
                made[row] = file
            except Exception as error:  # a tool that fails is a row, too
                failed[row] = f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"
        one = {key: array[:1] for key, array in everything[TEST][0].items()}
        seconds = dict(zip(made, fastest(list(made.values()), one, threads, repeats), strict=True))
        peer = seconds.get("onnxruntime quantize_static", np.nan)
        sizes = ", ".join(f"{key} {'x'.join(map(str, array.shape))}" for key, array in one.items())
        table = Table("file", "ms", "times quantize_static", "MB", "SQNR dB", title=f"{name}: {sizes}")
        for row, file in made.items():
            ratios = "" if row == "float" else _sqnr(source, file, everything[TEST])
            size = sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*") if part.is_file()) / 1e6
            table.add_row(row, f"{1e3 * seconds[row]:.2f}", f"{seconds[row] / peer:.2f}", f"{size:.1f}", ratios)
        for row, complaint in failed.items():
            table.add_row(row, "", "", "", complaint)
        console.print(table)


def _sqnr(source: Path, file: Path, batches: Sequence[Feeds]) -> str:
    outputs = qonnx.compare(source, file, list(batches)).outputs
    return ", ".join(f"{output.sqnr_db:.1f}" for output in outputs)


def main() -> None:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    for name in given.models or MODELS:
        measure(name, Console(highlight=False, width=120), given.threads, given.repeats)


if __name__ == "__main__":
    main()
