"""The values that every loader in this folder speaks in."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

Batch = dict[str, NDArray[Any]]
"""One batch: an array per graph input, by name."""

Run = Callable[[Batch], Mapping[str, NDArray[Any]]]
"""Runs a model on one batch and returns an array per output, by name."""


class Example(NamedTuple):
    """A module and what its export needs.

    Attributes:
        module: The network in eval mode. It takes `args` by keyword and returns a dict of named outputs.
        args: Example inputs by name.
        dynamic_shapes: For each input, the name of every axis whose length may change.
    """

    module: torch.nn.Module
    args: dict[str, torch.Tensor]
    dynamic_shapes: dict[str, dict[int, str]]


class Evaluation(msgspec.Struct, frozen=True):
    """A task metric measured on test data.

    Attributes:
        metric: What was measured, e.g. "accuracy".
        value: The figure, in `unit`.
        samples: How many test items it rests on.
        standard_error: Of `value`.
        unit: "%", or "" for a plain number.
    """

    metric: str
    value: float
    samples: int
    standard_error: float
    unit: str = "%"


def torch_run(module: torch.nn.Module) -> Run:
    """Return a `Run` that calls a module of an `Example`."""

    def run(batch: Batch) -> dict[str, NDArray[Any]]:
        with torch.inference_mode():
            outputs = module(**{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    return run
