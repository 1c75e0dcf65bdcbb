"""The largest magnitudes per sample and channel on some batches: one pass, of which only these come back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qonnx.graph import Names, rank
from qonnx.runtime import session

# From this opset on ReduceMax takes its axes as an input.
_AXES_INPUT = 18

Floats = npt.NDArray[np.float32]


def channel_maxima(
    model: ir.Model, axes: Mapping[str, int | None], batches: Iterable[Mapping[str, npt.NDArray[Any]]]
) -> dict[str, Floats]:
    """Runs a model and returns the largest magnitude in each channel of each sample of some values.

    Args:
        model: a float model; it is not changed.
        axes: by value name, the axis of the channels; None, and the first axis, mean one maximum a batch.
        batches: inputs.

    Returns:
        By value name [samples, channels], or [batches, 1]. A sample is one index of the first axis. Values that the
        main graph does not compute are left out.
    """
    graph = _Maxima(model)
    for name, axis in axes.items():
        graph.add(name, axis)
    if not graph.outputs:
        return {}
    RemoveUnusedNodesPass()(graph.model)
    runner = session(graph.model)
    found: dict[str, list[Floats]] = {name: [] for name in graph.outputs}
    for batch in batches:
        results = runner.run(batch)
        for name, output in graph.outputs.items():
            maxima = results[output]
            found[name].append(maxima if maxima.ndim == 2 else maxima.reshape(1, 1))
    return {name: np.concatenate(parts) for name, parts in found.items() if len({p.shape[1] for p in parts}) == 1}


class _Maxima:
    """A copy of a model whose outputs are the maxima.

    Attributes:
        model: the copy.
        outputs: by value name, the output that holds its maxima.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model.clone()
        self.outputs: dict[str, str] = {}
        graph = self.model.graph
        graph.outputs.clear()
        self._names = Names(self.model)
        self._values = {value.name: value for value in graph.inputs}
        self._values.update({value.name: value for node in graph for value in node.outputs})

    def add(self, name: str, axis: int | None) -> None:
        value = self._values.get(name)
        if value is None or value.is_initializer():
            return
        dimensions = rank(value)
        channel = None if axis is None or dimensions is None else axis % dimensions
        if value.dtype != ir.DataType.FLOAT:
            value = self._node("Cast", [value], to=int(ir.DataType.FLOAT))
        found = self._node("Abs", [value])
        if not channel or dimensions is None:
            found = self._node("ReduceMax", [found], keepdims=0)
        elif others := [other for other in range(1, dimensions) if other != channel]:
            found = self._reduce(found, others)
        found.type = ir.TensorType(ir.DataType.FLOAT)
        self.model.graph.outputs.append(found)
        self.outputs[name] = found.name or ""

    def _reduce(self, value: ir.Value, axes: list[int]) -> ir.Value:
        graph = self.model.graph
        if graph.opset_imports.get("", 0) < _AXES_INPUT:
            return self._node("ReduceMax", [value], axes=axes, keepdims=0)
        tensor = ir.tensor(np.array(axes, np.int64), name=self._names.fresh("maxima_axes"))
        stored = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(axes)]))
        stored.const_value = tensor
        graph.register_initializer(stored)
        return self._node("ReduceMax", [value, stored], keepdims=0)

    def _node(self, op: str, inputs: list[ir.Value], **attributes: int | list[int]) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=self._names.fresh(f"maxima_{op}"))
        node.outputs[0].name = self._names.fresh(f"maxima_{op}_output")
        self.model.graph.append(node)
        return node.outputs[0]
