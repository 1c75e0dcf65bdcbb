"""Bias correction: rounding must not move the mean of a layer's result.

Rounding errors of a weight, and of an activation that is zero most of the time, do not average out: they shift every
output channel by a constant, and the shifts add up over the layers. The remedy is free at run time:

    b <- b + E[y - y_q]        per output channel (Nagel et al. 2019, "Data-Free Quantization", section 4.2)

where y is the result of the float layer and y_q that of the quantized one. Each layer has to see inputs that are
corrected already. Here the float and the quantized network run side by side in one graph, and every quantized layer's
result is moved to the mean of its float twin before it is passed on: one pass corrects all layers, in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.graph import Names, is_initializer, rank, subgraphs
from qonnx.linear import CONVOLUTIONS, Linear, linear_of
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.placement import Edge
from qonnx.plan import BiasPlan, QuantPlan
from qonnx.runtime import session

_SIZED_BY_DATA = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})

# From this opset on ReduceMean takes its axes as an input.
_AXES_ARE_AN_INPUT = 18


def correct_biases(
    model: ir.Model,
    plan: QuantPlan,
    batches: Iterable[Mapping[str, npt.NDArray[Any]]],
    quantized: ir.Model | None = None,
) -> QuantPlan:
    """Returns the plan with a bias correction for every quantized layer that has a bias or can be given one for free.

    A correction is shrunk towards 0 where it is not much larger than its own uncertainty over the samples (the first
    axis of each layer's result), so that few samples do no harm.

    Args:
        model: the prepared float model that the plan was made for; it is not changed.
        plan: without corrections.
        batches: some calibration batches; a few hundred samples are plenty.
        quantized: what shows the rounding, with the nodes of the model. None for what the plan writes in Q/DQ.
    """
    edges = bias_edges(model, plan)
    if not edges:
        return plan
    joint, outputs, _ = side_by_side(model, plan, edges, quantized)
    runner = session(joint)
    seen = {name: _Moments() for name in outputs}
    for batch in batches:
        results = runner.run(batch)
        for name in outputs:
            seen[name].add(results[name].reshape(-1, results[name].shape[-1]))
    biases = []
    for name, node in outputs.items():
        shift = seen[name].shrunk_mean()
        if shift is not None and shift.any():
            values = tuple(float(str(value)) for value in shift.astype(np.float32))
            biases.append(BiasPlan(node.name or "", edges[node], values))
    return msgspec.structs.replace(plan, biases=tuple(biases))


def bias_edges(model: ir.Model, plan: QuantPlan) -> dict[ir.Node, Edge]:
    """The quantized layers that have a bias or can be given one for free, and where they read it."""
    return {layer.node: edge for layer in _correctable(model, plan) if (edge := _bias_edge(layer)) is not None}


def _correctable(model: ir.Model, plan: QuantPlan) -> list[Linear]:
    quantized = {layer.node for layer in plan.quantized_layers}
    found = [linear_of(node) for node in model.graph if node.name in quantized]
    return [layer for layer in found if layer is not None and rank(layer.node.outputs[0]) is not None]


def _bias_edge(layer: Linear) -> Edge | None:
    """Where the layer reads its bias, or could without a new node; None where it cannot."""
    node = layer.node
    if node.op_type == "Gemm" and node.attributes.get_float("beta", 1.0) != 1.0:
        return None
    if layer.bias_node is not None and layer.bias is not None:
        if not is_initializer(layer.bias):
            return None
        return Edge(layer.bias_node.name or "", list(layer.bias_node.inputs).index(layer.bias))
    if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
        return Edge(node.name or "", 2)
    return None


class _Moments:
    """Count, sum and sum of squares of samples per channel: what is kept of [samples, channels] arrays."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: npt.NDArray[np.float64] = np.zeros(1)
        self._squares: npt.NDArray[np.float64] = np.zeros(1)

    def add(self, samples: npt.NDArray[Any]) -> None:
        self._count += len(samples)
        self._sum = self._sum + samples.sum(axis=0, dtype=np.float64)
        self._squares = self._squares + np.einsum("ij,ij->j", samples, samples, dtype=np.float64)

    def shrunk_mean(self) -> npt.NDArray[np.float64] | None:
        """The mean times max(0, 1 - (its standard error / it)^2); None with one sample, or when not all are finite."""
        if self._count < 2 or not (np.isfinite(self._sum).all() and np.isfinite(self._squares).all()):
            return None
        mean = self._sum / self._count
        variance = np.maximum(0.0, self._squares - self._count * mean**2) / (self._count - 1)
        certain = np.maximum(0.0, mean**2 - variance / self._count)
        return np.asarray(np.divide(certain, mean, out=np.zeros_like(mean), where=mean != 0))


class SideBySide(NamedTuple):
    """The float and the quantized network in one graph.

    Attributes:
        model: the graph. Its outputs are the keys of `differences`.
        differences: outputs [samples, channels], the result of the float layer minus that of the quantized one, each
            with its layer.
        twins: for every value of the quantized network, by its name there, the value that stands for it here.
    """

    model: ir.Model
    differences: dict[str, ir.Node]
    twins: dict[str, ir.Value]


def side_by_side(
    model: ir.Model, plan: QuantPlan, edges: Mapping[ir.Node, Edge], quantized: ir.Model | None = None
) -> SideBySide:
    """Builds the graph; the result of every layer in `edges` is moved to the mean of its float twin."""
    if quantized is None:
        quantized = model.clone()
        InsertQDQ(plan)(quantized)
    joint = model.clone()
    graph, names = joint.graph, Names(joint)
    graph.outputs.clear()
    float_values = {value.name: value for node in graph for value in node.outputs}
    twins: dict[str, ir.Value] = {value.name or "": value for value in graph.inputs}
    for name, value in quantized.graph.initializers.items():
        if value.is_graph_input():
            continue  # a default that the caller may override: both networks get the same
        twin = ir.Value(
            name=names.fresh(f"{name}_twin"), type=value.type, shape=value.shape, const_value=value.const_value
        )
        graph.register_initializer(twin)
        twins[name] = twin
    layers = {node.name: node for node in edges}
    outputs: dict[str, ir.Node] = {}
    for node in list(quantized.graph):
        if any(True for _ in subgraphs(node)) or node.op_type in _SIZED_BY_DATA:
            # A body is not copied: it reads values of the graph around it by reference. Both networks use one result.
            # So they do where its size depends on values: else one may find another number of boxes than the other.
            twins.update({value.name or "": float_values[value.name] for value in node.outputs})
            continue
        twin_node = _twin(node, twins, names)
        graph.append(twin_node)
        if node.name in layers:
            difference, corrected = _correct(graph, names, layers[node.name], float_values, twin_node.outputs[0])
            twins[node.outputs[0].name or ""] = corrected
            outputs[difference.name or ""] = layers[node.name]
    return SideBySide(joint, outputs, twins)


def _twin(node: ir.Node, twins: dict[str, ir.Value], names: Names) -> ir.Node:
    twin = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else twins[value.name or ""] for value in node.inputs],
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
        name=names.fresh(f"{node.name}_twin"),
    )
    for original, value in zip(node.outputs, twin.outputs, strict=True):
        value.name = names.fresh(f"{original.name}_twin") if original.name else ""
        value.type, value.shape = original.type, original.shape
        twins[original.name or ""] = value
    return twin


def _correct(
    graph: ir.Graph, names: Names, layer: ir.Node, float_values: Mapping[str | None, ir.Value], value: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Appends y - y_q per sample and channel as an output, and y_q moved to the mean of y; returns both values."""
    original = float_values[layer.outputs[0].name]
    dimensions = rank(original) or 0
    channel = 1 if layer.op_type in CONVOLUTIONS else dimensions - 1
    rest = [axis for axis in range(1, dimensions) if axis != channel]
    every = [axis for axis in range(dimensions) if axis != channel]

    def add(op: str, inputs: list[ir.Value], **attributes: int | list[int]) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=names.fresh(f"{layer.name}_{op}"))
        node.outputs[0].name = names.fresh(f"{layer.name}_{op}_output")
        graph.append(node)
        return node.outputs[0]

    def mean(of: ir.Value, axes: list[int], keepdims: int) -> ir.Value:
        if graph.opset_imports.get("", 0) < _AXES_ARE_AN_INPUT:
            return add("ReduceMean", [of], axes=axes, keepdims=keepdims)
        tensor = ir.tensor(np.array(axes, np.int64), name=names.fresh(f"{layer.name}_axes"))
        stored = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(axes)]))
        stored.const_value = tensor
        graph.register_initializer(stored)
        return add("ReduceMean", [of, stored], keepdims=keepdims)

    full = add("Cast", [add("Sub", [original, value])], to=int(ir.DataType.FLOAT))
    per_sample = mean(full, rest, 0) if rest else add("Identity", [full])
    per_sample.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(per_sample)
    shift = mean(full, every, 1) if every else full
    if original.dtype not in (None, ir.DataType.FLOAT):
        shift = add("Cast", [shift], to=int(original.dtype))
    corrected = add("Add", [value, shift])
    corrected.type, corrected.shape = value.type, value.shape
    return per_sample, corrected
