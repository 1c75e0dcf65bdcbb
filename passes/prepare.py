"""One normal form for any float graph, computing the same function.

Afterwards every constant of the main graph is an initializer, functions are inlined, what depends on constants alone is
folded, weights that are computed from others are stored, fused operators of ONNX Runtime are written out,
BatchNormalization is part of the weights where it can be, matrix products are MatMul and not Einsum, normalisations and
Gelu are single nodes where the opset has them, every node has a unique name, and types and shapes are known as far as
they can be. The names and types of inputs and outputs stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import (
    InlinePass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from qonnx.errors import ModelError
from qonnx.graph import all_graphs, first_line, is_float
from qonnx.passes.expand_fused import EXPANDED_OPSET, FUSED_OPERATORS, ExpandFused, fused_nodes
from qonnx.passes.fold_batchnorm import FoldBatchNorm
from qonnx.passes.fold_constants import FoldConstants
from qonnx.passes.fold_weights import FoldWeights
from qonnx.passes.fuse_gelu import FuseGelu
from qonnx.passes.fuse_norms import LAYER_NORM_OPSET, FuseNorms, decomposed_norms
from qonnx.passes.infer_shapes import InferShapes
from qonnx.passes.name_nodes import NameNodes
from qonnx.passes.pool_globally import PoolGlobally
from qonnx.passes.raise_opset import RaiseOpset, opset
from qonnx.passes.rewrite_einsum import RewriteEinsum
from qonnx.text import count
from qonnx.validity import sort

# The first version of the file format in which a weight need not be an input with a default value.
_WEIGHTS_ARE_NO_INPUTS = 4


def prepare(model: ir.Model, *, minimum_opset: int = 13, fuse: bool = True) -> tuple[str, ...]:
    """Brings a model into normal form, in place.

    Args:
        model: any float model; large weights are neither read nor copied.
        minimum_opset: what the quantized graph will need: 13 for scales per channel, 19 for scales in float16.
        fuse: where a LayerNormalization is spelled out, raise the opset to 17 to write it as one node.

    Returns:
        What was changed and what could not be done, a line each; () for a model in normal form.

    Raises:
        ModelError: the graph has a cycle, a function that calls itself, or cannot be brought to `minimum_opset`.
    """
    notes: list[str] = []
    sort(model, model.graph.name or "model")
    _open_negative_sizes(model)
    notes += _fix_defaults(model)
    interface = _Interface(model)
    notes += _inline(model)
    NameNodes()(model)
    _attempt(InferShapes(), model, notes)
    _fold(model, notes)
    notes += _expand(model)
    if _raise_opset(model, minimum_opset, fuse, notes):
        _attempt(InferShapes(), model, notes)
        _attempt(FoldConstants(), model, notes)
    PoolGlobally()(model)
    before = _operators(model)
    RewriteEinsum()(model)
    notes += _listed("wrote", before - _operators(model), "as MatMul")
    before = _operators(model)
    FoldBatchNorm()(model)
    notes += _listed("folded", before - _operators(model), "into the weights before them")
    before = _operators(model)
    FuseNorms()(model)
    FuseGelu()(model)
    notes += _listed("wrote", _operators(model) - before, "in one node each")
    _attempt(FoldConstants(), model, notes)
    NameNodes()(model)
    sort(model, model.graph.name or "model")
    _attempt(InferShapes(), model, notes)
    RemoveUnusedOpsetsPass()(model)
    interface.restore(model)
    return tuple(dict.fromkeys(notes))


def _open_negative_sizes(model: ir.Model) -> None:
    """Makes sizes below 0, which older exporters write for dynamic ones, unknown."""
    for graph in all_graphs(model):
        for value in (*graph.inputs, *graph.outputs, *(value for node in graph for value in node.outputs)):
            if value.shape is not None and any(isinstance(size, int) and size < 0 for size in value.shape):
                value.shape = ir.Shape([None if isinstance(size, int) and size < 0 else size for size in value.shape])


def _operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for graph in all_graphs(model) for node in graph)


def _listed(verb: str, operators: Counter[str], what: str) -> Iterator[str]:
    """A line such as "folded 2 BatchNormalization, 1 Mul into the weights before them", if there are any."""
    if operators:
        yield f"{verb} {', '.join(f'{count} {name}' for name, count in sorted(operators.items()))} {what}"


def _attempt(step: ir.passes.InPlacePass, model: ir.Model, notes: list[str]) -> None:
    """Runs a pass that a model is usable without."""
    try:
        step(model)
    except ModelError as error:
        notes.append(f"{error}; continuing without")


def _fold(model: ir.Model, notes: list[str]) -> None:
    before = _operators(model)
    _attempt(FoldConstants(), model, notes)
    FoldWeights()(model)
    RemoveUnusedNodesPass()(model)
    gone = before - _operators(model)
    constants = gone.pop("Constant", 0)
    if constants:
        notes.append(f"made {count(constants, 'Constant node')} initializers")
    if gone:
        notes.append(f"removed {count(gone.total(), 'node')}, which nothing needs or whose result is constant")


def _fix_defaults(model: ir.Model) -> Iterator[str]:
    """Makes constants of inputs with default values, as far as they are weights."""
    graph = model.graph
    fixed = [
        value
        for value in graph.inputs
        if value.is_initializer() and (model.ir_version < _WEIGHTS_ARE_NO_INPUTS or _is_weight(value))
    ]
    model.ir_version = max(model.ir_version, _WEIGHTS_ARE_NO_INPUTS)
    if fixed:
        names = {value.name for value in fixed}
        kept = [value for value in graph.inputs if value.name not in names]
        graph.inputs.clear()
        graph.inputs.extend(kept)
        yield f"made constants of {len(fixed)} inputs with default values, such as {fixed[0].name!r}"


def _is_weight(value: ir.Value) -> bool:
    """Exporters that were told to list weights among the inputs leave no other trace than that they are tensors."""
    return is_float(value) and value.const_value is not None and value.const_value.size > 1


def _inline(model: ir.Model) -> Iterator[str]:
    def same_opsets(function: ir.Function) -> bool:
        imports = model.opset_imports
        return all(imports.get(domain, version) == version for domain, version in function.opset_imports.items())

    before = len(model.functions)
    try:
        InlinePass(criteria=same_opsets)(model)
    except (ValueError, ir.passes.PassError, ir.passes.PreconditionError) as error:
        raise ModelError(f"the functions of the model cannot be inlined: {first_line(error)}") from error
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    if before > len(model.functions):
        yield f"inlined {before - len(model.functions)} functions"
    for function in model.functions.values():
        yield f"function {function.name} stays, in float: it is written for another opset than the model"


def _expand(model: ir.Model) -> Iterator[str]:
    """Writes ONNX Runtime's fused operators in those of ONNX; what ranks are not known before takes another round."""
    if not fused_nodes(model):
        return
    before = _operators(model)
    try:
        RaiseOpset(EXPANDED_OPSET)(model)
        InferShapes()(model)
        while ExpandFused()(model).modified:
            NameNodes()(model)
            InferShapes()(model)
            FoldConstants()(model)
    except ModelError as error:
        yield f"{error}; operators of ONNX Runtime stay"
    made = Counter({op: count for op, count in (before - _operators(model)).items() if op in FUSED_OPERATORS})
    yield from _listed("wrote", made, "of ONNX Runtime in operators of ONNX")


def _raise_opset(model: ir.Model, minimum: int, fuse: bool, notes: list[str]) -> bool:
    """Raises the opset as far as needed; whether that changed the model."""
    current = opset(model)
    wanted = minimum
    if fuse and any(norm.centred for norm in decomposed_norms(model)):
        wanted = max(minimum, LAYER_NORM_OPSET)
    try:
        RaiseOpset(wanted)(model)
    except ModelError as error:
        if wanted == minimum:
            raise
        notes.append(f"{error}; LayerNormalization stays in elementary operators")
        RaiseOpset(minimum)(model)
    if opset(model) > current:
        notes.append(f"opset raised {current} -> {opset(model)}")
    return opset(model) > current


class _Interface:
    """What a model declares of its inputs and outputs.

    Until it is restored, inputs with default values have none, for nothing may be folded that a caller can override.
    """

    def __init__(self, model: ir.Model) -> None:
        graph = model.graph
        graph.name = graph.name or "graph"  # required by the specification, but not by any runtime
        self._types = [(value.type, value.shape) for value in (*graph.inputs, *graph.outputs)]
        self._defaults: dict[str, ir.TensorProtocol] = {}
        for value in graph.inputs:
            if value.name and value.const_value is not None:
                self._defaults[value.name] = value.const_value
                del graph.initializers[value.name]
                value.const_value = None

    def restore(self, model: ir.Model) -> None:
        """Declares it again."""
        graph = model.graph
        for value, (kind, shape) in zip((*graph.inputs, *graph.outputs), self._types, strict=True):
            if kind is not None:
                value.type = kind
            if shape is not None:  # otherwise the inferred one: a file without is not valid, though it runs
                value.shape = shape
        for value in graph.inputs:
            if value.name in self._defaults:
                value.const_value = self._defaults[value.name]
                graph.register_initializer(value)
