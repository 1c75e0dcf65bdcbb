"""Gives the weights of a plan the codes that disturb the results of their layers least, measured on calibration data.

A plan says which scales a weight has; which code each element gets is decided when it is written, by rounding. So
weights that are to get other codes are put into the model as what these codes stand for: rounding gives them back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.errors import DataError
from qonnx.gptq import Factor, factor, round_with_feedback
from qonnx.graph import float32, rank
from qonnx.hessians import Inputs, hessians, inputs_of
from qonnx.linear import Linear, linears
from qonnx.numerics import Blocked, dequantize
from qonnx.passes.insert_qdq import parameters
from qonnx.plan import QuantPlan, TensorPlan
from qonnx.rebatch import Batch
from qonnx.recipe import Rounding

# More Hessians than this are not kept at a time: the layers are worked off in parts, at one pass over the data each.
_BYTES = 4 << 30

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

    @property
    def inputs(self) -> tuple[Inputs, ...]:
        return tuple(inputs_of(layer) for layer in self.layers)


def asks_for_data(plan: QuantPlan) -> bool:
    """Whether the codes of some weight depend on what its layer reads."""
    return any(tensor.rounding is not Rounding.NEAREST for tensor in plan.weights)


def round_weights(model: ir.Model, plan: QuantPlan, batches: Sequence[Batch]) -> Rounded:
    """Chooses the codes of all weights of which the plan says so.

    Args:
        model: the prepared float model that the plan was made for; it is not changed.
        plan: the scales are kept.
        batches: calibration data; without any, weights are rounded to nearest.
    """
    wanted = [tensor for tensor in plan.weights if tensor.rounding is not Rounding.NEAREST]
    if not wanted:
        return Rounded(model, plan)
    found = [] if not batches else list(_stored(model, wanted))
    changed = model.clone()
    done = set()
    for part in _parts(found):
        values = list(dict.fromkeys(each for stored in part for each in stored.inputs))
        sums = hessians(model, values, batches)
        factors: dict[tuple[Inputs, ...], Factor] = {}
        for stored in part:
            codes = _codes(model, stored, sums, factors)
            if codes is not None:
                _put(changed, stored.tensor, codes)
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
        notes.append(f"{left} weights are rounded to nearest: gptq is for matrices that only Gemm or MatMul read")
    return tuple(notes)


def _stored(model: ir.Model, wanted: Sequence[TensorPlan]) -> Iterator[_Stored]:
    """The weights that are matrices of Gemm or MatMul and nothing else, with the layers that read them so."""
    layers: dict[str | None, list[Linear]] = {}
    for layer in linears(model.graph):
        layers.setdefault(layer.weight.name, []).append(layer)
    for tensor in wanted:
        readers = layers.get(tensor.value, [])
        edges = {(reader.name, index) for reader, index in (layer.weight_reader for layer in readers)}
        planned = {(edge.node, edge.input) for edge in tensor.edges}
        used = {(usage.node.name, usage.idx) for usage in model.graph.initializers[tensor.value].uses()}
        if used == planned == edges and all(_fits(layer, tensor) for layer in readers):
            yield _Stored(tensor, tuple(readers))


def _fits(layer: Linear, tensor: TensorPlan) -> bool:
    along = not isinstance(tensor.granularity, Blocked) or tensor.granularity.axis == layer.input_axis
    matrix = rank(layer.weight) == 2 and layer.node.op_type in ("Gemm", "MatMul") and bool(rank(layer.data))
    survives = tensor.dtype.bits <= _MOST_BITS.get(layer.weight.dtype or ir.DataType.FLOAT, 0)
    return matrix and along and survives and not layer.weight.is_graph_output()


def _parts(found: Sequence[_Stored]) -> Iterator[list[_Stored]]:
    """Weights whose Hessians fit into memory together."""
    part: list[_Stored] = []
    sizes: dict[Inputs, int] = {}
    for stored in found:
        new = dict.fromkeys(stored.inputs, 4 * stored.layers[0].input_channels ** 2)
        if part and sum((sizes | new).values()) > _BYTES:
            yield part
            part, sizes = [], {}
        part.append(stored)
        sizes |= new
    if part:
        yield part


def _codes(
    model: ir.Model,
    stored: _Stored,
    sums: Mapping[Inputs, npt.NDArray[np.float32]],
    factors: dict[tuple[Inputs, ...], Factor],
) -> npt.NDArray[Any] | None:
    """The codes in the shape of the weight, or None where what its layers read is of no use."""
    tensor, layer, key = stored.tensor, stored.layers[0], stored.inputs
    try:
        if key not in factors:
            factors[key] = factor(functools.reduce(np.add, (sums[each] for each in key)))
    except DataError:
        return None
    weight = model.graph.initializers[tensor.value].const_value
    assert weight is not None
    stored_weight = float32(weight.numpy())
    matrix = np.moveaxis(stored_weight, layer.input_axis, 0)
    scale, zero_point = parameters(tensor, stored_weight.shape)
    size = tensor.granularity.block_size if isinstance(tensor.granularity, Blocked) else len(matrix)
    steps, zeros = (_by_block(each, tensor, layer, matrix.shape[1]) for each in (scale, zero_point))
    codes = round_with_feedback(matrix, factors[key], steps, zeros, size, tensor.dtype)
    return np.moveaxis(codes, 0, layer.input_axis)


def _by_block(array: npt.NDArray[Any], tensor: TensorPlan, layer: Linear, outputs: int) -> npt.NDArray[Any]:
    """Scales or zero points as [blocks, outputs]."""
    if isinstance(tensor.granularity, Blocked):
        return np.moveaxis(array, layer.input_axis, 0)
    return np.broadcast_to(array, (1, outputs))


def _put(model: ir.Model, tensor: TensorPlan, codes: npt.NDArray[Any]) -> None:
    """Makes the initializer what the codes stand for, computed when it is read: codes take a quarter of the room."""
    value = model.graph.initializers[tensor.value]
    old = value.const_value
    assert old is not None
    scale, zero_point = parameters(tensor, codes.shape)

    def evaluate() -> ir.TensorProtocol:
        values = dequantize(codes, scale, zero_point, tensor.granularity)
        return ir.Tensor(values.astype(old.dtype.numpy()), dtype=old.dtype)

    value.const_value = ir.LazyTensor(evaluate, dtype=old.dtype, shape=ir.Shape(codes.shape), name=tensor.value)
