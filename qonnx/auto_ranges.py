"""Chooses ranges by what they do: to the layers that read a tensor, and to the outputs of the whole network.

For a tensor x that a layer f reads, and every candidate range, the error is taken at the layer's output, behind its
activation function,

    sum (f(Q(x)) - f(x) - mean)^2 / sum f(x)^2        summed over the layers that read x

on a batch that calibration did not see. The mean per output channel is left out where the layer's bias takes it up
later, and no token counts more than `qonnx.group_error.loudness` lets it. All layers are measured in the same run:
beside each stands a copy that reads the rounded tensor, and the scales are inputs of the graph, so that one session
serves every candidate: one pass each.

That is not the last word. Rounding errors of single elements average out on the way through a network, but an outlier
that is cut off is missing everywhere. So the choice per tensor competes with each calibrator used throughout, and the
outputs of the whole quantized network, biases corrected, decide. Here too the scales are inputs: one session, one pass
per contestant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.activation import activation_of
from qonnx.bias_correction import SideBySide, bias_edges, side_by_side
from qonnx.comparison import difference
from qonnx.graph import Names, rank
from qonnx.group_error import loudness
from qonnx.linear import CONVOLUTIONS, linear_of
from qonnx.numerics import Dtype, scale_and_zero_point
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.placement import Placement
from qonnx.plan import QuantPlan
from qonnx.ranges import Range
from qonnx.rebatch import Batch
from qonnx.runtime import session

# From this opset on reductions take their axes as an input.
_AXES_ARE_AN_INPUT = 18


def least_disturbing(
    model: ir.Model,
    placement: Placement,
    candidates: Sequence[Mapping[str, Range]],
    batches: Sequence[Batch],
    dtype: Dtype,
    *,
    symmetric: bool,
    biases_corrected: bool,
) -> dict[str, Range]:
    """The best of the candidate ranges for every value.

    Args:
        model: the prepared float model; it is not changed.
        placement: which layers read which values.
        candidates: one mapping from value to range per calibrator.
        batches: inputs to measure on, at least one.
        dtype: the type of the codes.
        symmetric: whether 0 is in the middle of the grid.
        biases_corrected: whether a constant error per channel will be corrected.

    Returns:
        For every value of the first candidate the range with the smallest error; a value that no layer reads, or whose
        errors are not finite, keeps the first candidate's.
    """
    values = [value for value in candidates[0] if all(value in candidate for candidate in candidates)]
    best = dict(candidates[0])
    graph = _Shadows(model, placement, values, dtype, biases_corrected)
    if not graph.errors:
        return best
    runner = session(graph.model)
    errors = np.full((len(candidates), len(values)), np.nan)
    for row, candidate in enumerate(candidates):
        ends = np.array([candidate[value][:2] for value in values], np.float32)
        scale, zero_point = scale_and_zero_point(ends[:, 0], ends[:, 1], dtype, symmetric=symmetric)
        fed = {graph.scales: scale, graph.zero_points: zero_point}
        errors[row] = sum(graph.relative_errors(runner.run({**batch, **fed}), len(values)) for batch in batches)
    for column, value in enumerate(values):
        if np.isfinite(errors[:, column]).all():
            low, high, source = candidates[int(errors[:, column].argmin())][value]
            best[value] = Range(low, high, f"auto: {source}")
    return best


class _Shadows:
    """The float graph with a copy of every layer for every activation it reads, rounded by scales that are fed.

    Attributes:
        model: the graph.
        scales: name of the input [values] of scales.
        zero_points: name of the input [values] of zero points.
        errors: for every copy the number of the value it rounds, the output that holds its squared error, and the
            output that holds the squared result of its layer; of a matrix product with a weight both for each row.
    """

    def __init__(
        self, model: ir.Model, placement: Placement, values: Sequence[str], dtype: Dtype, biases_corrected: bool
    ) -> None:
        self.model = model.clone()
        self._graph = self.model.graph
        self._names = Names(self.model)
        self._opset = self.model.opset_imports.get("", 0)
        self._biases_corrected = biases_corrected
        nodes = {node.name: node for node in self._graph}
        placed = [nodes[operand.edge.node] for layer in placement.layers for operand in layer.operands]
        self._activations = {node: activation_of(node.outputs[0]) for node in placed}
        self._graph.outputs.clear()
        scales = self._input("scales", ir.DataType.FLOAT, len(values))
        zero_points = self._input("zero_points", dtype.onnx, len(values))
        self.scales, self.zero_points = scales.name or "", zero_points.name or ""
        self.errors: list[tuple[int, str, str]] = []
        index = {value: number for number, value in enumerate(values)}
        rounded: dict[str, ir.Value] = {}
        for layer in placement.layers:
            for operand in layer.operands if not layer.reason else ():
                if operand.channel_axis is None and operand.value in index:
                    node = nodes[operand.edge.node]
                    if operand.value not in rounded:
                        value = node.inputs[operand.edge.input]
                        assert value is not None
                        rounded[operand.value] = self._round(value, index[operand.value], scales, zero_points)
                    self._shadow(node, operand.edge.input, rounded[operand.value], index[operand.value])

    def relative_errors(self, results: Mapping[str, npt.NDArray[Any]], values: int) -> npt.NDArray[np.float64]:
        """[values] the error of every value over the layers that read it; nan where none does."""
        total = np.full(values, np.nan)
        for number, error, energy in self.errors:
            power = results[energy].astype(np.float64).reshape(-1)
            with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is no candidate
                rows = loudness(power)
                share = float(rows @ results[error].reshape(-1)) / max(float(rows @ power), 1e-30)
            total[number] = share if np.isnan(total[number]) else total[number] + share
        return total

    def _round(self, value: ir.Value, number: int, scales: ir.Value, zero_points: ir.Value) -> ir.Value:
        position = self._constant(np.array(number, np.int64))
        scale = self._add("Gather", [scales, position])
        zero_point = self._add("Gather", [zero_points, position])
        if value.dtype not in (None, ir.DataType.FLOAT):
            scale = self._add("Cast", [scale], to=int(value.dtype))
        codes = self._add("QuantizeLinear", [value, scale, zero_point])
        return self._add("DequantizeLinear", [codes, scale, zero_point])

    def _shadow(self, node: ir.Node, index: int, rounded: ir.Value, number: int) -> None:
        inputs = [rounded if position == index else value for position, value in enumerate(node.inputs)]
        result, original = self._copy(node, inputs), node.outputs[0]
        activation = self._activations[node]
        if activation is not None:  # what it cuts off is no error
            copies: dict[ir.Value | None, ir.Value] = {original: result}
            for each in activation.nodes:
                copies[each.outputs[0]] = self._copy(each, [copies.get(value, value) for value in each.inputs])
            result, original = copies[activation.result], activation.result
        error = self._float(self._add("Sub", [result, original]))
        dimensions = rank(node.outputs[0])
        linear = linear_of(node)
        if self._biases_corrected and linear is not None and dimensions and (linear.bias or node.op_type != "MatMul"):
            channel = 1 if node.op_type in CONVOLUTIONS else dimensions - 1
            mean = self._reduce("ReduceMean", error, [axis for axis in range(dimensions) if axis != channel], 1)
            error = self._add("Sub", [error, mean])
        by_row = linear is not None and node.op_type in ("MatMul", "Gemm") and dimensions
        axes = [dimensions - 1] if by_row and dimensions else list(range(dimensions or 0))
        energy = self._reduce("ReduceSumSquare", self._float(original), axes, 0)
        squared = self._reduce("ReduceSumSquare", error, axes, 0)
        for output in (squared, energy):
            output.type = ir.TensorType(ir.DataType.FLOAT)
            self._graph.outputs.append(output)
        self.errors.append((number, squared.name or "", energy.name or ""))

    def _copy(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Value:
        name, attributes = self._names.fresh(f"{node.name}_auto_copy"), list(node.attributes.values())
        copy = ir.Node(node.domain, node.op_type, inputs, attributes, name=name)
        copy.outputs[0].name = self._names.fresh(f"{node.name}_copy_output")
        self._graph.append(copy)
        return copy.outputs[0]

    def _reduce(self, op: str, value: ir.Value, axes: list[int], keepdims: int) -> ir.Value:
        """A reduction over some axes; over all where none is given."""
        if not axes or self._opset < _AXES_ARE_AN_INPUT:
            return self._add(op, [value], keepdims=keepdims, **({"axes": axes} if axes else {}))
        return self._add(op, [value, self._constant(np.array(axes, np.int64))], keepdims=keepdims)

    def _float(self, value: ir.Value) -> ir.Value:
        return self._add("Cast", [value], to=int(ir.DataType.FLOAT))

    def _add(self, op: str, inputs: list[ir.Value], **attributes: int | list[int]) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=self._names.fresh(f"auto_{op}"))
        node.outputs[0].name = self._names.fresh(f"auto_{op}_output")
        self._graph.append(node)
        return node.outputs[0]

    def _constant(self, array: npt.NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(array, name=self._names.fresh("auto_constant"))
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        value.const_value = tensor
        self._graph.register_initializer(value)
        return value

    def _input(self, stem: str, dtype: ir.DataType, size: int) -> ir.Value:
        value = ir.Value(name=self._names.fresh(stem), type=ir.TensorType(dtype), shape=ir.Shape([size]))
        self._graph.inputs.append(value)
        return value


def best_throughout(
    model: ir.Model,
    plans: Sequence[QuantPlan],
    batches: Sequence[Batch],
    *,
    biases_corrected: bool = True,
    usual: int = 0,
    margin_db: float = 0.0,
) -> int:
    """Which of several plans keeps the outputs best.

    Args:
        model: the prepared float model; it is not changed.
        plans: without bias corrections; they quantize the same edges and differ in the scales of activations only.
        batches: inputs to measure on, at least one.
        biases_corrected: whether biases are corrected in each batch.
        usual: the index of the plan that is taken when no other is better by more than `margin_db`.
        margin_db: see `usual`.

    Returns:
        The index of the plan; `usual` when no output can be compared.
    """
    both = side_by_side(model, plans[0], bias_edges(model, plans[0]) if biases_corrected else {})
    graph = both.model.graph
    graph.outputs.clear()
    pairs = []
    for output in model.graph.outputs:
        original = next((v for node in graph for v in node.outputs if v.name == output.name), None)
        twin = both.twins.get(output.name or "")
        if original is None or isinstance(original.type, ir.SequenceType | ir.OptionalType):
            continue
        if twin is not None and twin is not original:
            graph.outputs.extend([original, twin])
            pairs.append((original.name or "", twin.name or ""))
    if not pairs:
        return usual
    fed = _feed_scales(model, plans[0], both)
    runner = session(both.model)
    worst = []
    for plan in plans:
        scales: dict[str, npt.NDArray[Any]] = {}
        for tensor in plan.activations:
            scale, zero_point, kind = fed[tensor.value]
            scales[scale] = np.array(tensor.scale[0], kind)
            scales[zero_point] = np.array((tensor.zero_point or (0,))[0]).astype(tensor.dtype.numpy)
        results = [runner.run({**batch, **scales}) for batch in batches]
        ratios = [
            difference(
                name, *(np.concatenate([each[key].reshape(-1) for each in results]) for key in (name, twin))
            ).sqnr_db
            for name, twin in pairs
        ]
        worst.append(min((ratio for ratio in ratios if not np.isnan(ratio)), default=-np.inf))
    best = int(np.argmax(worst))
    return best if worst[best] > worst[usual] + margin_db else usual


def _feed_scales(model: ir.Model, plan: QuantPlan, both: SideBySide) -> dict[str, tuple[str, str, np.dtype[Any]]]:
    """Turns scales and zero points of activations into inputs; their names and the scale's type by value."""
    quantized = model.clone()
    InsertQDQ(plan)(quantized)
    names = {
        node.inputs[0].name: [both.twins[value.name or ""] for value in node.inputs[1:3] if value is not None]
        for node in quantized.graph
        if node.op_type == "QuantizeLinear" and node.inputs[0] is not None
    }
    graph, fed = both.model.graph, {}
    for tensor in plan.activations:
        scale, zero_point = names[tensor.value]
        for value in (scale, zero_point):
            del graph.initializers[value.name or ""]
            value.const_value = None
            graph.inputs.append(value)
        dtype = scale.dtype or ir.DataType.FLOAT
        fed[tensor.value] = (scale.name or "", zero_point.name or "", dtype.numpy())
    return fed
