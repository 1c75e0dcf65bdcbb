"""Activations of convolutions, counted in the layout that they are computed in: the same elements, in another order."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

import qonnx.blocks
from qonnx.blocks import _take_blocks, observing_session
from qonnx.errors import ModelError
from qonnx.observation import observe
from qonnx.passes.augment import AddObservers
from qonnx.rebatch import Batch
from qonnx.runtime import Device, Session, session
from qonnx.statistics import Statistics
from tests.graphs import model_of

# b fills two blocks of channels and has readers of its own layout only; c ends within a block; a is reordered anyway.
NETWORK = """g (float[n, 3, 12, 12] x, float[16, 3, 3, 3] w0, float[32, 16, 3, 3] w1, float[32] bias,
               float[24, 32, 3, 3] w2, float[32, 24, 3, 3] w3) => (float[n, k] y) {
    a0 = Conv <pads = [1, 1, 1, 1]> (x, w0) a = Relu(a0)
    b0 = Conv <pads = [1, 1, 1, 1]> (a, w1, bias) low = Constant <value_float = 0.0> ()
    high = Constant <value_float = 6.0> () b = Clip(b0, low, high)
    c = Conv <pads = [1, 1, 1, 1]> (b, w2) d0 = Conv <pads = [1, 1, 1, 1]> (c, w3) d = Add(d0, b)
    p = MaxPool <kernel_shape = [2, 2]> (d) g0 = GlobalAveragePool(p) g = Flatten(g0)
    shape = Constant <value_ints = [0, -1]> () s0 = Reshape(a, shape) s = Sigmoid(s0) y = Concat <axis = 1> (g, s) }"""
VALUES = ["x", "a", "b", "c", "d", "p", "g", "s"]


@pytest.fixture
def model() -> ir.Model:
    model = model_of(NETWORK, weights="w0 w1 bias w2 w3", opset=17)
    ShapeInferencePass()(model)
    return model


def batch(samples: int, seed: int = 0) -> Batch:
    return {"x": np.random.default_rng(seed).standard_normal((samples, 3, 12, 12)).astype(np.float32)}


def returned(runner: Session, feeds: Batch) -> dict[str, np.ndarray]:
    return {name: array.reshape(len(feeds["x"]), -1) for name, array in runner.run(feeds).items()}


def test_each_sample_has_the_elements_that_it_has_in_the_order_of_onnx(model: ir.Model) -> None:
    AddObservers(tuple(VALUES), elements=frozenset(VALUES))(model)
    model.graph.outputs.pop(0)
    plain, blocks = session(model), observing_session(model, 1, Device.CPU)
    assert plain.outputs == blocks.outputs
    assert plain.inputs == blocks.inputs
    moved = set()
    for feeds in (batch(1), batch(5)):
        expected, found = returned(plain, feeds), returned(blocks, feeds)
        for name, array in expected.items():
            np.testing.assert_allclose(np.sort(found[name], 1), np.sort(array, 1), rtol=1e-5, atol=1e-5)
            if not np.allclose(found[name], array, rtol=1e-4, atol=1e-4):
                moved.add(name)
    assert moved <= {"b", "d", "p"}


def test_statistics_are_those_of_the_order_of_onnx(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = [batch(8, 1), batch(5, 2)]
    axes = {"a": 1, "c": 1, "p": 1}

    def observed() -> Statistics:
        return observe(model, VALUES, stream, distributions=[name for name in VALUES if name != "d"], channel_axes=axes)

    blocks = observed()
    monkeypatch.setattr(qonnx.blocks, "_LARGEST", -1)
    plain = observed()
    for name in VALUES:
        one, other = blocks.tensors[name], plain.tensors[name]
        extremes = (other.count, other.minimum, other.maximum, other.finite)
        assert (one.count, one.minimum, one.maximum, one.finite) == extremes
        np.testing.assert_array_equal(one.channel_minimum, other.channel_minimum)
        np.testing.assert_array_equal(one.channel_maximum, other.channel_maximum)
        assert (one.sketch is None) == (name == "d")
        if one.sketch is not None and other.sketch is not None:
            np.testing.assert_array_equal(one.sketch.cells, other.sketch.cells)
            np.testing.assert_array_equal(one.sketch.counts, other.sketch.counts)


REORDERED = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft.nchwc" : 1]>
    g (float[n, 64, 4, 4] x) => ({outputs}) {{
    a = com.microsoft.nchwc.ReorderInput (x) b = com.microsoft.nchwc.MaxPool <kernel_shape = [1, 1]> (a)
    y = com.microsoft.nchwc.ReorderOutput <channels = {channels}> (b) z = Relu({read}) }}"""
FLOAT = "float[n, 64, 4, 4]"


@pytest.mark.parametrize(
    ("outputs", "channels", "read", "names", "taken"),
    [
        ("y", 64, "x", {"y"}, True),
        ("y z", 48, "x", {"y", "z"}, True),
        ("y", 40, "x", {"y"}, False),
        ("y z", 64, "y", {"y", "z"}, False),
        ("y", 64, "x", {"z"}, False),
    ],
    ids=["taken", "beside another", "a block that is not full", "read by others too", "not counted"],
)
def test_only_whole_blocks_that_nobody_reorders(
    outputs: str, channels: int, read: str, names: set[str], taken: bool
) -> None:
    declared = ", ".join(f"{FLOAT} {name}" for name in outputs.split())
    model = ir.from_onnx_text(REORDERED.format(outputs=declared, channels=channels, read=read))
    assert _take_blocks(model, names) == taken
    assert [value.name for value in model.graph.outputs] == outputs.split()
    producer = model.graph.outputs[0].producer()
    assert producer is not None
    assert producer.op_type == ("MaxPool" if taken else "ReorderOutput")


def test_a_value_that_is_returned_twice_is_taken_once() -> None:
    model = ir.from_onnx_text(REORDERED.format(outputs=f"{FLOAT} y, {FLOAT} b", channels=64, read="x"))
    assert not _take_blocks(model, {"y", "b"})


def test_what_fails_is_done_without(model: ir.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = observe(model, ["b"], [batch(3)], distributions=["b"]).tensors["b"].sketch
    assert expected is not None

    def damaged(_: Path) -> ir.Model:
        raise ModelError("cut short")

    for name, value in {"qonnx.blocks.load": damaged, "tempfile.tempdir": str(tmp_path / "nowhere")}.items():
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            found = observe(model, ["b"], [batch(3)], distributions=["b"]).tensors["b"].sketch
        assert found is not None
        np.testing.assert_array_equal(found.counts, expected.counts)


def test_a_model_that_does_not_load_is_refused_as_ever(model: ir.Model) -> None:
    next(node for node in model.graph if node.op_type == "Relu").op_type = "Unknown"
    with pytest.raises(ModelError, match="cannot load"):
        observing_session(model, 1, Device.CPU)
