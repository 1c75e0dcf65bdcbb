"""Activations in the layout in which convolutions compute them.

ONNX Runtime's convolutions keep channels in blocks of 8 or 16, and reorder their output for whoever does not. An
element is counted wherever it lies: without the copies, and the memory for them, the pass over MobileNetV2 that returns
all activations takes a quarter less time.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import onnx_ir as ir

from qonnx.errors import ModelError
from qonnx.graph import load
from qonnx.passes.augment import Statistic, observers
from qonnx.runtime import Device, Session, session

# A multiple of every size of block: nothing is added to fill the last one.
_BLOCK = 16

# Weights of more bytes are not copied, as this takes.
_LARGEST = 1 << 28


def observing_session(model: ir.Model, threads: int, device: Device) -> Session:
    """Opens a model with observers. The elements of a sample come in any order, and in any shape behind the first axis.

    Args:
        model: with observers.
        threads: threads within one operator.
        device: where the graph runs.

    Raises:
        ModelError: see `qonnx.runtime.session`.
        DependencyError: see `qonnx.runtime.session`.
    """
    elements = {observer.output for observer in observers(model) if observer.statistic is Statistic.ELEMENTS}
    weights = sum(x.const_value.nbytes for x in model.graph.initializers.values() if x.const_value is not None)
    convolves = any(node.op_type == "Conv" for node in model.graph)
    if elements and convolves and weights <= _LARGEST and device is Device.CPU:
        # Whatever fails, such as a full disk, the model itself can do without.
        with contextlib.suppress(ModelError, OSError), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            runner = session(model, threads=threads, optimized=path)
            optimized = load(path)
            taken = _take_blocks(optimized, elements)
            return session(optimized, threads=threads, optimize=False) if taken else runner
    return session(model, threads=threads, device=device)


def _take_blocks(model: ir.Model, names: set[str]) -> bool:
    """Returns what is reordered to be returned, and for nothing else, as it is before."""
    graph, changed = model.graph, False
    for index, value in enumerate(graph.outputs):
        node = value.producer()
        if value.name not in names or node is None or node.op_type != "ReorderOutput" or value.uses():
            continue
        blocks = node.inputs[0]
        if blocks is None or blocks.is_graph_output() or node.attributes.get_int("channels", 1) % _BLOCK:
            continue
        graph.outputs[index] = blocks
        blocks.name, blocks.type = value.name, value.type
        graph.remove(node, safe=True)
        changed = True
    return changed
