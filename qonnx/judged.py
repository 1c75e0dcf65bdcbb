"""What a quantized model is judged by: its float outputs, and the floats that its integer outputs are made from.

An ArgMax, a TopK or a threshold turns an error into nothing or into another class. By the scores in front of it one
can tell which layer costs how much; by the classes, hardly.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qonnx.graph import is_float, subgraphs
from qonnx.runtime import with_outputs

# They tell of a value how large it is, not what it holds.
_SIZES = frozenset({"Shape", "Size"})


def judged_model(model: ir.Model) -> ir.Model:
    """The same graph, which also returns the floats that its integer outputs are made from; itself if there are none.

    Bodies of If, Loop and Scan are not entered, nor is anything in front of a Shape.
    """
    present = {value.name for value in model.graph.outputs}
    names = dict.fromkeys(name for value in model.graph.outputs for name in _sources(value) if name not in present)
    return with_outputs(model, names) if names else model


def _sources(output: ir.Value) -> Iterator[str]:
    """The nearest floats that the main graph computes on the way to an output; none for one that is float itself."""
    pending, seen = [] if is_float(output) else [output], {output}
    while pending:
        node = pending.pop(0).producer()
        if node is None or (node.op_type in _SIZES and node.domain in ("", "ai.onnx")) or any(subgraphs(node)):
            continue
        for value in node.inputs:
            if value is None or value in seen or value.producer() is None:
                continue
            seen.add(value)
            if is_float(value):
                yield value.name or ""
            else:
                pending.append(value)
