"""The choice of a range per tensor, against the same computed by hand."""

import numpy as np
import pytest

from qonnx.auto_ranges import least_disturbing
from qonnx.numerics import Dtype
from qonnx.passes.prepare import prepare
from qonnx.placement import place
from qonnx.ranges import Range
from qonnx.recipe import load_recipe
from qonnx.resolve import resolve
from qonnx.targets import target
from tests.graphs import model_of

PLAIN = "g (float[n,32] x, float[32,32] w) => (float[n,32] y) { y = MatMul(x, w) }"
ENDS = np.geomspace(1.0, 4000.0, 25)


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("louder", [1.0, 30.0, 1000.0])
def test_the_least_error_with_no_token_louder_than_16_medians(louder: float, opset: int) -> None:
    model = model_of(PLAIN, weights="w", opset=opset)
    prepare(model)
    x = np.random.default_rng(0).standard_normal((128, 32)).astype(np.float32)
    x[0] *= louder
    (weight,) = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    y = x.astype(np.float64) @ weight.numpy()
    power = np.square(y).sum(axis=1)
    counts = np.minimum(1.0, 16 * np.median(power) / power)
    errors = []
    for end in ENDS:
        rounded = np.clip(np.round(x / (end / 127)), -128, 127) * (end / 127)
        errors.append((counts * np.square((rounded - x) @ weight.numpy()).sum(axis=1)).sum())
    recipe = resolve(load_recipe("int8"), target("a800"))
    candidates = [{"x": Range(-end, end, f"{end}")} for end in ENDS]
    found = least_disturbing(
        model,
        place(model, recipe, target("a800")),
        candidates,
        [{"x": x}],
        Dtype.INT8,
        symmetric=True,
        biases_corrected=True,  # the layer has none
    )
    assert found["x"].high == ENDS[np.argmin(errors)] < 100
