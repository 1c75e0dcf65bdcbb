"""What `quantize` did, and what the user should know before using the file."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import onnx_ir as ir

from qonnx.attempts import Attempt
from qonnx.comparison import ROUNDING_DB, Comparison, mostly_constant
from qonnx.data import HoldOut
from qonnx.diagnostics import Diagnostics
from qonnx.errors import QonnxError
from qonnx.graph import is_float
from qonnx.group_report import GroupReport
from qonnx.plan import QuantPlan
from qonnx.recipe import Format, Recipe
from qonnx.runtime import DISABLED_OPTIMIZERS, HONEST_OPTIONS, Optimization
from qonnx.sensitivity import LayerCost
from qonnx.text import count

# What ONNX Runtime 1.31 says where a weight has several readers.
_SHARED = "Attempt to replace the existing tensor"

# Differences that are not worth a word: kernels round in other places.
_NOTICED_DB = 1.0
_NOTICED_SHARE = 0.01


class Result(msgspec.Struct, frozen=True):
    """What `quantize` did.

    Attributes:
        output: the file that was written.
        plan: every decision.
        comparison: float against quantized model, on batches that neither calibration nor any choice saw; empty
            without data.
        held_out: the number of those batches; 0 when calibration saw them, too: there was only one batch, or the
            statistics that were given are of the same data.
        float_bytes: weights before, in bytes.
        quantized_bytes: weights after, in bytes.
        lookup_bytes: how many of them are embedding tables and the like, which are looked up and not multiplied; they
            stay in float.
        seconds: wall time per stage.
        notes: what preparation changed, how smoothing went, and how codes of weights were chosen.
        warnings: what the user should know before using the file.
        costs: where the first attempt missed the recipe's goal, what each quantized layer alone did to the outputs,
            the worst first.
        diagnostics: what is to be said about calibration; empty where there was none, or a plan was given.
        smoothing: every group of channels that smoothing looked at: what was done, or why nothing was.
    """

    output: str
    plan: QuantPlan
    comparison: Comparison
    held_out: int
    float_bytes: int
    quantized_bytes: int
    lookup_bytes: int
    seconds: dict[str, float]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    costs: tuple[LayerCost, ...] = ()
    diagnostics: Diagnostics = Diagnostics()
    smoothing: tuple[GroupReport, ...] = ()


def warnings_of(
    attempt: Attempt,
    comparison: Comparison,
    held: HoldOut,
    recipe: Recipe,
    calibrated: bool,
    known: Sequence[str],
) -> tuple[str, ...]:
    """What to say loudly."""
    warnings = []
    listed = "; the layers that cost most are listed" if attempt.costs else ""
    if not attempt.plan.quantized_layers:
        warnings.append("no layer was quantized: the file computes what the float model computes")
    if convolutions := _slow_convolutions(attempt.plan):
        warnings.append(
            f"{count(convolutions, 'convolution')} with a range found at run time: ONNX Runtime computes ConvInteger "
            "slowly, MobileNetV2 in 8 times the time of float on one CPU; measure, use recipe int8 (it needs data), or "
            "leave them in float by a rule (op: Conv, skip: true)"
        )
    if not comparison.batches:
        return (*warnings, "no data were given: how much the outputs changed is not known")
    if not comparison.outputs:
        warnings.append("no output is a tensor: nothing could be compared")
    for output in comparison.outputs:
        if output.nonfinite > output.nonfinite_reference:
            warnings.append(f"output {output.name}: {output.nonfinite} values are not finite")
        elif output.sqnr_db < recipe.goal_sqnr_db:
            warnings.append(
                f"output {output.name} keeps only {output.sqnr_db:.1f} dB (the goal is {recipe.goal_sqnr_db:g} dB): "
                "measure the task before you use this file" + listed
            )
        if output.agreement < 1:
            warnings.append(f"output {output.name}: {1 - output.agreement:.2%} of its integers differ")
        if output.mismatched_batches:
            warnings.append(f"output {output.name}: its shape differs in {output.mismatched_batches} batches")
    warnings += (*mostly_constant(comparison.outputs), *filter(None, known))
    if calibrated and len(held.kept) == 1 and not held.shared:
        warnings.append("one batch was held back, on which choices were made too: give six batches or more")
    return tuple(warnings)


def loading(comparison: Comparison) -> tuple[str, ...]:
    """What to say of a file that ONNX Runtime could not load as it should."""
    if not comparison.batches or not comparison.refusal:
        return ()
    level = "basic" if comparison.optimization is Optimization.BASIC else "no"
    shared = (
        ", or leave out session.x64quantprecision=1, without which integers are exact on CPUs with VNNI only (layers "
        "share a weight, or have equal ones)"
    )
    return (
        f"ONNX Runtime cannot optimize this file ({comparison.refusal}): it was measured with {level} optimizations; "
        f"set {comparison.optimization.value} in your own session" + (shared if _SHARED in comparison.refusal else ""),
    )


def by_default(measured: Comparison, usual: Comparison | QonnxError) -> tuple[str, ...]:
    """What to say where the outputs are worse in a session in which no option was set, on this CPU.

    Args:
        measured: the quantized model with the options that are set here.
        usual: the same without, or why it does not run then.
    """
    if measured.refusal:  # `loading` says what to do
        return ()
    disabled = ", ".join(map(repr, DISABLED_OPTIMIZERS))
    remedy = (
        f"set {', '.join(f'{key}={value}' for key, value in HONEST_OPTIONS.items())} and disabled_optimizers="
        f"[{disabled}] in yours, as here"
    )
    if isinstance(usual, QonnxError):
        return (f"a session with ONNX Runtime's default options does not run this file ({usual}): {remedy}",)
    pairs = list(zip(measured.outputs, usual.outputs, strict=True))
    where = "in a session with ONNX Runtime's default options, output"
    if broken := [other.name for ours, other in pairs if other.nonfinite > ours.nonfinite]:
        return (f"{where} {broken[0]} has values that are not finite on this CPU: {remedy}",)
    worse = [(ours, other) for ours, other in pairs if other.sqnr_db < min(ours.sqnr_db - _NOTICED_DB, ROUNDING_DB)]
    if worse:
        ours, other = min(worse, key=lambda pair: pair[1].sqnr_db)
        return (f"{where} {other.name} keeps {other.sqnr_db:.1f} dB on this CPU, not {ours.sqnr_db:.1f}: {remedy}",)
    differ = [(ours, other) for ours, other in pairs if other.agreement < ours.agreement - _NOTICED_SHARE]
    if differ:
        ours, other = min(differ, key=lambda pair: pair[1].agreement)
        kept = f"{other.agreement:.2%} of its integers on this CPU, not {ours.agreement:.2%}"
        return (f"{where} {other.name} keeps {kept}: {remedy}",)
    return ()


def _slow_convolutions(plan: QuantPlan) -> int:
    return sum(layer.op == "Conv" for layer in plan.quantized_layers) if plan.format is Format.DYNAMIC else 0


def lookup_bytes(model: ir.Model, plan: QuantPlan) -> int:
    """Bytes of embedding tables and the like, which are looked up and not multiplied, and stay in float."""
    quantized = {weight.value for weight in plan.weights}
    return sum(
        int(value.const_value.nbytes)
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and is_float(value)
        and value.name not in quantized
        and any(usage.node.op_type == "Gather" and usage.idx == 0 for usage in value.uses())
    )
