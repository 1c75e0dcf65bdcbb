"""Is an exported file valid ONNX, and does it compute what torch computes?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qonnx.errors import ExportError, ModelError
from qonnx.exporter.inputs import ExampleInputs, element_types, run_module, to_numpy
from qonnx.graph import first_line
from qonnx.runtime import session

if TYPE_CHECKING:
    import torch

EXAMPLE_REMEDY = "forward may draw random numbers or keep a state; verify=False exports it anyway"
OTHER_SIZES_REMEDY = "forward may branch on the shape: rewrite it, or leave the dimension out of dynamic_shapes"

Array = npt.NDArray[Any]


# A feed for every input -> every output.
Runner = Callable[[dict[str, Array]], Sequence[Array]]


def check_file(path: Path, opset: int) -> None:
    """Checks a file as the ONNX specification asks, types and shapes included.

    Raises:
        ExportError: the file is not valid, or declares another operator set than was asked for.
    """
    declared = ir.load(path).opset_imports.get("")
    if declared != opset:
        raise ExportError(f"asked for opset {opset}, the exporter wrote {declared}; choose another opset")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker raises several types of its own
        raise ExportError(f"the exported graph is not valid at opset {opset}: {first_line(error)}") from error


def compare_with_torch(path: Path, module: torch.nn.Module, inputs: ExampleInputs, computed: Sequence[bool]) -> None:
    """Runs the file and the module on the example inputs and, with dynamic dimensions, in other sizes of each.

    Args:
        path: the exported file.
        module: the module, in evaluation mode.
        inputs: the example inputs.
        computed: for each leaf of the module's result, whether it is an output of the graph.

    Raises:
        ExportError: an output disagrees, the file does not run, or the module runs in no other size of a dimension.
    """
    types = element_types(module, inputs)
    tolerance = 1e-1 if ir.DataType.BFLOAT16 in types else 2e-2 if ir.DataType.FLOAT16 in types else 1e-3
    run = _open(path, reference=ir.DataType.BFLOAT16 in types)
    graph = ir.load(path).graph
    names = [str(value.name) for value in graph.inputs], [str(value.name) for value in graph.outputs]
    _compare(run, names, inputs, _expected(module, inputs, computed), tolerance, EXAMPLE_REMEDY)
    if other := _in_other_sizes(module, inputs):
        _compare(run, names, other, _expected(module, other, computed), tolerance, OTHER_SIZES_REMEDY)


def _expected(module: torch.nn.Module, inputs: ExampleInputs, computed: Sequence[bool]) -> list[Array]:
    leaves = run_module(module, inputs)
    return [to_numpy(leaf) for (_, leaf), kept in zip(leaves, computed, strict=True) if kept]


def _open(path: Path, *, reference: bool) -> Runner:
    """ONNX Runtime on the CPU, or the reference evaluator for types that it has no kernels for."""
    if reference:
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(str(path))
        return lambda feeds: list(evaluator.run(None, feeds))
    try:
        opened = session(path)
    except ModelError as error:
        raise ExportError(f"the exported graph is refused by ONNX Runtime: {first_line(error)}") from error
    return lambda feeds: list(opened.run(feeds).values())


def _in_other_sizes(module: torch.nn.Module, inputs: ExampleInputs) -> ExampleInputs | None:
    """The example inputs with every named dimension in a size that torch accepts and that was not the example's.

    The first choice is odd and more than double, to meet what was frozen at the example's size; a module may want a
    multiple of something, or know no larger size.
    """
    chosen: dict[str, int] = {}
    for index, (name, size) in enumerate(inputs.sizes().items()):
        refusal = ""
        for other in (2 * size + 1 + 2 * index, 2 * size, size + 1, size - 1, size // 2):
            if other in (0, size):
                continue
            try:
                run_module(module, inputs.resized({**chosen, name: other}))
            except ExportError as error:
                refusal = refusal or first_line(error)
                continue
            chosen[name] = other
            break
        else:
            raise ExportError(
                f"{type(module).__name__} runs with dimension {name!r} = {size} only ({refusal}); "
                f"leave {name!r} out of dynamic_shapes"
            )
    return inputs.resized(chosen) if chosen else None


def _compare(
    run: Runner,
    names: tuple[list[str], list[str]],
    case: ExampleInputs,
    expected: list[Array],
    tolerance: float,
    remedy: str,
) -> None:
    feeds = dict(zip(names[0], map(to_numpy, case.tensors()), strict=True))
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
    try:
        results = run(feeds)
    except Exception as error:
        raise ExportError(f"the exported graph does not run on {shapes}: {first_line(error)}; {remedy}") from error
    for name, reference, result in zip(names[1], expected, results, strict=True):
        if problem := disagreement(reference, np.asarray(result), tolerance):
            raise ExportError(f"output {name!r} of the exported graph {problem}, on {shapes}; {remedy}")


def disagreement(expected: Array, result: Array, tolerance: float) -> str | None:
    """How `result` differs from `expected` beyond `max|expected| * tolerance + 1e-5`, or None.

    Infinities, NaN and values above half the type's range (masks) must stand in the same places with the same sign.
    Of integers and booleans a share `tolerance` of the elements may differ: an argmax may turn on a rounding.

    >>> import numpy as np
    >>> disagreement(np.float32([0, 2]), np.float32([0, 2.001]), 1e-3) is None
    True
    >>> disagreement(np.float32([0, 2]), np.float32([0, 2.5]), 1e-3)
    'differs from torch by 0.5 where 0.00201 is allowed'
    """
    if expected.shape != result.shape:
        return f"has shape {list(result.shape)} where torch gives {list(expected.shape)}"
    if expected.dtype != result.dtype:
        return f"has type {result.dtype} where torch gives {expected.dtype}"
    if expected.dtype.kind in "biuS":
        differing = int(np.count_nonzero(expected != result))
        return f"differs from torch in {differing} elements" if differing > tolerance * expected.size else None
    limit = float(ir.DataType.from_numpy(expected.dtype).max) / 2
    wanted, found = expected.astype(np.float64), result.astype(np.float64)
    ordinary = np.abs(wanted) < limit
    extremes = np.sign(wanted[~ordinary]), np.sign(found[~ordinary])
    if not np.array_equal(ordinary, np.abs(found) < limit) or not np.array_equal(*extremes, equal_nan=True):
        return "has infinities, NaN or extreme values in other places than torch"
    wanted, found = wanted[ordinary], found[ordinary]
    error = float(np.max(np.abs(wanted - found), initial=0.0))
    allowed = tolerance * float(np.max(np.abs(wanted), initial=0.0)) + 1e-5
    return f"differs from torch by {error:.3g} where {allowed:.3g} is allowed" if error > allowed else None
