"""Every format on every real network: task metric, SQNR, layers quantized, size.

    python -m benchmarks.formats [residual] [minilm] [mobilenet] [ocr] [detector] [crepe] [silero]

Each row is what one recipe gives for one target when it is given nothing else. SQNR is measured on batches that no
choice was made on, the metric on the test data of the task.

The two recipes for BERT follow NVIDIA FasterTransformer's layouts, whose guide gives for BERT-base on SQuAD, EM / F1:
float 82.63 / 89.53, mode 1 81.92 / 89.09, mode 2 80.36 / 88.09, both without retraining.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import qonnx
from benchmarks.accuracy import float_file
from qonnx.errors import QonnxError
from qonnx.runtime import session

MODELS = ("residual", "minilm", "mobilenet", "ocr", "detector", "crepe", "silero")
ROWS = (
    ("a800", "int8"),
    ("ort-cpu", "int8"),
    ("ort-cpu", "int8-qoperator"),
    ("ort-cpu", "int8-dynamic"),
    ("ort-cpu", "int8-per-token"),
    ("ort-cpu", "w8"),
    ("ort-cpu", "w4-block32"),
    ("a800", "w4-block32"),
)
ENCODER_ROWS = (("a800", "bert-int8-mode1"), ("a800", "bert-int8-mode2"))
BATCHES = 12


def measure(name: str, console: Console) -> None:
    """Prints the table of one network."""
    model = importlib.import_module(f"models.{name}")
    table = Table("target", "recipe", "metric", "change", "SQNR dB", "layers", "size", "seconds", title=name)
    with tempfile.TemporaryDirectory() as folder:
        source, output = float_file(name, model, Path(folder)), Path(folder) / "quantized.onnx"
        reference = model.evaluate(session(source).run)
        unit = reference.unit
        table.add_row("", "float", f"{reference.value:.2f} {unit} ± {reference.standard_error:.2f}")
        data = list(itertools.islice(model.calibration(batches=BATCHES), BATCHES))
        for target, recipe in (*ROWS, *(ENCODER_ROWS if name == "minilm" else ())):
            start = time.perf_counter()
            try:
                result = qonnx.quantize(source, data, output, recipe=recipe, target=target)
            except QonnxError as error:
                table.add_row(target, recipe, f"{type(error).__name__}: {error}")
                continue
            seconds = time.perf_counter() - start
            value = model.evaluate(session(output).run).value
            table.add_row(
                target,
                recipe,
                f"{value:.2f} {unit}",
                f"{value - reference.value:+.2f}",
                ", ".join(f"{entry.sqnr_db:.1f}" for entry in result.comparison.outputs),
                f"{len(result.plan.quantized_layers)} of {len(result.plan.layers)}",
                f"{result.quantized_bytes / max(result.float_bytes, 1):.0%}",
                f"{seconds:.0f}",
            )
    console.print(table)


if __name__ == "__main__":
    for chosen in sys.argv[1:] or MODELS:
        measure(chosen, Console(highlight=False, width=130))
