"""Writes an average over a whole feature map as GlobalAveragePool.

    AveragePool <kernel_shape = [640, 640], ceil_mode = 1> of [n, c, 7, 7]  ->  GlobalAveragePool

Some networks ask for a window that is larger than any map and let it be cut off, as EfficientNet does in transformers.
TensorRT refuses windows of that size.

Only when

* the sizes of the map are known, and no window is smaller than the map;
* a window that is larger is cut off (`ceil_mode`), and nothing is padded or dilated.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class PoolGlobally(ir.passes.InPlacePass):
    """See the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every such AveragePool of the main graph and its subgraphs."""
        modified = False
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.op_type == "AveragePool" and node.domain == "" and _covers_everything(node):
                node.op_type = "GlobalAveragePool"
                node.attributes.clear()
                modified = True
        return ir.passes.PassResult(model, modified)


def _covers_everything(node: ir.Node) -> bool:
    value = node.inputs[0]
    sizes = list(value.shape)[2:] if value is not None and value.shape is not None else []
    window = node.attributes.get_ints("kernel_shape", [])
    moved = [*node.attributes.get_ints("pads", []), *(step - 1 for step in node.attributes.get_ints("dilations", []))]
    if (
        len(window) != len(sizes)
        or not sizes
        or any(moved)
        or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
    ):
        return False
    cut_off = node.attributes.get_int("ceil_mode", 0) == 1
    return all(
        isinstance(size, int) and (size == width or (size < width and cut_off))
        for size, width in zip(sizes, window, strict=True)
    )
