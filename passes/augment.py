"""Adds outputs to a graph that say how large its values are: a few numbers each, or all elements of those to count."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from qonnx.errors import ModelError
from qonnx.graph import Names

OBSERVES = "qonnx.observes"
STATISTIC = "qonnx.statistic"

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)

# Where the axes of a reduction became an input.
AXES_INPUT_OPSET = 18


class Statistic(enum.StrEnum):
    """What an observer output holds. All are float32, but `COUNT`, which is int64.

    Per tensor these are scalars, per channel [channels], and `ELEMENTS` is the value itself.
    """

    COUNT = "count"
    MINIMUM = "minimum"
    MAXIMUM = "maximum"
    SUM_SQUARES = "sum_squares"
    CHANNEL_MINIMUM = "channel_minimum"
    CHANNEL_MAXIMUM = "channel_maximum"
    ELEMENTS = "elements"


class Observer(NamedTuple):
    """One output that `AddObservers` added: its name, the value it watches, and what it holds of it."""

    output: str
    value: str
    statistic: Statistic


def observers(model: ir.Model) -> Iterator[Observer]:
    """The outputs that `AddObservers` added to a model."""
    for value in model.graph.outputs:
        if OBSERVES in value.metadata_props:
            statistic = Statistic(value.metadata_props[STATISTIC])
            yield Observer(str(value.name), value.metadata_props[OBSERVES], statistic)


@dataclasses.dataclass(frozen=True)
class AddObservers(ir.passes.InPlacePass):
    """Adds Size, ReduceMin, ReduceMax and ReduceSumSquare of each value as outputs; of some the value itself instead.

    * Values of other float types are cast to float32 first: ONNX Runtime has no float16 reductions on the CPU, and a
      sum of squares overflows float16 at once.
    * Per channel, the reductions run over every axis but that of `channel_axes`; the extremes of the whole tensor
      are then taken from those of its channels.
    * Whoever gets a value whole reads it once more anyway, and finds its extremes on the way: for less than the graph.
    * An empty tensor gives count 0, minimum +inf, maximum -inf and sum 0, as the ONNX specification says since opset
      20 and ONNX Runtime does at every opset.
    * Values inside the bodies of If, Loop and Scan cannot be observed: they have no single extent.

    Attributes:
        values: names of float values of the main graph: inputs, or outputs of nodes.
        channel_axes: by value name, the axis of which each index is observed too; negative counts from the back.
        elements: names among `values` of those that are returned whole, as float32, and of their reductions those of
            channels only.

    Raises:
        ModelError: a value is not in the main graph, is not float, or its rank is unknown or too small for its axis.
    """

    values: tuple[str, ...]
    channel_axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    elements: frozenset[str] = frozenset()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Adds the outputs."""
        graph = model.graph
        known = {value.name: value for value in graph.inputs}
        known.update({value.name: value for node in graph for value in node.outputs if value.name})
        wanted = tuple(dict.fromkeys(self.values))
        names = Names(model)
        for name in wanted:
            if name not in known:
                raise ModelError(f"value {name!r} is not computed in the main graph: it cannot be observed")
        for name in wanted:
            self._observe(graph, known[name], names)
        return ir.passes.PassResult(model, modified=bool(wanted))

    def _observe(self, graph: ir.Graph, value: ir.Value, names: Names) -> None:
        if value.dtype is not None and value.dtype not in _FLOATS:
            raise ModelError(f"value {value.name!r} holds {value.dtype.name.lower()}: only float values are observed")
        name = str(value.name)
        build = _Builder(graph, name, names)
        x = value
        if value.dtype != ir.DataType.FLOAT:
            x = build.node("Cast", x, "float32", ir.DataType.FLOAT, value.shape, to=ir.DataType.FLOAT)
        low = high = x
        if name in self.channel_axes:
            others, channels = _other_axes(value, self.channel_axes[name])
            low = build.reduce("ReduceMin", x, Statistic.CHANNEL_MINIMUM, others, channels)
            high = build.reduce("ReduceMax", x, Statistic.CHANNEL_MAXIMUM, others, channels)
        if name in self.elements:
            if x.is_graph_input() or x.is_graph_output():  # a value is one input or one output, not both nor twice
                x = build.node("Identity", x, "elements", ir.DataType.FLOAT, x.shape)
            build.output(Statistic.ELEMENTS, x)
            return
        build.output(Statistic.COUNT, build.node("Size", x, "count", ir.DataType.INT64, ()))
        build.reduce("ReduceMin", low, Statistic.MINIMUM)
        build.reduce("ReduceMax", high, Statistic.MAXIMUM)
        build.reduce("ReduceSumSquare", x, Statistic.SUM_SQUARES)


def _other_axes(value: ir.Value, axis: int) -> tuple[list[int], int | ir.SymbolicDim]:
    if value.shape is None:
        raise ModelError(f"value {value.name!r} has no known rank: it cannot be observed per channel")
    rank = value.shape.rank()
    if not -rank <= axis < rank:
        raise ModelError(f"value {value.name!r} has {rank} axes: there is no axis {axis} to observe")
    return [other for other in range(rank) if other != axis % rank], value.shape[axis]


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Appends the nodes that observe one value; everything they add is named after it."""

    graph: ir.Graph
    name: str
    names: Names

    def node(
        self,
        op_type: str,
        x: ir.Value,
        suffix: str,
        dtype: ir.DataType,
        shape: Iterable[int | ir.SymbolicDim] | None,
        second: ir.Value | None = None,
        **attributes: int | list[int],
    ) -> ir.Value:
        output = ir.Value(
            name=self.names.fresh(f"{self.name}/{suffix}"),
            type=ir.TensorType(dtype),
            shape=None if shape is None else ir.Shape(shape),
        )
        node = ir.Node(
            "",
            op_type,
            [x] if second is None else [x, second],
            ir.convenience.convert_attributes(attributes),
            outputs=[output],
            name=self.names.fresh(f"{self.name}/observe_{suffix}"),
            metadata_props={"qonnx.pass": "AddObservers"},
        )
        self.graph.append(node)
        return output

    def reduce(
        self,
        op_type: str,
        x: ir.Value,
        statistic: Statistic,
        axes: list[int] | None = None,
        channels: int | ir.SymbolicDim | None = None,
    ) -> ir.Value:
        shape = () if channels is None else (channels,)
        opset = self.graph.opset_imports.get("", 0)
        if not axes:  # no axes at all means every axis; a list of none (a vector, per channel) means no reduction
            if axes is not None:
                y = self.node("Identity", x, statistic, ir.DataType.FLOAT, shape)
            else:
                y = self.node(op_type, x, statistic, ir.DataType.FLOAT, shape, keepdims=0)
        elif opset < AXES_INPUT_OPSET:
            y = self.node(op_type, x, statistic, ir.DataType.FLOAT, shape, axes=axes, keepdims=0)
        else:
            y = self.node(op_type, x, statistic, ir.DataType.FLOAT, shape, self._axes(axes), keepdims=0)
        return self.output(statistic, y)

    def _axes(self, axes: list[int]) -> ir.Value:
        name = self.names.fresh(f"{self.name}/axes")
        value = ir.Value(name=name, const_value=ir.tensor(np.array(axes, np.int64), name=name))
        value.dtype, value.shape = ir.DataType.INT64, ir.Shape([len(axes)])
        self.graph.register_initializer(value)
        return value

    def output(self, statistic: Statistic, value: ir.Value) -> ir.Value:
        value.metadata_props[OBSERVES] = self.name
        value.metadata_props[STATISTIC] = statistic
        self.graph.outputs.append(value)
        return value
