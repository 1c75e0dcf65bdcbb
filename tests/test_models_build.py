"""The compiler builds a plan for every model of `models/`; those with torch sources are in test_real_models.py."""

import importlib
from pathlib import Path

import pytest

import qonnx
from models import ocr
from qonnx.engine import FloatType


@pytest.mark.models
@pytest.mark.rtx
def test_text_recognition(tmp_path: Path) -> None:
    settings = ("goal_sqnr_db=0", "correct_biases=false")  # only what the plan needs
    data = ocr.calibration(2, 2)
    result = qonnx.quantize(ocr.onnx_file(), data, tmp_path / "q.onnx", recipe="int8-minmax", settings=settings)
    shapes = tuple((batch, 3, 48, width) for batch, width in ((1, 64), (4, 320), (8, 640)))
    engine = qonnx.build_engine(result.output, tmp_path / "q.plan", profiles={"x": shapes}, float_type=FloatType.FP16)
    planned = [node for node in engine.nodes if node.planned]
    assert {node.node for node in planned} == {layer.node for layer in result.plan.quantized_layers}
    assert [node.node for node in planned if not node.int8] == []
    reasons = {node.node: node.reason for node in engine.nodes if not node.planned}
    assert reasons == {layer.node: layer.reason for layer in result.plan.float_layers}


@pytest.mark.models
@pytest.mark.rtx
@pytest.mark.parametrize(
    ("name", "build", "data"),
    [
        ("crepe", {}, {"batches": 2, "batch_size": 4}),
        ("silero", {}, {"batches": 2}),
        ("detector", {}, {"batches": 2, "batch_size": 1}),
        ("smollm2", {"layers": 2}, {"batches": 2, "batch_size": 1, "length": 32}),
    ],
)
def test_every_planned_layer_is_on_int8(name: str, build: dict[str, int], data: dict[str, int], tmp_path: Path) -> None:
    model = importlib.import_module(f"models.{name}")
    if hasattr(model, "onnx_file"):
        source = model.onnx_file()
    else:
        example = model.build(**build)
        source = tmp_path / "model.onnx"
        qonnx.export(example.module, example.args, source, dynamic_shapes=example.dynamic_shapes, verify=False)
    batches = list(model.calibration(**data))
    plain = ("goal_sqnr_db=0", "correct_biases=false", "smooth.kind=none", "equalize.kind=none")
    result = qonnx.quantize(source, batches, tmp_path / "q.onnx", recipe="int8-minmax", settings=plain)
    profiles = {value: (array.shape,) * 3 for value, array in batches[0].items()}
    engine = qonnx.build_engine(result.output, tmp_path / "q.plan", profiles=profiles)
    planned = [node for node in engine.nodes if node.planned]
    assert {node.node for node in planned} == {layer.node for layer in result.plan.quantized_layers}
    assert planned
    assert [node.node for node in planned if not node.int8] == []
