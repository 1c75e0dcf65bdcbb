"""The whole way on a real model: fetch, export, quantize for the A800, compare, measure the task, compile for sm_80.

    python -m benchmarks.demo [minilm | mobilenet | residual]

Leaves model.onnx, quantized.onnx, plan.json and model.plan in out/<name>/.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

import qonnx
from qonnx.engine.listing import int8_nodes
from qonnx.errors import QonnxError
from qonnx.runtime import session
from qonnx.tables import result_tables

if TYPE_CHECKING:
    from qonnx.engine import EngineReport

MODELS = ("minilm", "mobilenet", "residual")

CALIBRATION_BATCHES = 16

# For dimensions that are not the batch: smallest, usual and largest size the engine is built for.
DIMS = {"sequence": (1, 128, 256)}


def main(name: str) -> None:
    start, console = time.perf_counter(), Console(highlight=False)
    model = importlib.import_module(f"models.{name}")
    folder = Path("out") / name
    folder.mkdir(parents=True, exist_ok=True)
    example = model.build()
    console.print(f"exporting {name} and checking it against torch ...")
    float_file = qonnx.export(
        example.module, example.args, folder / "model.onnx", dynamic_shapes=example.dynamic_shapes
    )
    console.print("quantizing ...")
    calibration = model.calibration(batches=CALIBRATION_BATCHES)
    result = qonnx.quantize(float_file, calibration, folder / "quantized.onnx", target="a800")
    result.plan.save(folder / "plan.json")
    console.print("measuring the task before and after ...")
    before = model.evaluate(session(float_file).run)
    after = model.evaluate(session(result.output).run)
    console.print("compiling for sm_80 ...")
    dims = {axis: DIMS[axis] for axes in example.dynamic_shapes.values() for axis in axes.values() if axis in DIMS}
    engine = qonnx.build_engine(result.output, folder / "model.plan", target="a800", dims=dims)
    for line in result_tables(result):
        console.print(line, soft_wrap=True)
    table = Table("", "float", "INT8", title=f"{name}: {before.metric} on {before.samples} test samples")
    table.add_row(before.metric, f"{before.value:.2f} % ± {before.standard_error:.2f}", f"{after.value:.2f} %")
    files = [sum(file.stat().st_size for file in folder.glob(stem)) for stem in ("model.onnx*", "quantized.onnx*")]
    table.add_row("file", f"{files[0] / 1e6:.1f} MB", f"{files[1] / 1e6:.1f} MB ({files[1] / files[0]:.0%})")
    table.add_row("layers on INT8 in the sm_80 engine", "", _int8_share(engine, result))
    console.print(table)
    console.print(
        f"in {folder}/: model.onnx, quantized.onnx, plan.json, model.plan ({time.perf_counter() - start:.0f} s)"
    )


def _int8_share(engine: EngineReport, result: qonnx.Result) -> str:
    layers = int8_nodes(engine.layers, [layer.node for layer in result.plan.quantized_layers])
    missing = [layer.node for layer in layers if not layer.int8]
    text = f"{len(layers) - len(missing)} of {len(layers)} planned"
    return text + (f"; in float: {', '.join(missing)}" if missing else "")


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else MODELS[0])
    except QonnxError as error:
        sys.exit(f"error: {error}")
