"""Gives the weights of a plan the codes that disturb the results of their layers least, measured on calibration data.

A plan says which scales a weight has; which code each element gets is decided when it is written, by rounding. So
weights that are to get other codes are put into the model as what these codes stand for: rounding gives them back.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.errors import DataError
from qonnx.gptq import DAMPENING, Factor, factor, round_with_feedback
from qonnx.graph import float32, rank
from qonnx.hessians import Inputs, Moments, hessians, inputs_of
from qonnx.linear import Linear, linears
from qonnx.numerics import Blocked, dequantize
from qonnx.passes.insert_qdq import parameters
from qonnx.plan import QuantPlan, TensorPlan
from qonnx.rebatch import Batch, rows
from qonnx.recipe import Rounding

# More Hessians than this are not kept at a time: the layers are worked off in parts, at one pass over the data each.
_BYTES = 4 << 30

# Of few samples, errors are hidden in directions that only others have. The dampening of n samples is that of many and
# the n-th part of this: 8 texts want 0.3, 64 want 0.03, for INT8 weights of a sentence encoder. Where rows (tokens) are
# fewer than inputs, as in heads, it is more: by (inputs / rows)^2 times the other, of which a little is enough. With
# 0.25 CREPE keeps 33 dB, with this 35.
_DAMPENING_OF_ONE_SAMPLE = 2.0
_DAMPENING_OF_ONE_ROW_EACH = 0.01

# Codes of more bits do not survive in a weight of these types, and rounding costs nothing then.
_MOST_BITS = {ir.DataType.FLOAT: 8, ir.DataType.FLOAT16: 8, ir.DataType.BFLOAT16: 4}


class Rounded(NamedTuple):
    """What became of a model and its plan.

    Attributes:
        model: with other weights; the same object where nothing was done.
        plan: says of each weight how its codes were really chosen.
        notes: what is to be said about it.
    """

    model: ir.Model
    plan: QuantPlan
    notes: tuple[str, ...] = ()


class _Stored(NamedTuple):
    """A weight, and the layers that read it."""

    tensor: TensorPlan
    layers: tuple[Linear, ...]
    weight: ir.TensorProtocol

    @property
    def inputs(self) -> tuple[Inputs, ...]:
        return tuple(inputs_of(layer) for layer in self.layers)


def asks_for_data(plan: QuantPlan) -> bool:
    """Whether the codes of some weight depend on what its layer reads."""
    return any(tensor.rounding is not Rounding.NEAREST for tensor in plan.weights)


def round_weights(
    model: ir.Model, plan: QuantPlan, batches: Sequence[Batch], corrected: Collection[str] = ()
) -> Rounded:
    """Chooses the codes of all weights of which the plan says so.

    Where a bias takes up what rounding does to the mean of a result, that costs nothing, and the codes are those that
    disturb the rest least.

    Args:
        model: the prepared float model that the plan was made for; it is not changed.
        plan: the scales are kept.
        batches: calibration data; without any, weights are rounded to nearest.
        corrected: node names of the layers whose biases take up the mean over all that they make: see
            `qonnx.bias_correction`.
    """
    wanted = [tensor for tensor in plan.weights if tensor.rounding is not Rounding.NEAREST]
    if not wanted:
        return Rounded(model, plan)
    found = [] if not batches else list(_stored(model, wanted))
    changed = model.clone()
    samples = max(1, sum(map(rows, batches)))
    done = set()
    for part in _parts(found):
        values = list(dict.fromkeys(each for stored in part for each in stored.inputs))
        sums = hessians(model, values, batches)
        factors: dict[tuple[tuple[Inputs, ...], bool], Factor | None] = {}
        for stored in part:
            key = stored.inputs, all(layer.node.name in corrected for layer in stored.layers)
            if key not in factors:
                factors[key] = _factor([sums[each] for each in stored.inputs if each in sums], key[1], samples)
            by = factors[key]
            if by is not None:
                _put(changed, stored, _codes(stored, by))
                done.add(stored.tensor.value)
    return Rounded(changed if done else model, _as_done(plan, done), _notes(plan, done, bool(batches)))


def _as_done(plan: QuantPlan, done: set[str]) -> QuantPlan:
    weights = tuple(
        tensor if tensor.value in done else msgspec.structs.replace(tensor, rounding=Rounding.NEAREST)
        for tensor in plan.weights
    )
    return msgspec.structs.replace(plan, weights=weights)


def _notes(plan: QuantPlan, done: set[str], measured: bool) -> tuple[str, ...]:
    wanted = sum(tensor.rounding is not Rounding.NEAREST for tensor in plan.weights)
    if not measured:
        return (f"{wanted} weights are rounded to nearest: give data to choose their codes by what layers read (gptq)",)
    left = wanted - len(done)
    notes = [f"codes of {len(done)} weights chosen by what their layers read (gptq)"] if done else []
    if left:
        notes.append(
            f"{left} weights are rounded to nearest: gptq is for matrices and for 1 x 1 convolutions of one group and "
            "stride, and inputs must be finite"
        )
    return tuple(notes)


def _stored(model: ir.Model, wanted: Sequence[TensorPlan]) -> Iterator[_Stored]:
    """The weights that are matrices and nothing else, with the layers that read them so."""
    layers: dict[str | None, list[Linear]] = {}
    for layer in linears(model.graph):
        layers.setdefault(layer.weight.name, []).append(layer)
    for tensor in wanted:
        readers = layers.get(tensor.value, [])
        if not readers:
            continue
        edges = {(reader.name, index) for reader, index in (layer.weight_reader for layer in readers)}
        planned = {(edge.node, edge.input) for edge in tensor.edges}
        value = model.graph.initializers[tensor.value]
        used = {(usage.node.name, usage.idx) for usage in value.uses()}
        if (
            used == planned == edges
            and all(_fits(layer, tensor) for layer in readers)
            and value.const_value is not None
        ):
            yield _Stored(tensor, tuple(readers), value.const_value)


def _fits(layer: Linear, tensor: TensorPlan) -> bool:
    along = not isinstance(tensor.granularity, Blocked) or tensor.granularity.axis == layer.input_axis
    product = rank(layer.weight) == 2 and layer.node.op_type in ("Gemm", "MatMul")
    # With strides, it would not read all that is measured.
    steps = set(layer.node.attributes.get_ints("strides", (1,)))
    one_tap = layer.node.op_type == "Conv" and layer.groups == 1 and set(layer.kernel) == steps == {1}
    matrix = (product or one_tap) and bool(rank(layer.data))
    survives = tensor.dtype.bits <= _MOST_BITS.get(layer.weight.dtype or ir.DataType.FLOAT, 0)
    return matrix and along and survives and not layer.weight.is_graph_output()


def _parts(found: Sequence[_Stored]) -> Iterator[list[_Stored]]:
    """Weights whose Hessians fit into memory together."""
    part: list[_Stored] = []
    sizes: dict[Inputs, int] = {}
    for stored in found:
        new = dict.fromkeys(stored.inputs, 8 * stored.layers[0].input_channels ** 2)
        if part and sum((sizes | new).values()) > _BYTES:
            yield part
            part, sizes = [], {}
        part.append(stored)
        sizes |= new
    if part:
        yield part


def _factor(moments: Sequence[Moments], around: bool, samples: int) -> Factor | None:
    """The Hessian of all that the layers of a weight read, around its mean or not; None where it is of no use."""
    if not moments:
        return None
    hessian = functools.reduce(np.add, (each.scatter if around else each.hessian for each in moments))
    scarce = len(hessian) / sum(each.rows for each in moments)
    dampening = DAMPENING + _DAMPENING_OF_ONE_SAMPLE / samples + _DAMPENING_OF_ONE_ROW_EACH * scarce**2
    try:
        return factor(hessian, dampening)
    except DataError:
        return None


def _codes(stored: _Stored, by: Factor) -> npt.NDArray[Any]:
    """The codes in the shape of the weight."""
    tensor, layer = stored.tensor, stored.layers[0]
    weight = float32(stored.weight.numpy())
    moved = np.moveaxis(weight, layer.input_axis, 0)
    matrix = moved.reshape(len(moved), -1)
    scale, zero_point = parameters(tensor, weight.shape)
    size = tensor.granularity.block_size if isinstance(tensor.granularity, Blocked) else len(matrix)
    steps, zeros = (_by_block(each, tensor, layer, matrix.shape[1]) for each in (scale, zero_point))
    codes = round_with_feedback(matrix, by, steps, zeros, size, tensor.dtype)
    return np.moveaxis(codes.reshape(moved.shape), 0, layer.input_axis)


def _by_block(array: npt.NDArray[Any], tensor: TensorPlan, layer: Linear, outputs: int) -> npt.NDArray[Any]:
    """Scales or zero points as [blocks, outputs]."""
    if isinstance(tensor.granularity, Blocked):
        return np.moveaxis(array, layer.input_axis, 0).reshape(-1, outputs)
    return np.broadcast_to(array, (1, outputs))


def _put(model: ir.Model, stored: _Stored, codes: npt.NDArray[Any]) -> None:
    """Makes the initializer what the codes stand for, computed when it is read: codes take a quarter of the room."""
    tensor, dtype = stored.tensor, stored.weight.dtype
    scale, zero_point = parameters(tensor, codes.shape)

    def evaluate() -> ir.TensorProtocol:
        values = dequantize(codes, scale, zero_point, tensor.granularity)
        return ir.Tensor(values.astype(dtype.numpy()), dtype=dtype)

    lazy = ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(codes.shape), name=tensor.value)
    model.graph.initializers[tensor.value].const_value = lazy
