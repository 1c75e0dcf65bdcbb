"""A Cast from uint8 comes before what moves the data, as TensorRT has no other operator that reads uint8."""

from pathlib import Path

import numpy as np
import pytest

import qonnx
from qonnx.graph import load
from qonnx.passes.cast_first import CastFirst
from qonnx.passes.infer_shapes import InferShapes
from tests.graphs import model_of
from tests.helpers import apply, leave_alone

IMAGE = {"x": np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)}
SIZES = "int64[2] flat = {2, 108}, int64[1] zero = {0}, int64[1] four = {4}, int64[1] one = {1}"
TRANSPOSED = "t = Transpose <perm = [0, 3, 1, 2]> (x)"


@pytest.mark.parametrize(
    ("nodes", "operators"),
    [
        (f"{TRANSPOSED} y = Cast <to = 1> (t) f = Relu(y)", ["Cast", "Transpose", "Relu"]),
        ("r = Reshape(x, flat) c = Cast <to = 10> (r) f = Cast <to = 1> (c)", ["Cast", "Reshape", "Cast"]),
        (
            f"{TRANSPOSED} s = Slice(t, zero, four, one) i = Identity(s) c = Cast <to = 1> (i) f = Neg(c)",
            ["Cast", "Transpose", "Slice", "Identity", "Neg"],
        ),
        (
            f"{TRANSPOSED} a = Cast <to = 1> (t) b = Cast <to = 1> (t) f = Mul(a, b)",
            ["Cast", "Transpose", "Mul"],
        ),
    ],
)
def test_moved_up(nodes: str, operators: list[str]) -> None:
    rank = "A,B" if "Reshape" in nodes else "A,B,C,D"
    model = model_of(f"g (uint8[2,6,6,3] x) => (float[{rank}] f) <{SIZES}> {{ {nodes} }}")
    InferShapes()(model)
    assert apply(CastFirst(), model, IMAGE) == operators
    early = model.graph.node(0).outputs[0]
    assert (early.dtype, early.shape) == (model.graph.node(0).attributes.get_int("to", 0), model.graph.inputs[0].shape)


@pytest.mark.parametrize(
    "nodes",
    [
        f"{TRANSPOSED} f = Cast <to = 1> (t)",  # the result of the model
        f"{TRANSPOSED} a = Cast <to = 1> (t) b = Cast <to = 10> (t) c = Cast <to = 1> (b) f = Mul(a, c)",
        f"{TRANSPOSED} a = Cast <to = 1> (t) m = ReduceMax(t) b = Cast <to = 1> (m) f = Mul(a, b)",
        "c = Cast <to = 1> (x) t = Transpose(c) a = Cast <to = 10> (t) f = Cast <to = 1> (a)",  # not uint8
        f"{TRANSPOSED} c = Cast <to = 9> (t) d = Cast <to = 1> (c) f = Neg(d)",  # no runtime moves much of bool
        f"{TRANSPOSED} a = Cast <to = 1> (t) k = ReduceMax(a) l = Cast <to = 9> (k) f = If (l) <"
        "then_branch = t1 () => (float[A,B,C,D] o) { c = Cast <to = 1> (t) o = Neg(c) }, "
        "else_branch = t2 () => (float[A,B,C,D] p) { p = Neg(a) }>",  # read in the body of another node
    ],
)
def test_leaves_alone(nodes: str) -> None:
    model = model_of(f"g (uint8[2,6,6,3] x) => (float[A,B,C,D] f) <{SIZES}> {{ {nodes} }}")
    InferShapes()(model)
    leave_alone(CastFirst(), model)


def test_an_image_in_uint8_makes_an_engine(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = model_of(
        "g (uint8[2,16,16,16] x, float[16,16,3,3] w) => (float[2,16,14,14] y) <float s = {0.01}> "
        f"{{ {TRANSPOSED} c = Cast <to = 1> (t) m = Mul(c, s) y = Conv(m, w) }}",
        weights="w",
    )
    rng = np.random.default_rng(0)
    batches = [{"x": rng.integers(0, 256, (2, 16, 16, 16), dtype=np.uint8)} for _ in range(8)]
    qonnx.quantize(model, batches, tmp_path / "q.onnx")
    report = qonnx.build_engine(tmp_path / "q.onnx", tmp_path / "q.plan")
    assert report.layers


@pytest.mark.parametrize(("target", "first"), [("a800", "Cast"), ("ort-cpu", "Transpose")])
def test_on_a_cpu_it_would_cost_time(target: str, first: str, tmp_path: Path) -> None:
    text = (
        f"g (uint8[2,6,6,3] x, float[3,3] w) => (float[2,3,6,6] y) {{ {TRANSPOSED} c = Cast <to = 1> (t) y = Neg(c) }}"
    )
    qonnx.quantize(model_of(text, weights="w"), None, tmp_path / "q.onnx", target=target, recipe="w8")
    assert load(tmp_path / "q.onnx").graph.node(0).op_type == first
