"""Bias correction: rounding must not move the mean of a layer's result.

Rounding errors of a weight, and of an activation that is zero most of the time, do not average out: they shift every
output channel by a constant, and the shifts add up over the layers. The remedy is free at run time:

    b <- b + E[y - y_q]        per output channel (Nagel et al. 2019, "Data-Free Quantization", section 4.2)

where y is the result of the float layer and y_q that of the quantized one. Where all that reads it is an activation
function, in one node or spelled out in several, the mean behind this is kept, to first order:

    b <- b + E[act(y) - act(y_q)] sign(E[s]) / E[|s|]       s: the slope of act from y_q to y

Most of y may lie far below 0, where Relu, SiLU and GELU let nothing through, with another error: it shrinks where small
inputs are rounded to 0. The mean over all of y would move the few elements that count, and more in each further layer.
SiLU and GELU fall before they rise: E[s] may be next to nothing, and dividing by it would move y by any amount. By
E[|s|], it moves as far as that where act only rises, or only falls, and less far elsewhere.

Each layer has to see inputs that are corrected already. Here the float and the quantized network run side by side in
one graph, and every quantized layer's result is moved by the mean before it is passed on: one pass corrects all layers,
in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.activation import Activation, activation_of
from qonnx.graph import Names, is_initializer, rank, subgraphs
from qonnx.linear import CONVOLUTIONS, Linear, linear_of
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.placement import Edge
from qonnx.plan import BiasPlan, QuantPlan
from qonnx.runtime import session

_SIZED_BY_DATA = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})

# A slope is measured this far on both sides of the middle where the error is smaller, as a share of the error's root
# mean square: the quotient of two differences that are next to nothing is noise.
_STEP = np.array(0.25, np.float32)

# Of errors and slopes that are 0: it only keeps 0 / 0 away.
_LEAST = np.array(1e-12, np.float32)

# Up to so many samples that count nothing tells a mean from chance.
_ONE_SAMPLE = 1 + 1e-9

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
    joint, outputs, slopes, _ = side_by_side(model, plan, edges, quantized)
    runner = session(joint)
    seen = {name: _Moments() for name in outputs}
    for batch in batches:
        results = runner.run(batch)
        for name in outputs:
            slope = results[slopes[name]] if name in slopes else np.ones_like(results[name])
            channels = results[name].shape[-1]
            seen[name].add(results[name].reshape(-1, channels), slope.reshape(-1, channels))
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


def activation_behind(layer: ir.Node) -> Activation | None:
    """What is all that reads the result of a linear layer and its bias, element by element; None where nothing is."""
    linear = linear_of(layer)
    return None if linear is None else activation_of(linear.output)


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
    """Sums over samples [samples, channels] and the mean slopes of their elements: all that is kept of them."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: npt.NDArray[np.float64] = np.zeros((5, 1))

    def add(self, samples: npt.NDArray[Any], slopes: npt.NDArray[Any]) -> None:
        self._count += len(samples)
        pairs = ((samples, samples), (samples, slopes), (slopes, slopes))
        products = [np.einsum("ij,ij->j", first, second, dtype=np.float64) for first, second in pairs]
        sums = [each.sum(axis=0, dtype=np.float64) for each in (samples, slopes)]
        self._sums = self._sums + np.stack([*sums, *products])

    def shrunk_mean(self) -> npt.NDArray[np.float64] | None:
        """The mean over that of the slopes, times max(0, 1 - (its standard error / it)^2); 0 where all slopes are 0.

        None with one sample, or when not all are finite. The error is that of a ratio of means (Cochran, Sampling
        Techniques, 1977, equation 6.13).
        """
        if self._count < 2 or not np.isfinite(self._sums).all():
            return None
        total, slope, squares, mixed, slopes = self._sums
        mean = np.divide(total, slope, out=np.zeros_like(total), where=slope > 0)
        scatter = np.maximum(0.0, squares - 2 * mean * mixed + mean**2 * slopes)  # sum of (sample - mean x slope)^2
        variance = np.divide(scatter, slope**2, out=np.zeros_like(total), where=slope > 0)
        # Kish's effective number of samples: a channel that is let through in one of them shows nothing of the others.
        effective = np.divide(slope**2, slopes, out=np.ones_like(total), where=slopes > 0)
        lack = np.divide(effective, effective - 1, out=np.zeros_like(total), where=effective > _ONE_SAMPLE)
        certain = np.where(effective > _ONE_SAMPLE, np.maximum(0.0, mean**2 - variance * lack), 0.0)
        return np.asarray(np.divide(certain, mean, out=np.zeros_like(mean), where=mean != 0))


class SideBySide(NamedTuple):
    """The float and the quantized network in one graph.

    Attributes:
        model: the graph. Its outputs are the keys of `differences` and the values of `slopes`.
        differences: outputs [samples, channels], the result of the float layer minus that of the quantized one, each
            with its layer; behind its activation where it has one.
        slopes: for those with an activation, the output [samples, channels] that tells the mean of its absolute slope.
        twins: for every value of the quantized network, by its name there, the value that stands for it here.
    """

    model: ir.Model
    differences: dict[str, ir.Node]
    slopes: dict[str, str]
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
    stored = (*graph.inputs, *graph.initializers.values())
    float_values = {value.name: value for value in (*stored, *(value for node in graph for value in node.outputs))}
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
    slopes: dict[str, str] = {}
    for node in list(quantized.graph):
        if any(True for _ in subgraphs(node)) or node.op_type in _SIZED_BY_DATA:
            # A body is not copied: it reads values of the graph around it by reference. Both networks use one result.
            # So they do where its size depends on values: else one may find another number of boxes than the other.
            twins.update({value.name or "": float_values[value.name] for value in node.outputs})
            continue
        twin_node = _twin(node, twins, names)
        graph.append(twin_node)
        if node.name in layers:
            layer = layers[node.name]
            nodes = _Nodes(graph, names, layer)
            difference, slope, corrected = _correct(nodes, layer, float_values, twin_node.outputs[0])
            twins[node.outputs[0].name or ""] = corrected
            outputs[difference.name or ""] = layer
            if slope is not None:
                slopes[difference.name or ""] = slope.name or ""
    return SideBySide(joint, outputs, slopes, twins)


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


class _Nodes:
    """Appends nodes about one layer to a graph."""

    def __init__(self, graph: ir.Graph, names: Names, layer: ir.Node) -> None:
        self._graph, self._names, self._layer = graph, names, layer.name

    def add(self, op: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any] | None = None) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes or {}, name=self._names.fresh(f"{self._layer}_{op}"))
        node.outputs[0].name = self._names.fresh(f"{self._layer}_{op}_output")
        self._graph.append(node)
        return node.outputs[0]

    def stored(self, array: npt.NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(array, name=self._names.fresh(f"{self._layer}_constant"))
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        value.const_value = tensor
        self._graph.register_initializer(value)
        return value

    def mean(self, of: ir.Value, axes: list[int], keepdims: int) -> ir.Value:
        if not axes:
            return of
        if self._graph.opset_imports.get("", 0) < _AXES_ARE_AN_INPUT:
            return self.add("ReduceMean", [of], {"axes": axes, "keepdims": keepdims})
        return self.add("ReduceMean", [of, self.stored(np.array(axes, np.int64))], {"keepdims": keepdims})

    def cast(self, value: ir.Value, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return self.add("Cast", [value], {"to": int(dtype)})

    def returned(self, value: ir.Value) -> ir.Value:
        output = self.add("Identity", [value])
        output.type = ir.TensorType(ir.DataType.FLOAT)
        self._graph.outputs.append(output)
        return output


def _correct(
    nodes: _Nodes, layer: ir.Node, float_values: Mapping[str | None, ir.Value], value: ir.Value
) -> tuple[ir.Value, ir.Value | None, ir.Value]:
    """Appends the difference per sample and channel as an output, its slope if there is one, y_q moved by the mean."""
    original = float_values[layer.outputs[0].name]
    dimensions = rank(original) or 0
    channel = 1 if layer.op_type in CONVOLUTIONS else dimensions - 1
    rest = [axis for axis in range(1, dimensions) if axis != channel]
    every = [axis for axis in range(dimensions) if axis != channel]
    error = nodes.add("Sub", [original, value])
    activation = activation_behind(layer)
    if activation is None:
        full, returned = nodes.cast(error), None
        shift = nodes.mean(full, every, 1)
    else:
        full, slope = _behind(nodes, activation, float_values, error, every)
        returned = nodes.returned(nodes.mean(slope, rest, 0))
        least = nodes.add("Max", [nodes.mean(slope, every, 1), nodes.stored(_LEAST)])
        shift = nodes.add("Div", [nodes.mean(full, every, 1), least])
    if original.dtype not in (None, ir.DataType.FLOAT):
        shift = nodes.cast(shift, original.dtype)
    corrected = nodes.add("Add", [value, shift])
    corrected.type, corrected.shape = value.type, value.shape
    return nodes.returned(nodes.mean(full, rest, 0)), returned, corrected


def _behind(
    nodes: _Nodes,
    activation: Activation,
    float_values: Mapping[str | None, ir.Value],
    error: ir.Value,
    every: list[int],
) -> tuple[ir.Value, ir.Value]:
    """The difference behind the activation of a layer, so signed that y has to follow it, and the absolute slope."""

    def act(source: ir.Value) -> ir.Value:
        values = {activation.source: source}
        for node in activation.nodes:
            read = [None if v is None else values[v] if v in values else float_values[v.name] for v in node.inputs]
            values[node.outputs[0]] = nodes.add(node.op_type, read, node.attributes)
        return nodes.cast(values[activation.result])

    exact = float_values[activation.source.name]
    # The float network's own result would have to be kept until its twin is reached, for every layer.
    change = nodes.add("Sub", [act(exact), act(nodes.add("Sub", [exact, error]))])
    half = nodes.add("Mul", [nodes.cast(error), nodes.stored(np.array(0.5, np.float32))])
    size = nodes.add("Sqrt", [nodes.mean(nodes.add("Mul", [half, half]), every, 1)])
    least = nodes.add("Max", [nodes.add("Mul", [size, nodes.stored(2 * _STEP)]), nodes.stored(_LEAST)])
    step = nodes.add("Max", [nodes.add("Abs", [half]), least])
    middle = nodes.add("Sub", [nodes.cast(exact), half])
    ends = [act(nodes.cast(nodes.add(op, [middle, step]), exact.dtype or ir.DataType.FLOAT)) for op in ("Add", "Sub")]
    slope = nodes.add("Div", [nodes.add("Sub", ends), nodes.add("Add", [step, step])])
    sign = nodes.add("Sign", [nodes.mean(slope, every, 1)])
    return nodes.add("Mul", [change, sign]), nodes.add("Abs", [slope])
