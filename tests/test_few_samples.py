"""Samples are joined where that changes nothing, and stay apart where it would."""

from pathlib import Path

import numpy as np
import pytest

import qonnx
from qonnx.few_samples import few_samples
from tests.graphs import model_of

LINEAR = "g (float[n,4] x, float[4,4] w) => (float[n,4] y) { y = MatMul(x, w) }"
TOKENS = "g (float[n,t,4] x, float[4,4] w) => (float[n,t,4] y) { y = MatMul(x, w) }"
FIXED = "g (float[2,4] x, float[4,4] w) => (float[2,4] y) { y = MatMul(x, w) }"
NODES = "g (float[n,4] x, int64[2,e] i) => (float[?,4] y) <int64 k = {0}> { f = Gather(i, k) y = Gather(x, f) }"
MEAN = "g (float[n,4] x) => (float[n,4] y) { m = ReduceMean<keepdims = 1>(x) y = Sub(x, m) }"
GROUPED = "g (float[n,4] x) => (float[?,2,4] y) <int64[3] s = {1, 2, 4}> { y = Reshape(x, s) }"


def batches(*shapes: tuple[int, ...], edges: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    made = [{"x": rng.standard_normal(shape).astype(np.float32)} for shape in shapes]
    return [{**batch, "i": np.zeros((2, edges), np.int64)} for batch in made] if edges else made


@pytest.mark.parametrize(
    ("text", "given", "count", "sizes"),
    [
        pytest.param(LINEAR, batches((2, 4), (3, 4), (4, 4)), 16, [9], id="all"),
        pytest.param(LINEAR, batches((2, 4), (3, 4), (4, 4)), 6, [6], id="no more than asked for"),
        pytest.param(TOKENS, batches((2, 3, 4), (2, 3, 4), (2, 5, 4), (2, 3, 4)), 7, [4, 2, 1], id="lengths differ"),
        pytest.param(FIXED, batches(*[(2, 4)] * 9), 12, [2] * 6, id="the batch is fixed"),
        pytest.param(FIXED, batches(*[(2, 4)] * 9), 2, [2] * 4, id="four at least"),
        pytest.param(NODES, batches(*[(5, 4)] * 6, edges=3), 8, [5] * 4, id="nodes of a graph"),
        pytest.param(MEAN, batches(*[(2, 4)] * 6), 8, [2] * 4, id="samples influence each other"),
        pytest.param(GROUPED, batches(*[(2, 4)] * 6), 8, [2] * 4, id="does not run joined"),
    ],
)
def test_what_is_joined(text: str, given: list[dict[str, np.ndarray]], count: int, sizes: list[int]) -> None:
    found = few_samples(model_of(text, weights="w"), given, count)
    assert [len(batch["x"]) for batch in found] == sizes
    taken = np.concatenate([batch["x"].reshape(-1) for batch in found])
    np.testing.assert_array_equal(taken, np.concatenate([batch["x"].reshape(-1) for batch in given])[: taken.size])


def test_ranges_are_chosen_on_both_sides_of_a_branch(tmp_path: Path) -> None:
    """Joined, all samples would take one side, and nothing would tell that the other is cut off."""
    text = """g (float[n,32] x, float[32,64] w, float[64,32] v) => (float[n,32] y) <float zero = {0}> {
        h = MatMul(x, w) m = ReduceMean<keepdims = 0>(x) c = Greater(m, zero)
        b = If (c) <then_branch = a () => (float[n,64] p) { p = Relu(h) },
                    else_branch = o () => (float[n,64] q) { q = Tanh(h) }>
        y = MatMul(b, v) }"""
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((8, 32)).astype(np.float32)} for _ in range(12)]
    result = qonnx.quantize(model_of(text, weights="w v"), data, tmp_path / "q.onnx")
    assert result.comparison.outputs[0].sqnr_db > 28
