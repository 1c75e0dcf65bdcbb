"""What each calibrator makes of each model: task metric and SQNR in static symmetric INT8, every layer on integers.

    python -m benchmarks.accuracy [minilm] [mobilenet] [ocr]

One pass over the calibration data serves the rows of calibrators. No layer is left in float to rescue the result: they
show the calibrators and nothing else. Two rows are for weights with one scale, as they are and with channels that are
equally wide. Then comes what `qonnx quantize` does when it is given no option at all, and last what is possible on the
CPU, which takes unsigned activations with zero points, where more is asked for: a goal of 24 dB, and weights rounded by
GPTQ. There layers are left in float where the goal is not reached; how many run on integers stands beside.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table

import qonnx
from qonnx.runtime import session
from qonnx.statistics import Statistics

MODELS = ("mobilenet", "minilm", "ocr")
BATCHES = 16

# SQNR is measured on batches that neither calibration nor the choice of `auto` saw.
TEST_BATCHES = slice(BATCHES, BATCHES + 8)

ROWS = {
    "minmax": ["activations.calibrator.kind=minmax", "correct_biases=false"],
    "minmax, biases corrected": ["activations.calibrator.kind=minmax"],
    "average": ["activations.calibrator.kind=average"],
    "ema": ["activations.calibrator.kind=ema"],
    "percentile 99.99": ["activations.calibrator={kind: percentile, percentile: 99.99}"],
    "percentile 99.999": ["activations.calibrator={kind: percentile, percentile: 99.999}"],
    "entropy": ["activations.calibrator.kind=entropy"],
    "mse": ["activations.calibrator.kind=mse"],
    "auto": ["activations.calibrator.kind=auto"],
}
# These observe again: equalization changes what there is to observe.
ONE_SCALE = ["weights.granularity.kind=per_tensor", "smooth.kind=none"]
WEIGHT_ROWS = {
    "one scale per weight": [*ONE_SCALE, "equalize.kind=none"],
    "one scale per weight, equalized": [*ONE_SCALE, "equalize.kind=always"],
}
HIGH_GOAL = ["goal_sqnr_db=24", "weights.rounding=gptq"]
EVERY_LAYER = ["goal_sqnr_db=0", "minimum_sqnr_db=-100"]


def float_file(name: str, model: ModuleType, folder: Path) -> Path:
    """The float model as an ONNX file."""
    if hasattr(model, "onnx_file"):
        return Path(model.onnx_file())
    example = model.build()
    return qonnx.export(example.module, example.args, folder / f"{name}.onnx", dynamic_shapes=example.dynamic_shapes)


def columns(name: str) -> Iterator[tuple[str, ...]]:
    """Of one model, for the float model and then for every row: the metric, its change, and the SQNR of each output."""
    model = importlib.import_module(f"models.{name}")
    with tempfile.TemporaryDirectory() as folder:
        source, output = float_file(name, model, Path(folder)), Path(folder) / "quantized.onnx"
        reference = model.evaluate(session(source).run)
        yield f"{reference.value:.2f} %", f"± {reference.standard_error:.2f}", ""
        everything = list(model.calibration(batches=TEST_BATCHES.stop))
        data, test = everything[:BATCHES], everything[TEST_BATCHES]
        statistics = qonnx.calibrate(source, data)
        runs: list[tuple[list[str], Statistics | None, str]]
        runs = [([*EVERY_LAYER, *settings], statistics, "a800") for settings in ROWS.values()]
        # Equalized and smoothed, it is measured after that.
        runs += [([*EVERY_LAYER, *settings], None, "a800") for settings in WEIGHT_ROWS.values()]
        for settings, measured, target in (*runs, ([], None, "a800"), (HIGH_GOAL, None, "ort-cpu")):
            plan = qonnx.quantize(source, data, output, settings=settings, statistics=measured, target=target).plan
            value = model.evaluate(session(output).run).value
            ratios = [entry.sqnr_db for entry in qonnx.compare(source, output, test).outputs]
            layers = f" ({len(plan.quantized_layers)} of {len(plan.layers)})" if settings == HIGH_GOAL else ""
            found = ", ".join(f"{ratio:.1f}" for ratio in ratios)
            yield f"{value:.2f} %", f"{value - reference.value:+.2f}", found + layers


def main(names: Sequence[str]) -> None:
    rows = ["float", *ROWS, *WEIGHT_ROWS, "no option given", "goal 24 dB, CPU"]
    cells: list[tuple[str, ...]] = [() for _ in rows]
    table = Table("calibrator")
    for name in names:
        for heading in (name, "change", "SQNR dB"):
            table.add_column(heading)
        for index, found in enumerate(columns(name)):
            cells[index] += found
            print(name, rows[index], *found, file=sys.stderr, flush=True)  # it takes minutes: say what is known
    for row, found in zip(rows, cells, strict=True):
        table.add_row(row, *found)
    Console(highlight=False, width=40 + 35 * len(names)).print(table)


if __name__ == "__main__":
    main(sys.argv[1:] or MODELS)
