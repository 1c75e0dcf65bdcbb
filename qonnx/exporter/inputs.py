"""Example inputs of a torch module: bound to `forward`, with dimensions called by name, and in other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.errors import DependencyError, ExportError
from qonnx.graph import first_line
from qonnx.text import count

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ExampleInputs:
    """One call of a module.

    Attributes:
        args: positional arguments; empty unless `forward` has parameters that cannot be passed by name.
        kwargs: the other arguments, in the order of `forward`'s parameters.
        axes: for each tensor, in the order of the graph's inputs, the name of each dynamic axis.
        torch_shapes: the same as torch.export wants it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    axes: tuple[dict[int, str], ...]
    torch_shapes: dict[str, Any] | None

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor among the arguments, in the order of the graph's inputs."""
        import torch
        from torch.utils import _pytree as pytree

        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]

    def sizes(self) -> dict[str, int]:
        """The size of each named dimension."""
        return {
            name: tensor.shape[axis]
            for tensor, axes in zip(self.tensors(), self.axes, strict=True)
            for axis, name in axes.items()
        }

    def resized(self, sizes: Mapping[str, int]) -> ExampleInputs:
        """The same call with other sizes of named dimensions; elements repeat cyclically, so that ids stay valid."""
        import torch
        from torch.utils import _pytree as pytree

        leaves, structure = pytree.tree_flatten((self.args, self.kwargs))
        axes = iter(self.axes)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                for axis, name in next(axes).items():
                    if name in sizes:
                        order = torch.arange(sizes[name], device=leaf.device) % leaf.shape[axis]
                        leaf = leaf.index_select(axis, order)
                leaves[index] = leaf
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        return ExampleInputs(args, kwargs, self.axes, self.torch_shapes)


def require_torch() -> None:
    """Raises DependencyError unless torch is installed."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise DependencyError("exporting needs torch: pip install 'qonnx-pipeline[torch]'") from error


def bind(
    module: torch.nn.Module,
    args: tuple[Any, ...] | dict[str, Any],
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None,
) -> ExampleInputs:
    """Matches arguments with the parameters of `forward`, and dimension names with the tensors' axes.

    Raises:
        ExportError: the arguments do not fit `forward`, or a dimension name does not fit the arguments.
    """
    if not isinstance(args, tuple | dict):
        raise ExportError(f"args is a {type(args).__name__}; give a tuple, or a dict by parameter name")
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args) if isinstance(args, tuple) else signature.bind(**args)
    except TypeError as error:
        raise ExportError(f"args do not fit {type(module).__name__}.forward: {error}") from error
    kinds = {name: signature.parameters[name].kind for name in bound.arguments}
    if any(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL) for kind in kinds.values()):
        positional, named = bound.args, bound.kwargs
    else:  # by name: torch.onnx takes a last positional dict for keyword arguments
        positional, named = (), dict(bound.arguments)
        for name, kind in kinds.items():
            if kind is inspect.Parameter.VAR_KEYWORD:
                named.update(named.pop(name))
    named_axes = dynamic_shapes or {}
    if isinstance(named_axes, tuple | list) and len(named_axes) <= len(bound.arguments):
        named_axes = dict(zip(bound.arguments, named_axes, strict=False))
    axes, shapes = _name_axes(bound.arguments, named_axes, type(module).__name__)
    return ExampleInputs(positional, named, axes, shapes)


def _name_axes(
    arguments: Mapping[str, Any], dynamic_shapes: Mapping[str, Any] | Sequence[Any], kind: str
) -> tuple[tuple[dict[int, str], ...], dict[str, Any] | None]:
    """Walks arguments and names side by side; one torch dimension per name."""
    if not isinstance(dynamic_shapes, Mapping):
        raise ExportError(
            f"dynamic_shapes is a {type(dynamic_shapes).__name__} that does not fit "
            f"{count(len(arguments), 'argument')}: give the names of axes by argument, such as "
            f"{{{next(iter(arguments), 'x')!r}: {{0: 'batch'}}}}"
        )
    if unknown := sorted(set(dynamic_shapes) - set(arguments)):
        raise ExportError(
            f"dynamic_shapes names {unknown[0]!r}, which is no argument of {kind}; arguments: {', '.join(arguments)}"
        )
    axes: list[dict[int, str]] = []
    sizes: dict[str, int] = {}
    shapes = {name: _annotate(value, dynamic_shapes.get(name), name, axes, sizes) for name, value in arguments.items()}
    return tuple(axes), shapes if sizes else None


def _annotate(value: Any, names: Any, where: str, axes: list[dict[int, str]], sizes: dict[str, int]) -> Any:
    import torch
    from torch.utils import _pytree as pytree

    if isinstance(value, torch.Tensor):
        checked = {} if names is None else _check_axes(value, names, where, sizes)
        axes.append(checked)
        return {axis: torch.export.Dim(name) for axis, name in checked.items()} or None
    if isinstance(value, tuple | list) and (names is None or isinstance(names, tuple | list)):
        if names is not None and len(names) != len(value):
            raise ExportError(f"dynamic_shapes[{where!r}] has {len(names)} entries for {len(value)} values")
        pairs = zip(value, names or [None] * len(value), strict=True)
        parts = [_annotate(part, name, f"{where}[{i}]", axes, sizes) for i, (part, name) in enumerate(pairs)]
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, dict) and (names is None or isinstance(names, Mapping)):
        if unknown := set(names or {}) - set(value):
            raise ExportError(f"dynamic_shapes[{where!r}] names {unknown.pop()!r}, which {where} does not hold")
        return {
            key: _annotate(part, (names or {}).get(key), f"{where}[{key!r}]", axes, sizes)
            for key, part in value.items()
        }
    if names:
        raise ExportError(f"dynamic_shapes[{where!r}] = {names!r}: {where} is a {type(value).__name__}, not a tensor")
    axes.extend({} for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return None


def _check_axes(tensor: torch.Tensor, names: Any, where: str, sizes: dict[str, int]) -> dict[int, str]:
    """Axes counted from 0, in order; raises where a name cannot be the name of that dimension."""
    if not isinstance(names, Mapping):
        raise ExportError(f"dynamic_shapes[{where!r}] = {names!r}: give a mapping such as {{0: 'batch'}}")
    checked: dict[int, str] = {}
    for axis, name in names.items():
        if not isinstance(axis, int) or not -tensor.ndim <= axis < tensor.ndim:
            raise ExportError(f"dynamic_shapes[{where!r}]: {where} has {tensor.ndim} axes, and no axis {axis!r}")
        if not isinstance(name, str) or not name.isidentifier():
            raise ExportError(f"dynamic_shapes[{where!r}]: {name!r} cannot name a dimension; use letters, digits and _")
        size = tensor.shape[axis]
        if sizes.setdefault(name, size) != size:
            raise ExportError(f"dimension {name!r} is {sizes[name]} elsewhere and {size} in {where} (axis {axis})")
        if size == 0:
            raise ExportError(f"dimension {name!r} of {where} has size 0; give an example with at least one element")
        checked[axis % tensor.ndim] = name
    return dict(sorted(checked.items()))


def run_module(module: torch.nn.Module, inputs: ExampleInputs) -> list[tuple[str, Any]]:
    """Runs torch, without gradients, and gives what it returns leaf by leaf, each with a name.

    Raises:
        ExportError: the module does not run on these inputs.
    """
    import torch
    from torch.utils import _pytree as pytree

    def copied(leaf: Any) -> Any:  # forward may write into its inputs
        return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf

    args, kwargs = pytree.tree_map(copied, (inputs.args, inputs.kwargs))
    try:
        with torch.no_grad():
            return list(_named_leaves(module(*args, **kwargs), ""))
    except Exception as error:
        raise ExportError(
            f"{type(module).__name__} does not run in torch on its example inputs: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _named_leaves(value: Any, name: str) -> list[tuple[str, Any]]:
    """In the order of torch's pytree: `output`, `output_1`, a mapping's keys, a named tuple's fields."""
    import torch
    from torch.utils import _pytree as pytree

    prefix = f"{name}_" if name else ""
    if isinstance(value, Mapping):
        parts = [(f"{prefix}{key}", part) for key, part in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = [(f"{prefix}{key}", part) for key, part in zip(value._fields, value, strict=True)]
    elif isinstance(value, tuple | list):
        parts = [(f"{name or 'output'}_{index}", part) for index, part in enumerate(value)]
    else:
        leaves = pytree.tree_leaves(value)
        if len(leaves) == 1 and (leaves[0] is value or isinstance(value, torch.Tensor)):
            return [(name or "output", value)]
        return [(f"{name or 'output'}_{index}", leaf) for index, leaf in enumerate(leaves)]
    return [leaf for key, part in parts for leaf in _named_leaves(part, key)]


def to_numpy(leaf: Any) -> npt.NDArray[Any]:
    """A tensor or Python number as an array; bfloat16 and float8 become their ml_dtypes types."""
    import torch
    from onnx_ir.tensor_adapters import TorchTensor

    if isinstance(leaf, torch.Tensor):
        return TorchTensor(leaf.detach().cpu().contiguous()).numpy()
    return np.asarray(leaf)


def element_types(module: torch.nn.Module, inputs: ExampleInputs) -> set[ir.DataType]:
    """Every element type among the module's parameters and buffers and its inputs."""
    from onnx_ir.tensor_adapters import from_torch_dtype

    tensors = [*module.parameters(), *module.buffers(), *inputs.tensors()]
    return {from_torch_dtype(tensor.dtype) for tensor in tensors}
