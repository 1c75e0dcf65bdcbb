"""A model at given sizes of its dynamic dimensions, for what needs to know how large every tensor is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import onnx_ir as ir

from qonnx.errors import DataError
from qonnx.passes.fold_constants import FoldConstants
from qonnx.passes.infer_shapes import InferShapes


def at_sizes(model: ir.Model, dims: Mapping[str, int] | None = None) -> ir.Model:
    """A copy whose inputs have fixed shapes, with the shapes of all other values inferred from them.

    Nodes keep their names; those that only compute shapes may be folded away. Weights are shared with the original.

    Args:
        model: in the form that `qonnx.passes.prepare` makes; not changed.
        dims: see `resolve_dims`.

    Raises:
        DataError: a dynamic dimension has no size, a size is not positive, or a name is not in the model.
        ModelError: shapes cannot be inferred.
    """
    sizes = resolve_dims(model, dims)
    copy = model.clone()
    for value in _inputs(copy):
        dynamic = dict(dynamic_dimensions(value))
        fixed = [sizes[dynamic[axis]] if axis in dynamic else size for axis, size in enumerate(value.shape or ())]
        value.shape = ir.Shape(fixed)
    _infer(copy)
    if any(elements(value) is None for node in copy.graph for value in node.outputs):
        FoldConstants()(copy)
        _infer(copy)
    return copy


def resolve_dims(model: ir.Model, dims: Mapping[str, int] | None = None) -> dict[str, int]:
    """A size for every dynamic dimension of the inputs.

    Args:
        model: only its inputs are looked at.
        dims: sizes by the name of the dimension, or by `input.axis` for one without a name. A dimension that comes
            first in some input is 1 if not given.

    Raises:
        DataError: a dynamic dimension has no size, a size is not positive, or a name is not in the model.
    """
    given = dims or {}
    sizes: dict[str, int] = {}
    dynamic: dict[str, str] = {}
    for value in _inputs(model):
        if value.shape is None:
            raise DataError(f"input {value.name!r} has no declared rank; export the model with shapes")
        for axis, name in dynamic_dimensions(value):
            dynamic.setdefault(name, value.name or "")
            if axis == 0:
                sizes[name] = 1
    for name, size in given.items():
        if name not in dynamic:
            raise DataError(f"dims names {name!r}, which no input has; they have {_listed(dynamic)}")
        if size < 1:
            raise DataError(f"dims gives {name!r} the size {size}; give 1 or more")
    sizes |= given
    for name, owner in dynamic.items():
        if name not in sizes:
            raise DataError(f"dimension {name!r} of input {owner!r} is dynamic: give its size, such as {name}=128")
    return sizes


def elements(value: ir.Value | None) -> int | None:
    """The number of elements of a value, or None where a dimension is not known."""
    if value is None or value.shape is None:
        return None
    count = 1
    for size in value.shape:
        if not isinstance(size, int):
            return None
        count *= size
    return count


def _infer(model: ir.Model) -> None:
    """Infers every shape anew. Declared outputs are set aside: they would keep the symbols that they declare."""
    outputs = list(model.graph.outputs)
    model.graph.outputs.clear()
    for node in model.graph:
        for value in node.outputs:
            if node.domain in ("", "ai.onnx"):
                value.shape = None
    InferShapes()(model)
    model.graph.outputs.extend(outputs)


def _inputs(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def dynamic_dimensions(value: ir.Value) -> Iterator[tuple[int, str]]:
    """Axis and name of each dynamic dimension: `input.axis` for one without a name."""
    for axis, size in enumerate(value.shape or ()):
        if not isinstance(size, int) or size < 0:
            yield axis, (None if isinstance(size, int) else size.value) or f"{value.name}.{axis}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(repr(name) for name in names)) or "no dynamic dimension"
