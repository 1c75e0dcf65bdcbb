"""Turns a PyTorch or ONNX model into a quantized ONNX graph that TensorRT and ONNX Runtime really run in INT8.

Names are resolved on first use, so that `import qonnx` and `qonnx --help` cost nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qonnx.comparison import Comparison, compare
    from qonnx.engine import build_engine
    from qonnx.errors import QonnxError
    from qonnx.exporter import export
    from qonnx.inspector import inspect
    from qonnx.linter import lint
    from qonnx.pipeline import calibrate, quantize
    from qonnx.plan import QuantPlan
    from qonnx.recipe import Recipe
    from qonnx.result import Result
    from qonnx.statistics import Statistics

_HOMES = {
    "Comparison": "qonnx.comparison",
    "QonnxError": "qonnx.errors",
    "QuantPlan": "qonnx.plan",
    "Recipe": "qonnx.recipe",
    "Result": "qonnx.result",
    "Statistics": "qonnx.statistics",
    "build_engine": "qonnx.engine",
    "calibrate": "qonnx.pipeline",
    "compare": "qonnx.comparison",
    "export": "qonnx.exporter",
    "inspect": "qonnx.inspector",
    "lint": "qonnx.linter",
    "quantize": "qonnx.pipeline",
}

__all__ = [
    "Comparison",
    "QonnxError",
    "QuantPlan",
    "Recipe",
    "Result",
    "Statistics",
    "build_engine",
    "calibrate",
    "compare",
    "export",
    "inspect",
    "lint",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qonnx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
