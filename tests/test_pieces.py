"""Batches that are calibrated a few samples at a time: where that changes nothing, and nowhere else."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir as ir
import pytest

import qonnx.pieces
from qonnx.observation import observe
from qonnx.pieces import samples_at_a_time
from qonnx.rebatch import Batch
from qonnx.runtime import Session, session, with_outputs
from qonnx.statistics import Statistics

APART = {
    "elements": "y = Relu(x)",
    "a linear layer": "y = MatMul(x, w)",
    "samples merged with another axis": "k = Constant <value_ints = [-1, 2]> () y = Reshape(x, k)",
}

TOGETHER = {
    "a mean over all samples": "m = ReduceMean <axes = [0], keepdims = 1> (x) y = Sub(x, m)",
    "samples behind another axis": "y = Transpose <perm = [1, 0]> (x)",
    "one row for all samples": "m = ReduceMax <axes = [0], keepdims = 1> (x) y = Neg(m)",
    "one number for all samples": "y = ReduceMax <keepdims = 0> (x)",
    "what came before": "a = Constant <value_int = 0> () y = CumSum(x, a)",
    "what comes after": "a = Constant <value_int = 0> () y = CumSum <reverse = 1> (x, a)",
}


def model_of(body: str, inputs: str = "float[n, 4] x") -> ir.Model:
    w = ", ".join(map(str, np.random.default_rng(1).standard_normal(12).round(3)))
    graph = f"g ({inputs}) => (float[a, b] y) <float[4, 3] w = {{{w}}}> {{ {body} }}"
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]> {graph}')
    if "ReduceMax <keepdims" in body:
        model.graph.outputs[0].shape = ir.Shape([])
    return model


def batch(samples: int = 8) -> Batch:
    return {"x": np.random.default_rng(0).standard_normal((samples, 4)).astype(np.float32)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if these activations were large: one to three samples are."""
    monkeypatch.setattr(qonnx.pieces, "_BYTES", 40)


def found(model: ir.Model, feeds: Batch) -> int | None:
    with ThreadPoolExecutor(2) as pool:
        return samples_at_a_time(session(with_outputs(model, ["y"])), feeds, ["y"], pool)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", APART)
def test_samples_that_are_independent_are_run_apart(name: str) -> None:
    count = found(model_of(APART[name]), batch())
    assert count is not None
    assert 1 <= count <= 3


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", TOGETHER)
def test_samples_that_are_not_stay_together(name: str) -> None:
    assert found(model_of(TOGETHER[name]), batch()) is None


@pytest.mark.usefixtures("small")
def test_a_recurrent_network_that_reads_time_along_the_first_axis_stays_whole() -> None:
    rng = np.random.default_rng(2)
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[time, 1, 4] x) => (float[time, 1, 1, 3] y) { y = GRU <hidden_size = 3> (x, w, r) }
    """
    model = ir.from_onnx_text(text.replace("{ y", "<float[1, 9, 4] w, float[1, 9, 3] r> { y"))
    for name, shape in {"w": (1, 9, 4), "r": (1, 9, 3)}.items():
        value = ir.val(name, const_value=ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name))
        model.graph.register_initializer(value)
        for node in model.graph:
            for index, old in enumerate(node.inputs):
                if old is not None and old.name == name:
                    node.replace_input_with(index, value)
    assert found(model, {"x": rng.standard_normal((9, 1, 4)).astype(np.float32)}) is None


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("samples", [1, 2])
def test_few_samples_stay_together(samples: int) -> None:
    assert found(model_of(APART["elements"]), batch(samples)) is None


def test_small_activations_stay_together() -> None:
    assert found(model_of(APART["elements"]), batch()) is None


@pytest.mark.usefixtures("small")
def test_a_fixed_number_of_samples_stays_together() -> None:
    assert found(model_of(APART["elements"], "float[8, 4] x"), batch()) is None


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", [*APART, *TOGETHER])
def test_statistics_are_those_of_whole_batches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, body = model_of({**APART, **TOGETHER}[name]), {**APART, **TOGETHER}[name]
    stream = [batch(8), {"x": 3 * batch(5)["x"]}, batch(1)]
    sizes, run = list[int](), Session.run

    def counted(self: Session, feeds: Batch) -> dict[str, np.ndarray]:
        sizes.append(len(feeds["x"]))
        return run(self, feeds)

    monkeypatch.setattr(Session, "run", counted)
    axes = {"x": 1} if "Transpose" in body else {}
    in_pieces = observe(model, ["x", "y"], stream, distributions=["x", "y"], channel_axes=axes)
    assert (max(sizes) < 8) == (name in APART)
    monkeypatch.setattr(qonnx.pieces, "_BYTES", 1 << 30)
    assert_equal(in_pieces, observe(model, ["x", "y"], stream, distributions=["x", "y"], channel_axes=axes))


def assert_equal(one: Statistics, other: Statistics) -> None:
    assert (one.batches, one.samples, one.data) == (other.batches, other.samples, other.data)
    for name, tensor in one.tensors.items():
        expected = other.tensors[name]
        assert (tensor.count, tensor.minimum, tensor.maximum) == (expected.count, expected.minimum, expected.maximum)
        np.testing.assert_array_equal(tensor.batch_minima, expected.batch_minima)
        np.testing.assert_array_equal(tensor.batch_maxima, expected.batch_maxima)
        np.testing.assert_array_equal(tensor.channel_minimum, expected.channel_minimum)
        assert tensor.sketch is not None
        assert expected.sketch is not None
        np.testing.assert_array_equal(tensor.sketch.cells, expected.sketch.cells)
        np.testing.assert_array_equal(tensor.sketch.counts, expected.sketch.counts)
