"""Every format on every real network: task metric, SQNR, layers quantized, size.

    python -m benchmarks.formats [residual] [minilm] [mobilenet] [ocr] [detector] [crepe] [silero] [smollm2]

Each row is what one recipe gives for one target when it is given nothing else. SQNR is measured on batches that no row
was made from, the same for all, and the metric on the test data of the task. Integer operators are written from the
plan that Q/DQ were written from: only the format differs. SmolLM2 is measured by name only, in weight-only formats.

The two recipes for BERT follow NVIDIA FasterTransformer's layouts, whose guide gives for BERT-base on SQuAD, EM / F1:
float 82.63 / 89.53, mode 1 81.92 / 89.09, mode 2 80.36 / 88.09, both without retraining.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

import qonnx
from benchmarks.accuracy import float_file
from models.common import Evaluation
from qonnx.errors import QonnxError
from qonnx.plan import QuantPlan
from qonnx.recipe import Format
from qonnx.runtime import session

MODELS = ("residual", "minilm", "mobilenet", "ocr", "detector", "crepe", "silero")


class Row(NamedTuple):
    """A recipe for a target, with settings."""

    target: str
    recipe: str
    settings: tuple[str, ...] = ()


_NEAREST = ("weights.rounding=nearest",)
_STATIC = (Row("a800", "int8"), Row("ort-cpu", "int8"), Row("ort-cpu", "int8-qoperator"))
_AT_RUN_TIME = (Row("ort-cpu", "int8-dynamic"), Row("ort-cpu", "int8-per-token"))
_WEIGHTS = (
    Row("ort-cpu", "w8"),
    Row("ort-cpu", "w8", ("correct_biases=false",)),
    Row("ort-cpu", "w4-block32"),
    Row("a800", "w4"),
)
_ROUNDING = (Row("ort-cpu", "w4-block32", _NEAREST), Row("a800", "w4", _NEAREST))
_BERT = (Row("a800", "bert-int8-mode1"), Row("a800", "bert-int8-mode2"))
ROWS: Mapping[str, Sequence[Row]] = {
    "minilm": (*_STATIC, *_BERT, *_AT_RUN_TIME, *_WEIGHTS, *_ROUNDING),
    "smollm2": (Row("ort-cpu", "w8"), Row("ort-cpu", "w4"), Row("ort-cpu", "w4", _NEAREST)),
}
USUAL = (*_STATIC, *_AT_RUN_TIME, *_WEIGHTS)
BATCHES = {"smollm2": 24}
TEST_BATCHES = 4


def measure(name: str, console: Console) -> None:
    """Prints the table of one network."""
    model = importlib.import_module(f"models.{name}")
    table = Table("target", "recipe", "metric", "change", "SQNR dB", "layers", "size", "seconds", title=name)
    with tempfile.TemporaryDirectory() as folder:
        source = float_file(name, model, Path(folder))
        reference = model.evaluate(session(source).run)
        table.add_row("", "float", f"{_metric(reference)} ± {reference.standard_error:.2f}")
        batches = BATCHES.get(name, 12)
        everything = list(itertools.islice(model.calibration(batches=batches + TEST_BATCHES), batches + TEST_BATCHES))
        data, test = everything[:batches], everything[batches:]
        reasons: list[str] = []
        for row, cells, plan in _rows(name, model, source, reference, data, test):
            settings = f" {' '.join(row.settings)}" if row.settings else ""
            table.add_row(row.target, row.recipe + settings, *cells)
            print(name, row.target, row.recipe + settings, *cells, file=sys.stderr, flush=True)  # it takes minutes
            if plan is not None and not plan.quantized_layers:
                reasons.append(f"{row.target} {row.recipe}, all in float: {plan.layers[0].reason}")
    console.print(table, *reasons, sep="\n")


def _rows(
    name: str,
    model: ModuleType,
    source: Path,
    reference: Evaluation,
    data: Sequence[Mapping[str, Any]],
    test: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[Row, tuple[str, ...], QuantPlan | None]]:
    plans: dict[str, QuantPlan] = {}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "quantized.onnx"
        for row in ROWS.get(name, USUAL):
            target, recipe, settings = row
            start, given = time.perf_counter(), None
            if recipe == "int8-qoperator" and target in plans:
                given = msgspec.structs.replace(plans[target], format=Format.QOPERATOR)
            try:
                result = qonnx.quantize(
                    source, data, output, recipe=recipe, target=target, settings=settings, plan=given
                )
            except QonnxError as error:
                yield row, (f"{type(error).__name__}: {error}",), None
                continue
            if recipe == "int8":
                plans[target] = result.plan
            seconds = time.perf_counter() - start
            found = model.evaluate(session(output).run)
            yield (
                row,
                (
                    _metric(found),
                    f"{found.value - reference.value:+.2f}",
                    ", ".join(f"{entry.sqnr_db:.1f}" for entry in qonnx.compare(source, output, test).outputs),
                    f"{len(result.plan.quantized_layers)} of {len(result.plan.layers)}",
                    f"{result.quantized_bytes / max(result.float_bytes, 1):.0%}",
                    f"{seconds:.0f}",
                ),
                result.plan,
            )


def _metric(found: Evaluation) -> str:
    return f"{found.value:.2f} {found.unit}".strip()


if __name__ == "__main__":
    for chosen in sys.argv[1:] or MODELS:
        measure(chosen, Console(highlight=False, width=130))
