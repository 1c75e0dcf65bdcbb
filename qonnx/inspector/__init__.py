"""What a graph of any tool holds: operators, sizes, how each layer is quantized, and the plan that says the same."""

from qonnx.inspector.inspect import Inspection, LayerView, Port, inspect
from qonnx.inspector.read_back import ReadBack, read_back

__all__ = ["Inspection", "LayerView", "Port", "ReadBack", "inspect", "read_back"]
