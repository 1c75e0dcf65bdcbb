"""A few samples to try things on: in one batch where that changes nothing, as they came where it would."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import onnx_ir as ir

from qonnx.errors import DataError
from qonnx.rebatch import Batch, has_batch_axis, rows, together
from qonnx.runtime import Session, input_specs, session

# Of batches that cannot be joined there are so many at least: what one of them shows may be its own.
_FEWEST_BATCHES = 4

# How close the results of a sample are whether others are beside it or not, relative to the largest.
_SAME = 1e-2


def few_samples(model: ir.Model, batches: Sequence[Batch], count: int) -> list[Batch]:
    """The first samples of some batches, joined where their other sizes are the same.

    They stay apart where the model takes a batch of one size only, where its first axis counts something else (the
    nodes of a graph), and where the result of a sample depends on those beside it (a branch on the mean of a batch).

    Args:
        model: what they are to be fed to.
        batches: at least one.
        count: how many samples to take at most, where they can be told apart; otherwise whole batches up to that many
            rows, and four at least.
    """
    if all(has_batch_axis(batch, input_specs(model)) for batch in batches):
        groups = [list(alike) for _, alike in groupby(batches, key=_sizes)]
        joined: list[Batch] = []
        for group in groups:
            if sum(map(rows, joined)) < count:
                joined.append(together(group, count - sum(map(rows, joined))))
        runner = session(model)
        if all(_is_the_same(runner, group, batch) for group, batch in zip(groups, joined, strict=False)):
            return joined
    found: list[Batch] = []
    for batch in batches:
        if len(found) >= _FEWEST_BATCHES and sum(map(rows, found)) >= count:
            break
        found.append(batch)
    return found


def _sizes(batch: Batch) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, array.shape[1:]) for name, array in batch.items()]


def _is_the_same(runner: Session, parts: Sequence[Batch], joined: Batch) -> bool:
    """Whether samples give the same alone as with those of other batches around them."""
    total = rows(joined)
    if rows(parts[0]) >= total:
        return True
    start = 0
    try:
        among = runner.run(joined)
        for part in parts:
            end = start + rows(part)
            if end > total:
                break
            for name, result in runner.run(part).items():
                whole = among[name].reshape(-1)
                if result.dtype.kind == "f" and result.size * total == whole.size * rows(part):
                    size = whole.size // total
                    close = _SAME * np.abs(result).max(initial=0)
                    if not np.allclose(
                        whole[start * size : end * size], result.reshape(-1), rtol=0, atol=close, equal_nan=True
                    ):
                        return False
            start = end
    except DataError:  # rows that are grouped later
        return False
    return True
