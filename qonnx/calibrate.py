"""The calibration run: batches through the float model, statistics out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qonnx.errors import DataError
from qonnx.passes.augment import AddObservers, Observer, Statistic, observers
from qonnx.runtime import session
from qonnx.statistics import Statistics, TensorStatistics, from_batch

Feeds = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        batches: run so far.
        samples: the sizes of the first axis of the first input, added up.
        seconds: since the first batch was asked for.
    """

    batches: int
    samples: int
    seconds: float

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.samples / self.seconds if self.seconds > 0 else 0.0


def observe(
    model: ir.Model,
    values: Sequence[str],
    stream: Iterable[Feeds],
    *,
    channel_axes: Mapping[str, int] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Statistics:
    """Runs a model over batches and returns what its values looked like. The model is left as it is.

    Holds one batch at a time. Nodes that lead to no observed value are not run.

    Args:
        model: a float model.
        values: names of float values of the main graph to observe; each is observed once, however often it is named.
        stream: batches, each one array per model input.
        channel_axes: by value name, the axis along which every index is observed too.
        progress: called after each batch.

    Raises:
        ModelError: a value cannot be observed.
        DataError: the stream has no batches, or a batch does not fit the model.
    """
    augmented = model.clone()
    original = len(augmented.graph.outputs)
    AddObservers(tuple(values), dict(channel_axes or {}))(augmented)
    del augmented.graph.outputs[:original]
    RemoveUnusedNodesPass()(augmented)
    axes = _positive_axes(model, channel_axes or {})
    watched = list(observers(augmented))
    statistics = Statistics({})
    start = time.perf_counter()
    if watched:
        runner = session(augmented)
        for feeds in stream:
            results = runner.run(feeds)
            statistics = statistics.merge(_measured(watched, results, axes, _samples(feeds)))
            if progress is not None:
                progress(Progress(statistics.batches, statistics.samples, time.perf_counter() - start))
        if not statistics.batches:
            raise DataError("no calibration data: the stream has no batches; give at least one")
    return statistics


def _samples(feeds: Feeds) -> int:
    first = next(iter(feeds.values()), None)
    return int(first.shape[0]) if first is not None and first.ndim else 1


def _positive_axes(model: ir.Model, channel_axes: Mapping[str, int]) -> dict[str, int]:
    """Axes that count from the front, so that equal choices compare equal when runs are merged."""
    shapes = {value.name: value.shape for value in model.graph.inputs}
    shapes.update({value.name: value.shape for node in model.graph for value in node.outputs})
    ranks = {name: shape.rank() for name, shape in shapes.items() if shape is not None}
    return {name: axis % ranks[name] for name, axis in channel_axes.items() if name in ranks}


def _measured(
    watched: Sequence[Observer], results: Mapping[str, npt.NDArray[Any]], axes: Mapping[str, int], samples: int
) -> Statistics:
    """The statistics of one batch."""
    found: dict[str, dict[Statistic, npt.NDArray[Any]]] = {}
    for observer in watched:
        found.setdefault(observer.value, {})[observer.statistic] = results[observer.output]
    tensors: dict[str, TensorStatistics] = {}
    for name, parts in found.items():
        tensors[name] = from_batch(
            count=int(parts[Statistic.COUNT]),
            minimum=float(parts[Statistic.MINIMUM]),
            maximum=float(parts[Statistic.MAXIMUM]),
            sum_squares=float(parts[Statistic.SUM_SQUARES]),
            channel_axis=axes.get(name),
            channel_minimum=_floats(parts.get(Statistic.CHANNEL_MINIMUM)),
            channel_maximum=_floats(parts.get(Statistic.CHANNEL_MAXIMUM)),
        )
    return Statistics(tensors, batches=1, samples=samples)


def _floats(array: npt.NDArray[Any] | None) -> npt.NDArray[np.float32] | None:
    return None if array is None else np.asarray(array, np.float32)
