"""TensorRT engines: compiled from a quantized ONNX file, with a listing of what runs on integers."""

from qonnx.engine.build import EngineReport, build_engine
from qonnx.engine.inspection import NodeInspection
from qonnx.engine.listing import EngineLayer
from qonnx.engine.settings import Backend, Calibrator, FloatType, Settings

__all__ = [
    "Backend",
    "Calibrator",
    "EngineLayer",
    "EngineReport",
    "FloatType",
    "NodeInspection",
    "Settings",
    "build_engine",
]
