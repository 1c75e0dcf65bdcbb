"""Moments of what layers read, against NumPy."""

from typing import Any

import numpy as np
import pytest

from qonnx.hessians import hessians, inputs_of
from qonnx.linear import linears
from tests.graphs import model_of

# What is read, and the axis that is summed over.
READ = {
    "MatMul": ("g (float[n,3,5] x, float[5,4] w) => (float[n,3,4] y) { y = MatMul(x, w) }", (2, 3, 5), 2),
    "weight first": ("g (float[n,5,3] x, float[4,5] w) => (float[n,4,3] y) { y = MatMul(w, x) }", (2, 5, 3), 1),
    "Gemm": ("g (float[n,5] x, float[5,4] w) => (float[n,4] y) { y = Gemm(x, w) }", (6, 5), 1),
    "Gemm, transA": ("g (float[5,n] x, float[5,4] w) => (float[n,4] y) { y = Gemm <transA=1> (x, w) }", (5, 6), 0),
    "Conv": ("g (float[n,5,2,3] x, float[4,5,1,1] w) => (float[n,4,2,3] y) { y = Conv(x, w) }", (2, 5, 2, 3), 1),
    "float16": ("g (float16[n,5] x, float16[5,4] w) => (float16[n,4] y) { y = MatMul(x, w) }", (6, 5), 1),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("mean", [3, 1000])
def test_moments_are_those_of_all_batches(name: str, opset: int, mean: int) -> None:
    text, shape, axis = READ[name]
    model = model_of(text, weights="w", opset=opset)
    layer = next(linears(model.graph))
    kind = np.float16 if name == "float16" else np.float32
    rng = np.random.default_rng(0)
    batches: list[dict[str, Any]] = [{"x": (mean + rng.standard_normal(shape)).astype(kind)} for _ in range(3)]
    x = np.concatenate([np.moveaxis(batch["x"].astype(np.float64), axis, -1).reshape(-1, 5) for batch in batches])
    found = hessians(model, [inputs_of(layer)], batches)[inputs_of(layer)]
    assert found.rows == len(x)
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.scatter, len(x) * np.cov(x.T, bias=True), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.hessian, x.T @ x, rtol=1e-5)
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_batches_without_rows_count_for_nothing() -> None:
    model = model_of(READ["Gemm"][0], weights="w")
    wanted = inputs_of(next(linears(model.graph)))
    x = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    found = hessians(model, [wanted], [{"x": x[:0]}, {"x": x}, {"x": x[:0]}])[wanted]
    np.testing.assert_allclose(found.hessian, x.T @ x, rtol=1e-5, atol=1e-5)
    assert hessians(model, [wanted], [{"x": x[:0]}]) == {}
