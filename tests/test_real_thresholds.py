"""Thresholds on activations of networks with real weights: those that all raw values give, within half a percent."""

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qonnx
from qonnx.calibrators import MSE, Entropy, Percentile
from qonnx.calibrators.entropy import histogram, threshold_bin
from qonnx.graph import load
from qonnx.numerics import Dtype, PerTensor, fake_quantize
from qonnx.observation import observe
from qonnx.passes.prepare import prepare
from qonnx.placement import candidates, place
from qonnx.recipe import Recipe
from qonnx.runtime import session, with_outputs
from qonnx.targets import target

Floats = np.ndarray[Any, np.dtype[np.float32]]


def float_file(model: Any, folder: Path) -> Path:
    if hasattr(model, "onnx_file"):
        return Path(model.onnx_file())
    example = model.build()
    return qonnx.export(
        example.module, example.args, folder / "model.onnx", dynamic_shapes=example.dynamic_shapes, verify=False
    )


def squares(x: Floats, reach: float) -> float:
    """The squared error of the INT8 grid that ends at `reach`."""
    scale = np.float32(reach / 127)
    error = x - fake_quantize(x, scale, np.int8(0), Dtype.INT8, PerTensor())
    return float(np.square(error, dtype=np.float64).sum())


@pytest.mark.models
@pytest.mark.parametrize("name", ["mobilenet", "minilm", "ocr"])
def test_thresholds_are_those_of_all_raw_values(name: str, tmp_path: Path) -> None:
    model = importlib.import_module(f"models.{name}")
    graph = load(float_file(model, tmp_path))
    prepare(graph)
    placement = place(graph, Recipe(), target("a800"))
    inputs = {value.name for value in graph.graph.inputs}
    values = [v for v in candidates(placement) if v not in placement.probabilities and v not in inputs]
    chosen = values[:: len(values) // 5]
    batches = list(model.calibration(batches=2, batch_size=4))

    runner = session(with_outputs(graph, chosen))
    results = [runner.run(batch, chosen) for batch in batches]
    statistics = observe(graph, chosen, batches, distributions=chosen)
    for value in chosen:
        x = np.concatenate([result[value].reshape(-1) for result in results])
        magnitudes, observed = np.abs(x), statistics.tensors[value]
        maximum = float(magnitudes.max())
        assert (observed.count, observed.minimum, observed.maximum) == (x.size, x.min(), x.max())

        for percentile in (99.9, 99.99, 99.999):
            rank = math.ceil(round(percentile / 100 * x.size, 6)) - 1
            reach = Percentile(percentile).range(observed, Dtype.INT8, symmetric=True)[1]
            np.testing.assert_allclose(reach, np.partition(magnitudes, rank)[rank], rtol=0.005)

        assert observed.sketch is not None
        width = histogram(observed.sketch, maximum)[1]
        counts = np.bincount(np.floor(magnitudes.astype(np.float64) / width).astype(np.int64))
        reach = Entropy().range(observed, Dtype.INT8, symmetric=True)[1]
        np.testing.assert_allclose(reach, min(width * threshold_bin(counts, 128), maximum), rtol=0.005)

        reach = MSE().range(observed, Dtype.INT8, symmetric=True)[1]
        others = [min(reach * factor, maximum) for factor in (0.9, 0.99, 0.995, 1.005, 1.01, 1.1)]
        assert squares(x, reach) <= 1.001 * min(squares(x, other) for other in others)
