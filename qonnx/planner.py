"""Makes a plan: where to quantize (`qonnx.placement`), and with which scales."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.activation_scales import channel_axes, channel_ends
from qonnx.graph import FLOAT_TYPES, float32
from qonnx.numerics import Blocked, Dtype, Granularity, PerAxis, PerTensor, scale_and_zero_point
from qonnx.placement import Edge, Placement, StoredWeight, place
from qonnx.plan import FloatOperators, LayerPlan, QuantPlan, TensorPlan
from qonnx.ranges import Range
from qonnx.recipe import Clip, Format, PerBlock, Recipe
from qonnx.statistics import Statistics, TensorStatistics
from qonnx.targets import Target
from qonnx.weight_layers import fitting_block_size
from qonnx.weight_scales import weight_scales

# Scales per token are found for whole rows, however long these are when the model runs.
_WHOLE_AXIS = 2**31 - 1

# Probabilities get a grid of their own size where it is so much shorter than 1. It leaves room for what was not seen.
_SMALL = 1 / 8
_UNSEEN = 2


def make_plan(
    model: ir.Model,
    statistics: Statistics,
    ranges: Mapping[str, Range],
    recipe: Recipe,
    target: Target,
    leave: Mapping[str, str] | None = None,
) -> QuantPlan:
    """Decides everything: where (`qonnx.placement`), and with which scales.

    Args:
        model: the prepared float model.
        statistics: of the values that `qonnx.placement.candidates` names.
        ranges: what the calibrator makes of them; outputs of a Softmax that have none reach from 0 to 1, or
            to twice the largest that was seen where that is much less.
        recipe: resolved for the target.
        target: the consumer of the quantized graph.
        leave: node names of layers to leave in float, each with the reason.
    """
    draft = place(model, recipe, target, leave)
    known = {**{value: _probabilities(statistics.tensors.get(value)) for value in draft.probabilities}, **ranges}
    if recipe.format.calibrated:
        unfit = _unfit(draft, statistics, known, recipe, _grids(model.graph, draft, recipe, target))
        placement = place(model, recipe, target, {**unfit, **(leave or {})})
        grids = _grids(model.graph, placement, recipe, target)
        activations = _activation_plans(model.graph, placement, statistics, known, grids)
    else:
        placement = draft
        activations = tuple(_run_time_activations(model.graph, placement, recipe))
    layers = tuple(
        LayerPlan(node=layer.node, op=layer.op, output=layer.output, path=layer.path, reason=layer.reason)
        for layer in placement.layers
    )
    return QuantPlan(
        target=target.name,
        recipe=recipe.name,
        activations=activations,
        weights=_weight_plans(model.graph, placement, recipe, target),
        layers=layers,
        float_operators=tuple(FloatOperators(op, *entry) for op, entry in placement.float_operators.items()),
        format=recipe.format,
        operators=recipe.operators,
    )


class _Grid(NamedTuple):
    """The grid of an activation.

    Attributes:
        dtype: the type of the codes.
        symmetric: whether 0 is in its middle.
        axis: along which channels have scales of their own; None for one scale.
        block_size: how many neighbouring channels share a scale.
    """

    dtype: Dtype
    symmetric: bool
    axis: int | None = None
    block_size: int = 1

    @property
    def granularity(self) -> Granularity:
        """Which elements share a scale."""
        return PerTensor() if self.axis is None else PerAxis(self.axis)

    def scale(
        self, value: str, observed: TensorStatistics | None, low: float, high: float
    ) -> tuple[npt.NDArray[np.float32], tuple[int, ...]]:
        """Scales and zero points, the latter empty when all are 0; `low` and `high` are the ends of the whole."""
        ends = (np.float32(low), np.float32(high))
        if self.axis is not None and observed is not None:
            ends = channel_ends(value, observed, self.block_size)  # type: ignore[assignment]
        scale, zero_point = scale_and_zero_point(*ends, self.dtype, symmetric=self.symmetric)
        return scale, tuple(map(int, np.ravel(zero_point))) if np.any(zero_point) else ()


def _dtype(recipe: Recipe) -> Dtype:
    dtype = recipe.activations.dtype
    return Dtype.INT8 if isinstance(dtype, msgspec.UnsetType) else dtype


def _grids(graph: ir.Graph, placement: Placement, recipe: Recipe, target: Target) -> dict[str, _Grid]:
    """The grid of every activation: the finest that a rule wants for it, or for one that shares its scale."""
    usual = _dtype(recipe)
    wanted: dict[str, Dtype] = {}
    operands = [(layer, operand) for layer in placement.layers for operand in layer.operands]
    for layer, operand in operands:
        dtype, group = layer.settings.activation or usual, placement.ties.get(operand.value, operand.value)
        wanted[group] = max(wanted.get(group, dtype), dtype, key=lambda kind: kind.bits)
    names = [*placement.activations, *(operand.value for _, operand in operands)]
    granularity = recipe.activations.granularity
    axes = {} if isinstance(granularity, PerTensor) else channel_axes(graph, set(names) - placement.probabilities)
    size = granularity.block_size if isinstance(granularity, PerBlock) else 1
    return {
        name: _Grid(wanted.get(placement.ties.get(name, name), usual), target.symmetric, axes.get(name), size)
        for name in names
    }


def _unfit(
    draft: Placement,
    statistics: Statistics,
    ranges: Mapping[str, Range],
    recipe: Recipe,
    grids: Mapping[str, _Grid],
) -> dict[str, str]:
    """Layers that no scale can save: an operand was never observed, is not finite, or would mostly be rounded away."""
    reasons = {}
    for layer in draft.layers:
        if layer.reason:
            continue
        for operand in layer.operands:
            if operand.channel_axis is None:
                reason = _unfit_activation(operand.value, statistics, ranges, recipe, grids[operand.value])
                if reason:
                    reasons[layer.node] = reason
                    break
    return reasons


def _probabilities(observed: TensorStatistics | None) -> Range:
    """The range of what a Softmax makes, over so many keys maybe that steps of 1/127 would round all of it to 0."""
    if observed is None or not observed.count or not 0 < _UNSEEN * observed.maximum < _SMALL:
        return Range(0.0, 1.0, "softmax")
    return Range(0.0, _UNSEEN * observed.maximum, f"softmax, {_UNSEEN} times the largest")


def _unfit_activation(
    value: str, statistics: Statistics, ranges: Mapping[str, Range], recipe: Recipe, grid: _Grid
) -> str:
    observed = statistics.tensors.get(value)
    if observed is None or observed.count == 0 or value not in ranges:
        finite = observed is None or observed.finite
        return (
            f"its input {value} was not observed in calibration"
            if finite
            else f"its input {value} is not always finite"
        )
    if not observed.finite:
        return f"its input {value} is not always finite"
    if observed.mean_square == 0:
        return f"its input {value} was 0 in all of the data: nothing tells how far it reaches"
    low, high, _ = ranges[value]
    sqnr = _rounding_sqnr(observed, grid.scale(value, observed, low, high)[0])
    if sqnr < recipe.minimum_sqnr_db:
        spread = max(-low, high) / max(math.sqrt(observed.mean_square), 1e-30)
        return f"its input {value} would keep {sqnr:.1f} dB: its largest element is {spread:.0f} times its RMS"
    return ""


def _rounding_sqnr(observed: TensorStatistics, scale: npt.NDArray[np.float32]) -> float:
    """Signal over rounding noise, taken as uniform over one step: E[x^2] / (step^2 / 12), in dB."""
    if observed.mean_square == 0:
        return math.inf
    return 10 * math.log10(12 * observed.mean_square / float(np.mean(np.square(scale, dtype=np.float64))))


def _activation_plans(
    graph: ir.Graph,
    placement: Placement,
    statistics: Statistics,
    ranges: Mapping[str, Range],
    grids: Mapping[str, _Grid],
) -> tuple[TensorPlan, ...]:
    tied: dict[str, list[Range]] = {}
    for value in placement.activations:
        if value in ranges:
            tied.setdefault(placement.ties[value], []).append(ranges[value])
    dtypes = {value.name: value.dtype for node in graph for value in (*node.inputs, *node.outputs) if value is not None}
    plans = []
    for value, edges in placement.activations.items():
        if value not in ranges:
            continue
        group, grid = tied[placement.ties[value]], grids[value]
        low, high = min(entry.low for entry in group), max(entry.high for entry in group)
        observed = statistics.tensors.get(value)
        scale, zero_point = grid.scale(value, observed, low, high)
        sqnr = math.inf if observed is None else _rounding_sqnr(observed, scale)
        source = ranges[value].source
        plans.append(
            TensorPlan(
                value=value,
                edges=edges,
                dtype=grid.dtype,
                granularity=grid.granularity,
                scale=_floats(_stored(scale, dtypes[value])),
                zero_point=zero_point,
                low=low,
                high=high,
                sqnr_db=round(sqnr, 2) if math.isfinite(sqnr) else None,
                source=source if len(group) == 1 else f"{source}, shared by {len(group)} tensors",
            )
        )
    return tuple(plans)


def _run_time_activations(graph: ir.Graph, placement: Placement, recipe: Recipe) -> Iterator[TensorPlan]:
    """Activations that are measured when the model runs; what a Softmax writes reaches from 0 to 1 in any case."""
    nodes = {node.name: node for node in graph}
    rows: dict[tuple[str, int], list[Edge]] = {}
    for value, edges in placement.activations.items():
        if recipe.format is Format.DYNAMIC and value in placement.probabilities:
            scale, _ = scale_and_zero_point(0.0, 1.0, Dtype.UINT8, symmetric=False)
            yield TensorPlan(value, edges, Dtype.UINT8, PerTensor(), _floats(scale), (), 0.0, 1.0, source="softmax")
        elif recipe.format is Format.DYNAMIC:
            yield TensorPlan(value, edges, Dtype.UINT8, PerTensor(), (), source="run time")
        else:
            for edge in edges:
                rows.setdefault((value, _summed_axis(nodes[edge.node], edge.input)), []).append(edge)
    for (value, axis), read in rows.items():
        yield TensorPlan(value, tuple(read), Dtype.INT8, Blocked(axis, _WHOLE_AXIS), (), source="run time")


def _summed_axis(node: ir.Node, index: int) -> int:
    """The axis of an operand of a product that is summed over, from the back."""
    if node.op_type == "Gemm":
        return -2 if node.attributes.get_int("transA", 0) else -1
    return -2 if index else -1


def _weight_plans(graph: ir.Graph, placement: Placement, recipe: Recipe, target: Target) -> tuple[TensorPlan, ...]:
    plans = []
    for stored, edges in placement.weights.items():
        tensor = graph.initializers[stored.value].const_value
        if tensor is None or tensor.dtype not in FLOAT_TYPES:
            continue
        how = stored.how
        granularity = _granularity(stored, tensor.shape.numpy(), target)
        # Zero points that differ between columns are more than integer products take.
        symmetric = how.dtype.signed or target.symmetric or recipe.format is not Format.WEIGHT_ONLY
        scale, zeros = weight_scales(
            float32(tensor.numpy()), how.dtype, granularity, symmetric=symmetric, clip=how.clip
        )
        plans.append(
            TensorPlan(
                value=stored.value,
                edges=edges,
                dtype=how.dtype,
                granularity=granularity,
                scale=_floats(_stored(scale, tensor.dtype)),
                zero_point=tuple(map(int, np.ravel(zeros))) if zeros.any() else (),
                source="absmax" if how.clip is Clip.NONE else how.clip,
                rounding=how.rounding,
            )
        )
    return tuple(plans)


def _granularity(stored: StoredWeight, shape: Sequence[int], target: Target) -> Granularity:
    match stored.how.granularity:
        case PerTensor():
            return PerTensor()
        case PerBlock(block_size=size) if stored.block_axis is not None:
            return Blocked(stored.block_axis, fitting_block_size(size, shape[stored.block_axis], target))
    return PerAxis(stored.channel_axis)


def _stored(scale: npt.NDArray[np.float32], dtype: ir.DataType | None) -> npt.NDArray[np.float32]:
    """The scale as it will be stored, in the float type of the graph; never rounded down to 0."""
    if dtype is None or dtype == ir.DataType.FLOAT:
        return scale
    kind = dtype.numpy()
    smallest = np.float32(2.0**-24 if dtype == ir.DataType.FLOAT16 else 2.0**-126)
    return np.maximum(scale, smallest).astype(kind).astype(np.float32)


def _floats(array: npt.NDArray[np.float32]) -> tuple[float, ...]:
    """Float32 values as the shortest decimals that read back to the same float32."""
    return tuple(float(str(value)) for value in np.ravel(np.asarray(array, np.float32)))
