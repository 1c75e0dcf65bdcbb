"""The range of shapes that an engine must accept, from the names of dynamic dimensions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from qonnx.engine.protocol import Profile
from qonnx.errors import EngineError
from qonnx.sizes import dynamic_dimensions

# The smallest, the usual and the largest size of one dimension.
Range = tuple[int, int, int]

# Of the batch, when the caller does not say.
BATCH: Range = (1, 8, 32)


def profiles_of(
    model: ir.Model,
    dims: Mapping[str, Range] | None = None,
    profiles: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> dict[str, Profile]:
    """The smallest, usual and largest shape of every input that has a dynamic dimension.

    Args:
        model: the model; only its inputs are looked at.
        dims: sizes by the name of the dimension, or by `input.axis` for one without a name; a name that several inputs
            share has the same sizes in all of them. A dimension that comes first in some input and is not listed is
            the batch, and gets 1, 8 and 32.
        profiles: shapes by the name of the input, for what dimension names cannot say; they win over `dims`.

    Raises:
        EngineError: a dynamic dimension has no sizes, sizes do not ascend, or a name is not in the model.
    """
    dims, profiles = dims or {}, profiles or {}
    shapes = {
        value.name or "": _shape(value) for value in model.graph.inputs if value.name not in model.graph.initializers
    }
    _check_known("dims", dims, {size for shape in shapes.values() for size in shape if isinstance(size, str)})
    _check_known("profiles", profiles, shapes)
    ranges: dict[int | str, Range] = {shape[0]: BATCH for shape in shapes.values() if shape}
    ranges.update(dims)
    result: dict[str, Profile] = {}
    for name, shape in shapes.items():
        if name in profiles:
            result[name] = _given(name, shape, profiles[name])
        elif not all(isinstance(size, int) for size in shape):
            sizes = [_range(name, size, ranges) for size in shape]
            smallest, usual, largest = zip(*sizes, strict=True)
            result[name] = (smallest, usual, largest)
    return result


def _shape(value: ir.Value) -> tuple[int | str, ...]:
    """Sizes, and names of dynamic dimensions: `input.axis` for those without one."""
    if value.shape is None:
        raise EngineError(f"input {value.name!r} has no declared rank; export the model with shapes")
    names = dict(dynamic_dimensions(value))
    return tuple(
        size if isinstance(size, int) and axis not in names else names[axis] for axis, size in enumerate(value.shape)
    )


def _range(name: str, size: int | str, ranges: Mapping[int | str, Range]) -> Range:
    if isinstance(size, int):
        return size, size, size
    where = f"dimension {size!r} of input {name!r}"
    if size in ranges:
        return _ascending(where, ranges[size])
    remedy = f"dims={{{size!r}: (1, 128, 256)}} or --dim {size}=1,128,256, or data to take sizes from"
    raise EngineError(f"{where} is dynamic: give its smallest, usual and largest size, such as {remedy}")


def _given(name: str, shape: tuple[int | str, ...], shapes: Sequence[Sequence[int]]) -> Profile:
    if len(shapes) != 3 or any(len(given) != len(shape) for given in shapes):
        raise EngineError(
            f"profile of input {name!r}: give three shapes of rank {len(shape)}: smallest, usual, largest"
        )
    for axis, size in enumerate(shape):
        _ascending(f"profile of input {name!r}, axis {axis}", [given[axis] for given in shapes])
        if isinstance(size, int) and any(given[axis] != size for given in shapes):
            raise EngineError(f"profile of input {name!r}, axis {axis}: the model fixes it at {size}")
    smallest, usual, largest = (tuple(given) for given in shapes)
    return smallest, usual, largest


def _ascending(what: str, sizes: Sequence[int]) -> Range:
    if len(sizes) != 3 or not 0 <= sizes[0] <= sizes[1] <= sizes[2]:
        raise EngineError(f"{what}: {tuple(sizes)} is not (smallest, usual, largest) in ascending order")
    return sizes[0], sizes[1], sizes[2]


def _check_known(argument: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            names = ", ".join(sorted(repr(name) for name in known if name)) or "none"
            raise EngineError(f"{argument} names {name!r}, which the model does not have; it has {names}")


def sizes_in(model: ir.Model, shapes: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, Range]:
    """The smallest, most frequent and largest size that dynamic dimensions have in some batches, by `dims`' names.

    The batch reaches down to 1 whatever was seen.

    Args:
        model: whose inputs are fed.
        shapes: of each batch, by the name of the input.
    """
    inputs = {value.name: _shape(value) for value in model.graph.inputs if value.name not in model.graph.initializers}
    seen: dict[str, Counter[int]] = {}
    for batch in shapes:
        for name, given in batch.items():
            for size, actual in zip(inputs.get(name, ()), given, strict=False):
                if isinstance(size, str):
                    seen.setdefault(size, Counter())[actual] += 1
    first = {shape[0] for shape in inputs.values() if shape}
    return {
        name: (1 if name in first else min(counts), counts.most_common(1)[0][0], max(counts))
        for name, counts in seen.items()
    }
