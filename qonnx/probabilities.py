"""Attention's probabilities on few codes: how far their grid reaches, and what is taken off the values for it.

Of the probabilities P that a Softmax gives to many keys, most are smaller than a step of 1/127, and rounding takes some
of their sum away. What that does to the result depends on the values V,

    e_q = sum_k d_qk v_k            d = Q(P) - P

but an offset of the values is free: rows of P sum to 1, so P (V - 1 c') = P V - 1 c', which biases absorb on both sides
exactly. With s_q = sum_k d_qk, the offset that leaves the least error is that of a linear regression,

    c = sum_q s_q e_q / sum_q s_q^2         per channel

with s and e less their means where biases are corrected later. It stays among the values of its channel: where s hardly
varies, as over so many keys that all probabilities round to 0, the regression finds nothing but noise. The other choice
is where the grid ends: below 1 its steps are finer, and the few probabilities beyond are cut off. Both are chosen
together, by the error of the product with values rounded too, on samples that the offsets were not fitted on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.attention import values_index
from qonnx.channel_steps import follow
from qonnx.channels import FOREIGN, Blocked, Channels
from qonnx.graph import Names, rank
from qonnx.groups import SmoothGroup
from qonnx.matching import between
from qonnx.numerics import Dtype, scale_and_zero_point
from qonnx.passes.initializers import store
from qonnx.passes.rescale_channels import Rescaling
from qonnx.placement import Placement
from qonnx.ranges import Range
from qonnx.rebatch import Batch, has_batch_axis, rows, together
from qonnx.runtime import input_specs, session
from qonnx.watching import watching

# Where the grid may end: parts of 1, or of the largest probability where that is smaller than all of them.
ENDS = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)

# Elements of probabilities that are looked at in all.
_ELEMENTS = 1 << 23
_MOST_SAMPLES = 64

METHOD = "values centred for their probabilities"

Floats = npt.NDArray[np.float32]
Results = Mapping[str, Floats]
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Attention:
    """The second product of an attention, quantized.

    Attributes:
        probabilities: the name of what it reads first, [..., queries, keys].
        values: the name of what it reads second, [..., keys, elements].
        group: whose channels the values are; None where no offset can be taken off them.
        channels: of the group, in the result [..., queries, elements].
    """

    probabilities: str
    values: str
    group: SmoothGroup | None = None
    channels: Channels | None = None


@dataclass(frozen=True, eq=False)
class Grids:
    """What was chosen.

    Attributes:
        ranges: of probabilities, by value name; those that end at 1 are left out.
        rescalings: offsets of values.
    """

    ranges: Mapping[str, Range]
    rescalings: tuple[Rescaling, ...]


def attentions(model: ir.Model, placement: Placement, groups: Sequence[SmoothGroup]) -> Iterator[Attention]:
    """Every attention whose probabilities are quantized.

    Args:
        model: prepared.
        placement: of this model.
        groups: of this model, found without nodes at run time.
    """
    quantized = {layer.node for layer in placement.layers if not layer.reason}
    for node in model.graph:
        if node.name not in quantized or node.op_type != "MatMul" or values_index(node) != 1:
            continue
        read, values = node.inputs[0], node.inputs[1]
        if read is None or values is None or read.name not in placement.probabilities:
            continue
        found = Attention(read.name or "", values.name or "")
        for group in groups:
            if not group.no_shift and group.free.any() and not group.clips and rank(values) == rank(node.outputs[0]):
                channels = _channels(model.graph, group, values)
                if channels is not None:
                    found = Attention(found.probabilities, found.values, group, channels)
                    break
        yield found


def _channels(graph: ir.Graph, group: SmoothGroup, value: ir.Value) -> Channels | None:
    """The channels of a group in a value; None where they are not in it."""
    known = {group.producer.value: group.producer.channels}
    path = set(between(group.producer.value, [value]))
    for node in (node for node in graph if node in path):
        read = {index: known[one] for index, one in enumerate(node.inputs) if one in known}
        try:
            known.update(follow(node, read).outputs)
        except Blocked:
            return None
    return known.get(value)


def choose_grids(
    model: ir.Model,
    found: Sequence[Attention],
    fit: Sequence[Batch],
    judge: Sequence[Batch],
    dtype: Dtype,
    *,
    symmetric: bool,
    biases_corrected: bool,
    ends: Sequence[float] = ENDS,
) -> Grids:
    """Chooses where the grids of probabilities end, and the offsets of values; nothing is changed.

    Args:
        model: prepared; its weights are read.
        found: what to choose for.
        fit: batches that offsets are fitted on.
        judge: other batches, that both are chosen on.
        dtype: of the codes of activations, an integer type.
        symmetric: whether 0 is in the middle of the grid.
        biases_corrected: whether a constant error per channel will be corrected.
        ends: where the grid may end, see `ENDS`; 1 first.
    """
    ranges: dict[str, Range] = {}
    rescalings: dict[str, Rescaling] = {}
    if not found:
        return Grids({}, ())
    looks = Looks(model, found, fit[0])
    seen, unseen = looks.at(fit), looks.at(judge)
    for one in found:
        probe = _Probe(one, seen, unseen, dtype, symmetric, biases_corrected)
        shifted = one.group is not None and one.group.value not in rescalings
        tried = [entry for end in probe.within_reach(ends) if np.isfinite((entry := probe.tried(end, shifted))[0])]
        _, end, offsets = min(tried, key=lambda entry: entry[0], default=(0.0, ends[0], None))
        if end != ends[0]:
            ranges[one.probabilities] = Range(0.0, end, f"softmax up to {end:g}")
        if offsets is not None and one.group is not None:
            rescalings[one.group.value] = Rescaling(one.group, np.ones_like(offsets), offsets, METHOD)
    return Grids(ranges, tuple(rescalings.values()))


class Looks:
    """Runs a model for probabilities and values: on a few samples, and of long sequences for some queries only."""

    def __init__(self, model: ir.Model, found: Sequence[Attention], batch: Batch) -> None:
        self._divisible = has_batch_axis(batch, input_specs(model))
        first = together([batch], 1) if self._divisible else batch
        probabilities = [one.probabilities for one in found]
        shapes = session(watching(model, {name: (name, _shape) for name in probabilities})[0]).run(first)
        elements = sum(int(np.prod(shape)) for shape in shapes.values())
        self._samples = int(np.clip(_ELEMENTS // max(elements, 1), 1, _MOST_SAMPLES))
        queries = functools.partial(_queries, step=-(-elements // _ELEMENTS))
        wanted = {one.values: (one.values, _whole) for one in found}
        watched, self._outputs = watching(model, {**wanted, **{name: (name, queries) for name in probabilities}})
        self._session = session(watched)

    def at(self, batches: Sequence[Batch]) -> list[Results]:
        """Probabilities and values by name, for some batches."""
        left, results = self._samples, list[Results]()
        for batch in batches:
            few = together([batch], left) if self._divisible else batch
            found = self._session.run(few)
            results.append({name: np.asarray(found[output], np.float32) for name, output in self._outputs.items()})
            left -= rows(few) if self._divisible else left
            if left <= 0:
                break
        return results


def _whole(graph: ir.Graph, names: Names, value: ir.Value) -> ir.Value:
    return value


def _shape(graph: ir.Graph, names: Names, value: ir.Value) -> ir.Value:
    return _append(graph, names, "Shape", [value], ir.TensorType(ir.DataType.INT64))


def _queries(graph: ir.Graph, names: Names, value: ir.Value, step: int) -> ir.Value:
    """Every `step`-th row."""
    bounds = [
        store(graph, names.fresh(f"{value.name}/{word}"), ir.tensor(np.array([number], np.int64)))
        for word, number in (("starts", 0), ("ends", np.iinfo(np.int64).max), ("axes", -2), ("steps", step))
    ]
    return _append(graph, names, "Slice", [value, *bounds], value.type)


def _append(
    graph: ir.Graph, names: Names, op: str, inputs: Sequence[ir.Value], kind: ir.TypeProtocol | None
) -> ir.Value:
    node = ir.node(op, inputs, name=names.fresh(f"{inputs[0].name}/{op}"))
    node.outputs[0].name, node.outputs[0].type = names.fresh(f"{inputs[0].name}/watched"), kind
    graph.append(node)
    return node.outputs[0]


class _Probe:
    """Errors of one product, behind grids and offsets to choose from."""

    def __init__(
        self,
        one: Attention,
        seen: Sequence[Results],
        unseen: Sequence[Results],
        dtype: Dtype,
        symmetric: bool,
        biases_corrected: bool,
    ) -> None:
        self._one, self._dtype, self._symmetric, self._biases_corrected = one, dtype, symmetric, biases_corrected
        self._seen = [(result[one.probabilities], result[one.values]) for result in seen]
        self._unseen = [(result[one.probabilities], result[one.values]) for result in unseen]
        self._exact = [p @ v for p, v in self._unseen]
        self._rounded_values = self._rounded([v for _, v in self._unseen])

    def within_reach(self, ends: Sequence[float]) -> tuple[float, ...]:
        """The ends to try, in parts of the largest probability where all that were seen are small."""
        reach = max(float(p.max()) for p, _ in self._seen)
        if len(ends) == 1 or not 0 < reach < min(ends):
            return tuple(ends)
        return (ends[0], reach, *(end * reach for end in ends[1:]))

    def tried(self, end: float, shifted: bool) -> tuple[float, float, Vector | None]:
        """The error with a grid that ends there, the end, and the offsets of the values where they lower the error."""
        rounded = self._rounded([p for p, _ in self._unseen], end)
        plain = self._error(
            p @ v - exact for p, v, exact in zip(rounded, self._rounded_values, self._exact, strict=True)
        )
        group, channels = self._one.group, self._one.channels
        if not shifted or group is None or channels is None:
            return plain, end, None
        offsets = self._offsets(end, group, channels)
        moved: Floats = channels.spread(offsets, 0.0, self._exact[0].ndim).astype(np.float32)
        values = self._rounded([v - moved for _, v in self._unseen])
        centred = self._error(p @ v - (exact - moved) for p, v, exact in zip(rounded, values, self._exact, strict=True))
        return (centred, end, offsets) if centred < plain else (plain, end, None)

    def _offsets(self, end: float, group: SmoothGroup, channels: Channels) -> Vector:
        """[channels] the offsets that leave the least error when probabilities are rounded."""
        rounded = self._rounded([p for p, _ in self._seen], end)
        sums, errors = [], []
        for (p, v), q in zip(self._seen, rounded, strict=True):
            result = (q - p) @ v
            errors.append(self._by_channel(result))
            sums.append(self._by_channel(np.broadcast_to((q - p).sum(axis=-1, keepdims=True), result.shape)))
        s, e = self._varying(np.concatenate(sums, axis=1)), self._varying(np.concatenate(errors, axis=1))
        size, index = group.producer.size, channels.index.reshape(-1)
        ours = index != FOREIGN
        above, below = np.zeros(size), np.zeros(size)
        np.add.at(above, index[ours], np.einsum("cn,cn->c", s, e)[ours])
        np.add.at(below, index[ours], np.einsum("cn,cn->c", s, s)[ours])
        values = np.concatenate([self._by_channel(v) for _, v in self._seen], axis=1)
        low, high = np.full(size, np.inf), np.full(size, -np.inf)
        np.minimum.at(low, index[ours], values.min(axis=1)[ours])
        np.maximum.at(high, index[ours], values.max(axis=1)[ours])
        offsets = np.clip(np.divide(above, below, out=np.zeros(size), where=below > 0), low, high)
        seen = low <= high  # the others are channels of the group that another product reads
        return np.asarray(np.where(group.free & seen, offsets, 0.0))

    def _error(self, errors: Iterable[npt.NDArray[np.floating[Any]]]) -> float:
        e = self._varying(np.concatenate([self._by_channel(error) for error in errors], axis=1))
        return float(np.einsum("cn,cn->", e, e))

    def _varying(self, x: Vector) -> Vector:
        """Without what a bias per channel takes up."""
        return x - x.mean(axis=1, keepdims=True) if self._biases_corrected else x

    def _rounded(self, arrays: Sequence[Floats], end: float | None = None) -> list[Floats]:
        """On one grid: from 0 to an end, or of the range of all of them."""
        low = 0.0 if end is not None else min(float(x.min()) for x in arrays)
        high = end if end is not None else max(float(x.max()) for x in arrays)
        scale, zero_point = scale_and_zero_point(low, high, self._dtype, symmetric=self._symmetric)
        least, most = ((code - int(zero_point)) * scale for code in (self._dtype.minimum, self._dtype.maximum))
        return [np.clip(np.rint(x / scale) * scale, least, most) for x in arrays]

    def _by_channel(self, x: npt.NDArray[np.floating[Any]]) -> Vector:
        """[elements of the channel index, all others], in the order of that index; without one, of the last axis."""
        axes = (x.ndim - 1,) if self._one.channels is None else self._one.channels.axes
        moved = np.moveaxis(x, axes, range(len(axes)))
        return moved.reshape(int(np.prod(moved.shape[: len(axes)])), -1).astype(np.float64)
