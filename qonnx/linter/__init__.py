"""What TensorRT refuses, silently misreads or runs in float in a quantized graph of any tool, and repairs for it."""

from qonnx.linter.check import Fixed, fix, lint
from qonnx.linter.findings import Finding, Fix, Repair, Severity

__all__ = ["Finding", "Fix", "Fixed", "Repair", "Severity", "fix", "lint"]
