"""What quantization and comparison found, as lines of text: the verdict first, then the figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from qonnx.plan import LayerPlan
from qonnx.recipe import Format
from qonnx.text import (
    BAD,
    GOOD,
    MOST,
    TITLE,
    by_reason,
    columns,
    count,
    differences,
    line,
    nonfinite,
    percent_text,
    size_text,
    warning_lines,
)

if TYPE_CHECKING:
    from qonnx.comparison import Comparison, Difference
    from qonnx.diagnostics import Diagnostics
    from qonnx.group_report import GroupReport
    from qonnx.plan import QuantPlan
    from qonnx.result import Result
    from qonnx.sensitivity import LayerCost

# How many tensors the terminal names for each finding about calibration.
_WORST = 3

# From which share of elements beyond a range on it is worth a line, and up to which consistency outliers are.
_CUT_OFF = 0.005
_CONSISTENT = 0.5

# So many channels with outliers in a sample, on average, are worth a line.
_OUTLIERS = 0.5


def result_tables(result: Result) -> list[Text]:
    """Whether the file can be used, what it is, what was left in float and why, and what to look out for."""
    plan = result.plan
    verdict = _verdict(result.comparison.outputs)
    if result.comparison.batches:
        unseen = "held-back batch" if plan.format.calibrated else "batch"
        verdict += f", judged on {count(result.held_out, unseen) if result.held_out else 'what calibration saw'}"
    if result.warnings:
        lines = [Text(f"{result.output}: check it before use; {verdict}", BAD)]
    else:
        lines = [Text(f"{result.output}: ready; {verdict}", GOOD)]
    lines += warning_lines(result.warnings)
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    facts = [
        ("layers", _layers(plan)),
        ("made for", f"{plan.target} with recipe {plan.recipe}"),
        ("weights", _share(result.quantized_bytes, result.float_bytes)),
        ("", _without_lookups(result)),
        ("time", stages),
        *(("graph", note) for note in result.notes),
    ]
    lines += [Text(), *columns([fact for fact in facts if fact[1]], right=0, sentences=True)]
    if result.comparison.outputs:
        lines += [Text(), *differences(result.comparison.outputs)]
    if result.costs and result.warnings:
        lines += [Text(), *_costs(result.costs)]
    return lines + _smoothing(result.smoothing) + _calibration(result.diagnostics) + _left_in_float(plan)


def _smoothing(groups: Sequence[GroupReport]) -> list[Text]:
    """What was done with groups of channels, the largest gain first, and why others were left alone."""
    done = [group for group in groups if group.method]
    if not done:
        return []
    done.sort(key=lambda group: (group.sqnr_db or 0) - (group.smoothed_sqnr_db or 0))
    rows = [("crest", "", "SQNR dB", "", "weights", "")]
    for group in done[:MOST]:
        crest = _change(group.crest, group.smoothed_crest)
        kept = _change(group.sqnr_db, group.smoothed_sqnr_db)
        growth = "" if group.weight_growth is None else f"x {group.weight_growth:.2g}"
        name = f"{group.value}, {group.method}" + (f", {count(group.nodes, 'node')} more" if group.nodes else "")
        rows.append((*crest, *kept, growth, name))
    title = f"channels scaled or shifted: {len(done)} of {count(len(groups), 'group')}; estimates for their layers"
    lines = [Text(), Text(title, TITLE), *columns(rows, right=5)]
    if len(done) > MOST:
        lines.append(line(f"... and {len(done) - MOST} more"))
    changed = {group.value for group in done}
    left = dict.fromkeys(  # equalization and smoothing may both say it
        LayerPlan(group.value, "channels", "", "", group.reason)
        for group in groups
        if not group.method and group.value not in changed
    )
    return lines + by_reason(list(left))


def _change(before: float | None, after: float | None) -> tuple[str, str]:
    return ("", "") if before is None or after is None else (f"{before:.1f}", f"-> {after:.1f}")


def _calibration(found: Diagnostics) -> list[Text]:
    """The worst few of what is worth knowing; --json holds everything."""
    cut = [s for s in found.saturations if s.share >= _CUT_OFF]
    wander = [o for o in found.outliers if o.consistency.jaccard < _CONSISTENT and o.consistency.outliers >= _OUTLIERS]
    stay = [o for o in found.outliers if o.consistency.jaccard >= _CONSISTENT and o.consistency.constant]
    rows = [
        *_worst("larger on held-back data", [(f"{e.ratio:.2f} x", e.value) for e in found.excesses]),
        *_worst("elements beyond the range", [(percent_text(s.share), s.value) for s in cut]),
        *_worst("outliers change channels", [(f"{o.consistency.outliers:.1f} a sample", o.value) for o in wander]),
        *_worst(
            "outliers keep their channels", [(count(len(o.consistency.constant), "channel"), o.value) for o in stay]
        ),
    ]
    if not rows and not found.warnings:
        return []
    title = [Text(), Text("calibration", TITLE)]
    return [*title, *(Text(f"  note: {warning}") for warning in found.warnings), *columns(rows, right=0)]


def _worst(what: str, found: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    for number, (figure, name) in enumerate(found[:_WORST]):
        yield f"  {what}" if not number else "", figure, name
    if len(found) > _WORST:
        yield "", "", f"... and {len(found) - _WORST} more"


def _layers(plan: QuantPlan) -> str:
    share = f"{len(plan.quantized_layers)} of {len(plan.layers)}"
    types = " and ".join(sorted({str(weight.dtype) for weight in plan.weights}))
    match plan.format:
        case Format.WEIGHT_ONLY:
            return f"{share} with weights in {types or 'float'}, computing in float"
        case Format.DYNAMIC | Format.PER_TOKEN:
            where = "tensor" if plan.format is Format.DYNAMIC else "token"
            return f"{share} on integers, with a scale for each {where} found at run time"
    return f"{share} on {'integers' if types.startswith(('int', 'uint')) or not types else types}"


def comparison_tables(comparison: Comparison) -> list[Text]:
    """The worst output, then every output, and every layer where layers were compared."""
    from qonnx.comparison import mostly_constant

    broken = [entry for entry in (*comparison.outputs, *comparison.layers) if nonfinite(entry)]
    verdict = f"{_verdict(comparison.outputs)}, on {count(comparison.batches, 'batch')}"
    lines = [Text(verdict, BAD if broken else TITLE)]
    lines += warning_lines(f"{entry.name}: {entry.nonfinite} values are NaN or infinite" for entry in broken[:MOST])
    lines += warning_lines(
        f"{entry.name}: its shape differs in {count(entry.mismatched_batches, 'batch')}"
        for entry in comparison.outputs
        if entry.mismatched_batches
    )
    lines += warning_lines(mostly_constant(comparison.outputs))
    lines += [Text(), *differences(comparison.outputs)]
    if comparison.layers:
        lines += [Text(), Text("layers in network order; errors add up on the way", TITLE)]
        lines += differences(comparison.layers)
    if unmatched := comparison.unmatched_layers:
        lines += [Text(), Text(f"{count(len(unmatched), 'layer')} without a counterpart of that name", TITLE)]
        lines += [line(f"  {name}") for name in unmatched[:MOST]]
        if len(unmatched) > MOST:
            lines.append(Text(f"  ... and {len(unmatched) - MOST} more: --json lists them all"))
    return lines


def _verdict(outputs: Sequence[Difference]) -> str:
    """The worst that happened to any output, in a few words."""
    if any(nonfinite(entry) for entry in outputs):
        return "outputs are NaN or infinite where those of the float model are not"
    ratio = min((entry.sqnr_db for entry in outputs if not math.isnan(entry.sqnr_db)), default=math.nan)
    agreement = min((entry.agreement for entry in outputs if not math.isnan(entry.agreement)), default=math.nan)
    parts = []
    if ratio == math.inf:
        parts.append("outputs are the same as in float")
    elif ratio == -math.inf:
        parts.append("an output that is zero in float is not")
    elif not math.isnan(ratio):
        parts.append(f"outputs keep {ratio:.1f} dB (the error is {percent_text(10 ** (-ratio / 20))} of the signal)")
    if not math.isnan(agreement):
        parts.append(f"{percent_text(agreement)} of integer outputs are equal")
    return ", ".join(parts) or "nothing could be compared"


def _costs(costs: Sequence[LayerCost]) -> list[Text]:
    rows = [("SQNR dB", ""), *((f"{cost.sqnr_db:.1f}", f"{cost.path or cost.node} ({cost.op})") for cost in costs)]
    title = Text("what the outputs keep when only this layer is quantized", TITLE)
    return [title, *columns(rows[: MOST + 1], right=1)]


def _left_in_float(plan: QuantPlan) -> list[Text]:
    lines = []
    if plan.float_layers:
        title = f"left in float: {len(plan.float_layers)} of {count(len(plan.layers), 'layer')}"
        lines += [Text(), Text(title, TITLE), *by_reason(plan.float_layers)]
    if plan.float_operators:
        counts: dict[str, list[str]] = {}
        for entry in sorted(plan.float_operators, key=lambda entry: -entry.count):
            counts.setdefault(entry.reason, []).append(f"{entry.count} {entry.op}")
        lines += [Text(), Text("other operators, in float", TITLE)]
        lines += [Text(f"  {', '.join(found)}: {reason}") for reason, found in counts.items()]
    return lines


def _without_lookups(result: Result) -> str:
    if not result.lookup_bytes:
        return ""
    rest = _share(result.quantized_bytes - result.lookup_bytes, result.float_bytes - result.lookup_bytes)
    return f"{rest} without embedding tables, which stay in float"


def _share(after: int, before: int) -> str:
    return f"{size_text(before)} -> {size_text(after)} ({percent_text(after / max(before, 1))})"
