"""TensorRT engines: compiled from a quantized ONNX file, with a listing of what runs on integers."""

from qonnx.engine.build import EngineReport, build_engine
from qonnx.engine.listing import EngineLayer

__all__ = ["EngineLayer", "EngineReport", "build_engine"]
