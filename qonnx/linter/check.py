"""Runs all rules over a graph, and repairs what they find."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from qonnx.errors import ModelError, TargetError
from qonnx.graph import all_graphs, load
from qonnx.linter.edit import Editor
from qonnx.linter.errors import ERRORS, e11_dynamic_inputs
from qonnx.linter.findings import Finding, Fix, Repair
from qonnx.linter.fixes import REPAIRS
from qonnx.linter.view import Site, quantizer_of
from qonnx.linter.warnings import WARNINGS
from qonnx.passes.infer_shapes import InferShapes
from qonnx.targets import target as target_named

# One repair can lay open the next: a constant loses its zero point, then moves behind its Transpose.
_ROUNDS = 8


@dataclass(frozen=True, eq=False)
class Fixed:
    """What `fix` made.

    Attributes:
        model: the repaired graph.
        fixes: what was done, in order.
        findings: what is still wrong with it.
    """

    model: ir.Model
    fixes: tuple[Fix, ...]
    findings: tuple[Finding, ...]


def lint(model: ir.Model | str | os.PathLike[str], *, target: str = "a800") -> tuple[Finding, ...]:
    """Checks a quantized graph of any tool against what TensorRT refuses, misreads, or runs slowly.

    Only scales and zero points are read, never weights. Nothing is compiled: a graph without errors can still hold an
    operator in a form that the compiler lacks.

    Args:
        model: an ONNX file or a graph; left as it is.
        target: the device that the engine is for.

    Returns:
        What is wrong: dynamic inputs first, then in the order of the nodes; () for a clean graph.

    Raises:
        ModelError: the file is missing or is not a model.
        TargetError: the target is unknown, or runs no TensorRT.
    """
    capability = _capability(target)
    loaded = model if isinstance(model, ir.Model) else load(model)
    return tuple(_findings(_prepared(loaded), capability))


def fix(model: ir.Model | str | os.PathLike[str], *, target: str = "a800", exact_only: bool = False) -> Fixed:
    """Repairs what can be repaired without calibration data.

    Most repairs change no value. Approximate are those of codes with a zero point that cannot be shifted to 0 (the pair
    is removed where all that reads it computes in float, and gets the symmetric grid of the same range elsewhere) and
    of scales that are not finite (the pair is removed).
    `Fix.exact` tells, and `qonnx.compare` measures what came of it.

    Args:
        model: an ONNX file or a graph; left as it is.
        target: the device that the engine is for.
        exact_only: make only repairs that leave the function alone.

    Raises:
        ModelError: the file is missing or is not a model.
        TargetError: the target is unknown, or runs no TensorRT.
    """
    capability = _capability(target)
    fixed = _prepared(model if isinstance(model, ir.Model) else load(model))
    fixes: list[Fix] = []
    for _ in range(_ROUNDS):
        made = _fix_once(fixed, capability, exact_only)
        fixes += made
        if not made:
            break
    return Fixed(fixed, tuple(fixes), tuple(_findings(fixed, capability)))


def _fix_once(model: ir.Model, capability: tuple[int, int], exact_only: bool) -> list[Fix]:
    editor, fixes = Editor(model), []
    accepted = (Repair.EXACT,) if exact_only else (Repair.EXACT, Repair.APPROXIMATE)
    todo = [(site, finding) for site, finding in _walk(model, capability) if finding.repair in accepted]
    for site, finding in todo:
        if site.node.graph is None:
            continue  # removed by an earlier repair
        outcome = REPAIRS[finding.rule](editor, site.node)
        if outcome is not None:
            fixes.append(Fix(finding.rule, finding.node, outcome.description, outcome.exact))
    return fixes


def _findings(model: ir.Model, capability: tuple[int, int]) -> Iterator[Finding]:
    yield from e11_dynamic_inputs(model)
    for _, finding in _walk(model, capability):
        yield finding


def _walk(model: ir.Model, capability: tuple[int, int]) -> Iterator[tuple[Site, Finding]]:
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    for graph in all_graphs(model):
        for node in graph:
            site = Site(node, quantizer_of(node), opset, capability)
            for rule in (*ERRORS, *WARNINGS):
                finding = rule(site)
                if finding is not None:
                    yield site, finding


def _prepared(model: ir.Model) -> ir.Model:
    """A copy with functions inlined, and types and shapes known where they can be inferred."""
    try:
        copy = model.clone()
    except RuntimeError as error:  # a node that reads a value which nothing defines
        raise ModelError(f"{model.graph.name or 'model'}: not a valid graph: {error}") from error
    if copy.functions:
        InlinePass()(copy)
    with contextlib.suppress(ModelError):  # rules that need shapes then say nothing
        InferShapes()(copy)
    return copy


def _capability(target: str) -> tuple[int, int]:
    capability = target_named(target).compute_capability
    if capability is None:
        raise TargetError(f"target {target!r} runs no TensorRT; lint for a GPU such as a800")
    return capability
