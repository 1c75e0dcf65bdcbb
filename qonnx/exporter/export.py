"""PyTorch -> ONNX: capture, simplify, name, save, check, compare with torch, and only then put the file in place."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from qonnx.errors import DependencyError, ExportError
from qonnx.exporter.check import check_file, compare_with_torch
from qonnx.exporter.inputs import ExampleInputs, bind, require_torch, run_module
from qonnx.exporter.names import name_everything, simplify
from qonnx.exporter.sources import load_factory, load_huggingface
from qonnx.graph import first_line, parameters, publish, staging

if TYPE_CHECKING:
    import torch

__all__ = ["OPSETS", "export", "export_from", "load_factory", "load_huggingface"]

# torch's exporter implements 18 and converts upwards. From 26 on it writes, without an error, a model that declares
# opset 18 and uses newer operators.
OPSETS = range(18, 26)

# Models whose weights hold at least this many bytes keep them in <name>.onnx.data beside the model, so that no step
# ever copies them into a protobuf; a smaller one is a single file.
EXTERNAL_DATA_BYTES = 1024 * 1024
# Initializers below this many bytes (shapes, axes, scalars, small biases) stay inside the model either way.
INLINE_BYTES = 1024

# Whose lines are no part of the module that is exported.
_NOT_THE_USERS = frozenset(sys.stdlib_module_names) | {
    "numpy", "onnx", "onnx_ir", "onnxscript", "qonnx", "sympy", "torch",
}  # fmt: skip

logger = logging.getLogger(__name__)


def export(
    module: torch.nn.Module,
    args: tuple[Any, ...] | dict[str, Any],
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
    opset: int = 21,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    verify: bool = True,
) -> Path:
    """Writes a torch module as an ONNX model that is known to compute what torch computes.

    The module is exported in evaluation mode and left as found. The file does not share memory with its parameters.
    Weights keep the names of the parameters they come from (`encoder.layer.0.attention.self.query.weight`, also where
    the exporter stores them transposed), each parameter its own tensor; nodes are called `<module path>/<op type>`,
    and the values they compute `<node name>_output_0`.

    With `verify`, ONNX Runtime (CPU, optimizations as by default) must agree with torch on the example inputs and,
    where there are dynamic dimensions, on inputs in which each of them has another size. For every output,
    `max|onnx - torch| <= r * max|torch| + 1e-5` with r = 1e-3, or 2e-2 where float16 and 1e-1 where bfloat16 takes
    part; integers and booleans may differ in a share r of the elements. Bfloat16 models are compared by the onnx
    reference evaluator instead, which is slow: ONNX Runtime has hardly any bfloat16 kernel for the CPU.

    The model keeps `ir_version` 10, which runtimes of 2024 read. ONNX was at 11, 12 and 13 when it released operator
    sets 23, 24 and 25, but those versions only add element types; checker and ONNX Runtime take every set with 10.

    Args:
        module: what to export.
        args: example inputs, positional (a tuple) or by the names of `forward`'s parameters (a dict).
        path: the file to write; weights of 1 MiB and more go to `<path>.data` beside it.
        dynamic_shapes: for each parameter of `forward`, `{axis: name}`; for a parameter that is a list, tuple or dict
            of tensors, the same nesting. One name is one symbolic dimension, wherever it stands. A tuple or list gives
            them in the order of the parameters.
        opset: the ONNX operator set, 18 to 25.
        input_names: names for the graph's inputs; those of `forward`'s parameters if None.
        output_names: names for the graph's outputs; if None the keys of a returned mapping, or `output`, `output_1` ...
        verify: whether to compare the result with torch. The ONNX checker runs either way.

    Returns:
        The path written.

    Raises:
        ExportError: the module cannot be exported, or the result disagrees with torch. No file is left behind, and a
            file that was there before is as it was.
        OutputError: the path cannot be written.
        DependencyError: torch, or for `verify` ONNX Runtime, is not installed.
    """
    require_torch()
    path = Path(path)
    _check_request(module, opset, verify)
    with staging(path) as folder, _evaluating(module), _quiet():
        inputs = bind(module, args, dynamic_shapes)
        example = run_module(module, inputs)
        captured = _capture(module, inputs, opset)
        simplify(captured.model, captured.parameters)
        name_everything(
            captured.model,
            captured.parameters,
            inputs=_chosen_names("input_names", input_names, captured.inputs),
            outputs=_chosen_names("output_names", output_names, captured.outputs(example)),
        )
        staged = folder / path.name
        external = f"{path.name}.data" if parameters(captured.model)[1] >= EXTERNAL_DATA_BYTES else None
        ir.save(captured.model, staged, external_data=external, size_threshold_bytes=INLINE_BYTES)
        check_file(staged, opset)
        if verify:
            compare_with_torch(staged, module, inputs, captured.computed)
        publish(folder, path.parent)
    if external is None:  # the weights of a model that stood here before
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    return path


def export_from(source: str, path: str | os.PathLike[str], *, opset: int = 21, verify: bool = True) -> Path:
    """Exports what `source` names: a local Hugging Face model directory, or a `PACKAGE.MODULE:FACTORY`.

    Raises:
        ExportError: `source` is neither, cannot be loaded, or cannot be exported; see `export`.
    """
    if Path(source).is_dir():
        module, args, dynamic_shapes = load_huggingface(source)
    elif ":" in source:
        module, args, dynamic_shapes = load_factory(source)
    else:
        raise ExportError(
            f"{source!r} is neither a directory nor PACKAGE.MODULE:FACTORY; "
            "give a local Hugging Face model directory or, for example, mypackage.models:build"
        )
    return export(module, args, path, dynamic_shapes=dynamic_shapes, opset=opset, verify=verify)


def _check_request(module: object, opset: int, verify: bool) -> None:
    import torch

    if not isinstance(module, torch.nn.Module):
        raise ExportError(f"a {type(module).__name__} is not a torch.nn.Module; wrap it in one")
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} cannot be exported: choose one from {OPSETS[0]} to {OPSETS[-1]}")
    if verify and importlib.util.find_spec("onnxruntime") is None:
        raise DependencyError(
            "comparing the export with torch needs ONNX Runtime: "
            "pip install 'qonnx-pipeline[cpu]', or export with verify=False"
        )


@dataclass(frozen=True)
class _Captured:
    """A module's graph as torch's exporter gives it.

    Attributes:
        model: the graph; its initializers share memory with the module's parameters.
        parameters: the names of the parameters and buffers of the module.
        inputs: the name of each graph input.
        computed: for each leaf of what `forward` returns, whether it is an output of the graph (and not a constant).
    """

    model: ir.Model
    parameters: frozenset[str]
    inputs: tuple[str, ...]
    computed: tuple[bool, ...]

    def outputs(self, example: Sequence[tuple[str, Any]]) -> tuple[str, ...]:
        """The names of the graph's outputs, from the leaves of one result."""
        return tuple(name for (name, _), computed in zip(example, self.computed, strict=True) if computed)


def _capture(module: torch.nn.Module, inputs: ExampleInputs, opset: int) -> _Captured:
    from torch.export.graph_signature import ConstantArgument, OutputKind

    kind = type(module).__name__
    program = _translate(module, inputs, opset)
    assert program.exported_program is not None
    graph = program.model.graph
    if len(graph.inputs) != len(inputs.axes):
        raise ExportError(
            f"{kind} takes {len(inputs.axes)} tensors but its graph has {len(graph.inputs)} inputs; "
            "pass plain tensors, lists, tuples or dicts"
        )
    program.rename_axes(_axis_names(graph, inputs))
    _check_axes(graph, inputs, kind)
    signature = program.exported_program.graph_signature
    return _Captured(
        model=program.model,
        parameters=frozenset(signature.inputs_to_parameters.values()) | frozenset(signature.inputs_to_buffers.values()),
        inputs=tuple(str(value.name) for value in graph.inputs),
        computed=tuple(
            not isinstance(spec.arg, ConstantArgument)
            for spec in signature.output_specs
            if spec.kind is OutputKind.USER_OUTPUT
        ),
    )


def _translate(module: torch.nn.Module, inputs: ExampleInputs, opset: int) -> torch.onnx.ONNXProgram:
    """Torch's own export."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attempt() -> torch.onnx.ONNXProgram:
        program = torch.onnx.export(
            module,
            inputs.args,
            kwargs=inputs.kwargs,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=inputs.torch_shapes,
            optimize=False,  # `simplify` does it, without merging parameters that happen to be equal
            # What torch._check_tensor_all leaves behind: the exporter removes the assertion, and not its condition.
            custom_translation_table={torch.ops.aten._is_all_true.default: _all_true},
        )
        assert program is not None
        return program

    try:
        try:
            return attempt()
        except Exception as error:
            # With a bias that is not a mask, torch takes the result of its fused attention kernel for one with other
            # strides, and stops at the next view. The kernel in elementary operations has no such strides, but what
            # torch took for the result of an operator it remembers, whatever kernel is asked for.
            if "Cannot view a tensor" not in _chain(error):
                raise
            with sdpa_kernel(SDPBackend.MATH), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
                return attempt()
    except Exception as error:  # the exporter raises whatever stopped it: its own, dynamo's and the module's errors
        raise ExportError(f"{type(module).__name__} cannot be exported: {_root_cause(error)}") from error


def _all_true(condition: Any) -> Any:
    """aten::_is_all_true in ONNX, of a tensor of booleans; the result is a boolean of no axes."""
    import onnxscript

    op: Any = onnxscript.opset18
    smallest = op.ReduceMin(op.Cast(condition, to=ir.DataType.INT32), keepdims=0)
    return op.Cast(smallest, to=ir.DataType.BOOL)


def _axis_names(graph: ir.Graph, inputs: ExampleInputs) -> dict[str | ir.SymbolicDim, str]:
    """The caller's name of each symbolic dimension. Torch's own renaming gives up when an input is no tensor."""
    names: dict[str | ir.SymbolicDim, str] = {}
    for value, axes in zip(graph.inputs, inputs.axes, strict=True):
        assert value.shape is not None
        for axis, name in axes.items():
            dimension = value.shape[axis]
            if isinstance(dimension, ir.SymbolicDim) and dimension.value is not None:
                names.setdefault(dimension.value, name)
    return names


def _check_axes(graph: ir.Graph, inputs: ExampleInputs, kind: str) -> None:
    for value, axes in zip(graph.inputs, inputs.axes, strict=True):
        assert value.shape is not None
        for axis, name in axes.items():
            found = value.shape[axis]
            where = f"{kind}: axis {axis} of input {value.name!r}"
            if isinstance(found, int):
                raise ExportError(f"{where} cannot be dynamic: forward works for size {found} only; leave {name!r} out")
            if found.value not in inputs.sizes():
                raise ExportError(f"{where} can only be {found.value}; leave {name!r} out of dynamic_shapes")
            if found.value != name:
                raise ExportError(f"{where} always has the size of {found.value!r}: call it that instead of {name!r}")


def _chosen_names(option: str, chosen: Sequence[str] | None, default: Sequence[str]) -> Sequence[str]:
    if chosen is None:
        return default
    if isinstance(chosen, str) or len(chosen) != len(default) or len(set(chosen)) != len(chosen) or not all(chosen):
        raise ExportError(f"{option}={chosen!r}: give {len(default)} different names, one for each of {list(default)}")
    return chosen


def _root_cause(error: BaseException) -> str:
    """What stopped torch's exporter, where, and what to do about it, in one line."""
    text = first_line(error)
    place = _place(error)
    if "data-dependent" in text:
        text = f"forward branches on the values of a tensor{place}"
        return f"{text}; compute both sides and choose with torch.where, or use torch.cond"
    if operator := re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", text):
        remedy = "rewrite that call with elementary torch operations"
        if operator[1].startswith("transformers.grouped_mm"):
            remedy = "call module.set_experts_implementation('batched_mm') before"
        if "complex-valued input" in text:
            remedy = "compute with real and imaginary parts instead"
            return f"torch's exporter cannot translate {operator[1]} of complex numbers; {remedy}"
        return f"ONNX has no counterpart of {operator[1]}; {remedy}"
    advice = "torch.export.export(module, args) shows the whole trace"
    if translated := re.search(r"target=torch\.ops\.([\w.]+)", _chain(error)):
        text = f"{translated[1]}: {text}"
    return f"{text.rstrip('.')}{place}; {advice}"


def _place(error: BaseException) -> str:
    """The line of the user's code that torch stopped at, or where it does not tell, the last one that it ran."""
    causes = list(_causes(error))
    # torch appends it in one of two forms
    told = re.findall(r'(?:File "|Caused by: \()([^":]+)"?(?:, line |:)(\d+),? in', str(causes[-1]))
    ran = [
        (frame.f_code.co_filename, line)
        for cause in causes
        for frame, line in traceback.walk_tb(cause.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _NOT_THE_USERS
    ]
    places = told or ran
    return f" ({Path(places[-1][0]).name}:{places[-1][1]})" if places else ""


def _chain(error: BaseException) -> str:
    return "\n".join(map(str, _causes(error)))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards the mode that each submodule had."""
    modes = [(part, part.training) for part in module.modules()]
    if any(training for _, training in modes):
        logger.warning("%s is in training mode; it is exported in evaluation mode", type(module).__name__)
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what torch's exporter prints, logs and warns about off the user's terminal; errors are raised anyway."""
    disabled = logging.root.manager.disable
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)
