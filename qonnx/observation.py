"""The calibration run: batches through the float model, statistics out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import operator
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qonnx.blocks import observing_session
from qonnx.counting import counting
from qonnx.data import Digest
from qonnx.errors import DataError
from qonnx.independence import independent
from qonnx.passes.augment import AddObservers, Observer, Statistic, observers
from qonnx.pieces import Apart, pieces, run_apart
from qonnx.rebatch import rows
from qonnx.runtime import Device, Session
from qonnx.sketch import Counter
from qonnx.statistics import Part, Statistics, from_parts, with_sketch

# Pieces that are run at a time, each on its share of the cores: observers are many small operators, which do not gain
# from several cores, and counting takes one core (and without numba the interpreter's lock).
_WORKERS = 2

# Batches whose extremes are merged at a time: merging copies the extremes of all batches so far.
_KEPT_APART = 64

Feeds = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        batches: run so far, those of an earlier run included.
        samples: the sizes of the first axis of the first input, added up.
        seconds: since this run began.
        rate: samples per second of this run.
        total: how many batches there are; None where that is not known.
        left: seconds until the last one, if all take as long as those of this run did; None where that is not known.
    """

    batches: int
    samples: int
    seconds: float
    rate: float
    total: int | None = None
    left: float | None = None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run. What had been measured until then is kept.

    Attributes:
        statistics: of the batches that were finished; give them to `observe` as `earlier` to go on.
    """

    def __init__(self, statistics: Statistics) -> None:
        super().__init__("calibration was interrupted")
        self.statistics = statistics


def observe(
    model: ir.Model,
    values: Sequence[str],
    stream: Iterable[Feeds],
    *,
    distributions: Collection[str] = (),
    channel_axes: Mapping[str, int] | None = None,
    device: Device = Device.CPU,
    earlier: Statistics | None = None,
    total: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Statistics:
    """Runs a model over batches and returns what its values looked like. The model is left as it is.

    Memory does not grow with the number of batches: two are run at a time at most, and a third is read. Large ones are
    run a few samples at a time where these do not depend on each other: see `qonnx.pieces`.
    Nodes that lead to no observed value are not run.

    Args:
        model: a float model.
        values: names of float values of the main graph to observe; each is observed once, however often it is named.
        stream: batches, each one array per model input.
        distributions: names among `values` of those whose elements are also counted, as calibrators other than
            `minmax`, `average` and `ema` need it. Counting takes 0.4 to 1.5 ns per element with numba,
            2 without.
        channel_axes: by value name, the axis along which every index is observed too.
        device: where the model and the reductions run. Of the values only extremes and sums come back, and whole those
            in `distributions`.
        earlier: what an interrupted run over the same stream had measured; its batches are skipped.
        total: how many batches the stream probably has, for `progress`; None if that is not known.
        progress: called after each batch.

    Raises:
        ModelError: a value cannot be observed.
        DataError: the stream has no batches, a batch does not fit the model, or `earlier` is of another run: it holds
            other values, or the stream does not begin with its batches.
        Interrupted: on Ctrl-C, once the batches that were running are finished. A second Ctrl-C does not wait for
            them, and nothing is kept.
    """
    earlier = earlier or Statistics({})
    augmented = _augmented(model, values, distributions, channel_axes or {})
    watched = list(observers(augmented))
    if not watched:
        return earlier
    if earlier.tensors and earlier.tensors.keys() != {observer.value for observer in watched}:
        raise DataError("the earlier run observed other values: calibrate from the start")
    with ThreadPoolExecutor(1) as beside:
        if distributions:
            beside.submit(counting)  # compiled once in a process, which takes as long as opening the session
        runner = observing_session(augmented, max(1, (os.cpu_count() or 1) // _WORKERS), device)
    axes = _positive_axes(model, channel_axes or {})
    run = _Run(watched, axes, 0 not in axes.values() and independent(model, values))
    rest = _after(earlier, stream)
    batches, samples, start = earlier.batches, earlier.samples, time.perf_counter()
    try:
        with contextlib.closing(run.over(runner, rest)) as finished:
            for batch in finished:
                batches, samples = batches + 1, samples + batch.samples
                if progress is not None:
                    seconds = time.perf_counter() - start
                    rate = (samples - earlier.samples) / max(seconds, 1e-9)
                    known = None if total is None or batches > total else total
                    left = None if known is None else seconds / (batches - earlier.batches) * (known - batches)
                    progress(Progress(batches, samples, seconds, rate, known, left))
    except KeyboardInterrupt:
        measured = run.whole_batches()
        if measured is None:
            raise
        raise Interrupted(earlier.merge(measured)) from None
    statistics = earlier.merge(run.statistics())
    if not statistics.batches:
        raise DataError("no calibration data: the stream has no batches; give at least one")
    return statistics


def _augmented(
    model: ir.Model, values: Sequence[str], distributions: Collection[str], channel_axes: Mapping[str, int]
) -> ir.Model:
    """A copy of the model whose only outputs are the observers'."""
    augmented = model.clone()
    augmented.graph.outputs.clear()
    AddObservers(tuple(values), dict(channel_axes), frozenset(distributions))(augmented)
    RemoveUnusedNodesPass()(augmented)
    return augmented


def _after(earlier: Statistics, stream: Iterable[Feeds]) -> Iterator[Feeds]:
    """The stream behind the batches that were counted earlier, which it must begin with, in any order."""
    rest, digest, skipped = iter(stream), Digest(), 0
    for feeds in itertools.islice(rest, earlier.batches):
        digest.update(feeds)
        skipped += 1
    if earlier.batches and digest.hexdigest() != earlier.data:
        raise DataError(
            f"the earlier run counted {earlier.batches} batches, and the first {skipped} of these data are others: go "
            "on with the same data in the same order, or calibrate from the start"
        )
    return rest


def _positive_axes(model: ir.Model, channel_axes: Mapping[str, int]) -> dict[str, int]:
    """Axes that count from the front, so that equal choices compare equal when runs are merged."""
    shapes = {value.name: value.shape for value in model.graph.inputs}
    shapes.update({value.name: value.shape for node in model.graph for value in node.outputs})
    ranks = {name: shape.rank() for name, shape in shapes.items() if shape is not None}
    return {name: axis % ranks[name] for name, axis in channel_axes.items() if name in ranks}


class _Work:
    """A batch whose pieces several threads run, so that none is idle while another has most of a batch to go."""

    def __init__(self, feeds: Feeds, runs: Iterable[Callable[[], Feeds]]) -> None:
        self.feeds = feeds
        self._left = deque(enumerate(runs))
        self._missing = len(self._left)
        self._parts: dict[int, dict[str, Part]] = {}
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[tuple[int, Callable[[], Feeds]]]:
        """Those that nobody has taken yet."""
        with contextlib.suppress(IndexError):
            while True:
                yield self._left.popleft()

    def done(self, index: int, parts: dict[str, Part]) -> bool:
        """Takes what one piece gave; returns whether it was the last one that was missing."""
        with self._lock:
            self._parts[index] = parts
            self._missing -= 1
            return not self._missing

    def parts(self) -> list[dict[str, Part]]:
        """What all pieces gave, in their order: float sums depend on it."""
        return [parts for _, parts in sorted(self._parts.items(), key=operator.itemgetter(0))]


class _Run:
    """The statistics of one run while it grows."""

    def __init__(self, watched: Sequence[Observer], axes: Mapping[str, int], independent_samples: bool) -> None:
        self._axes = axes
        self._independent = independent_samples
        self._outputs: dict[str, dict[Statistic, str]] = {}
        for observer in watched:
            self._outputs.setdefault(observer.value, {})[observer.statistic] = observer.output
        self._statistics = {observer.output: observer.statistic for observer in watched}
        self._counters = {name: Counter() for name, parts in self._outputs.items() if Statistic.ELEMENTS in parts}
        # Of the first batches, and how many these are. One value: Ctrl-C may come at any time.
        self._merged = (Statistics({}), 0)
        self._finished: dict[int, Statistics] = {}
        self._begun: set[int] = set()

    def whole_batches(self) -> Statistics | None:
        """What the finished batches looked like, or None where another is being counted, or has failed."""
        begun, merged = len(self._begun), self._merged[1]
        if begun != merged + sum(number >= merged for number in list(self._finished)):
            return None
        measured = self.statistics()
        return measured if len(self._begun) == begun else None

    def over(self, runner: Session, stream: Iterable[Feeds]) -> Generator[Statistics, None, None]:
        """Runs the batches; yields the extremes of each, in order.

        Each worker runs a piece and then counts its elements, so that one counts while another runs. It also notes the
        batch as finished: wherever an interruption finds this thread, what is counted and what is noted agree.
        """
        pending: deque[list[Future[Statistics | None]]] = deque()
        stream = iter(stream)
        with ThreadPoolExecutor(_WORKERS) as pool:
            read = list(itertools.islice(stream, 1))
            if not read:
                return
            trial = run_apart(runner, read[0], self._statistics, pool, self._independent)
            try:
                read += itertools.islice(stream, 1)  # the second one meanwhile
            finally:  # whatever happens to it, the first one counts
                apart = trial()
                pending.append(self._submit(pool, 0, runner, read.pop(0), apart))
            for number, feeds in enumerate(itertools.chain(_emptied(read), stream), 1):
                pending.append(self._submit(pool, number, runner, feeds, apart))
                if len(pending) > _WORKERS:
                    yield from _result(pending.popleft())
                    self._merge()
            while pending:
                yield from _result(pending.popleft())

    def _submit(
        self, pool: Executor, number: int, runner: Session, feeds: Feeds, apart: Apart | None
    ) -> list[Future[Statistics | None]]:
        """Has every worker take a share of a batch, as large as it comes to."""
        work = _Work(feeds, _runs(number, runner, feeds, apart))
        return [pool.submit(self._share, number, work) for _ in range(_WORKERS)]

    def _share(self, number: int, work: _Work) -> Statistics | None:
        """Runs pieces of a batch until there are no more; whoever runs the last one notes the batch as finished."""
        self._begun.add(number)
        batch = None
        for index, run in work:
            results = run()
            # From the front and from the back in turn: threads that count the same tensor wait for each other.
            names = reversed(self._outputs) if (number + index) % 2 else iter(self._outputs)
            parts = {name: self._measured(name, results) for name in names}
            if work.done(index, parts):
                self._finished[number] = batch = self._whole(work)
        return batch

    def _whole(self, work: _Work) -> Statistics:
        pieces = work.parts()
        tensors = {name: from_parts([piece[name] for piece in pieces], self._axes.get(name)) for name in self._outputs}
        digest = Digest()
        digest.update(work.feeds)
        return Statistics(tensors, batches=1, samples=_samples(work.feeds), data=digest.hexdigest())

    def _merge(self) -> None:
        """Merges the oldest batches once there are enough of them."""
        merged, start = self._merged
        numbers = range(start, start + _KEPT_APART)
        if all(number in self._finished for number in numbers):
            batches = (self._finished[number] for number in numbers)
            self._merged = (functools.reduce(Statistics.merge, batches, merged), numbers.stop)
            for number in numbers:
                del self._finished[number]

    def _measured(self, name: str, results: Feeds) -> Part:
        """What one value looked like in one batch, or in a piece of it. Elements are counted and dropped."""
        parts = {statistic: results.pop(output) for statistic, output in self._outputs[name].items()}
        channels = parts.get(Statistic.CHANNEL_MINIMUM), parts.get(Statistic.CHANNEL_MAXIMUM)
        x = parts.get(Statistic.ELEMENTS)
        if x is not None:  # the sum of squares is told by the counts
            return Part(x.size, 0.0, *self._counters[name].add(x), *channels)
        count, squares = int(parts[Statistic.COUNT]), float(parts[Statistic.SUM_SQUARES])
        return Part(count, squares, float(parts[Statistic.MINIMUM]), float(parts[Statistic.MAXIMUM]), *channels)

    def statistics(self) -> Statistics:
        """What the finished batches looked like."""
        merged, start = self._merged
        batches = (self._finished[number] for number in sorted(self._finished) if number >= start)
        total = functools.reduce(Statistics.merge, batches, merged)
        counted = {
            name: with_sketch(total.tensors[name], c.sketch()) for name, c in self._counters.items() if total.tensors
        }
        return dataclasses.replace(total, tensors={**total.tensors, **counted})


def _runs(number: int, runner: Session, feeds: Feeds, apart: Apart | None) -> Iterator[Callable[[], Feeds]]:
    """A function per piece of a batch: it returns what the observers gave. Two samples of the first were run before."""
    if apart is not None and number == 0:
        yield from (functools.partial(_taken, end) for end in apart.ends)
        feeds = {name: array[1:-1] for name, array in feeds.items()}
        if not rows(feeds):
            return
    for piece in pieces(feeds, None if apart is None else apart.per_byte):
        yield functools.partial(runner.run, piece)


def _result(shares: Iterable[Future[Statistics | None]]) -> Iterator[Statistics]:
    """What a batch gave, once all its shares have ended."""
    return filter(None, [share.result() for share in shares])


def _taken(results: Feeds) -> Feeds:
    return results


def _emptied(batches: list[Feeds]) -> Iterator[Feeds]:
    """The batches, each of which is dropped from the list before it is used."""
    while batches:
        yield batches.pop(0)


def _samples(feeds: Feeds) -> int:
    first = next(iter(feeds.values()), None)
    return int(first.shape[0]) if first is not None and first.ndim else 1
