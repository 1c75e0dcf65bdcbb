"""Results as lines of text: the verdict first, then figures in columns, names last.

A name is never folded and a figure never cut off, so that lines can be copied, searched and sorted; the same lines go
to a terminal and into a pipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from qonnx.devices import Format
from qonnx.plan import LayerPlan
from qonnx.recipe import Format as Quantization
from qonnx.roofline import Variant

if TYPE_CHECKING:
    import onnx_ir as ir

    from qonnx.comparison import Comparison, Difference
    from qonnx.diagnostics import Diagnostics
    from qonnx.engine import EngineLayer, EngineReport
    from qonnx.engine.bench import BenchReport
    from qonnx.engine.inspection import NodeInspection
    from qonnx.pipeline import Result
    from qonnx.plan import QuantPlan
    from qonnx.roofline import Roofline
    from qonnx.sensitivity import LayerCost
    from qonnx.smoothing import GroupReport

# How many layers a list names before it only counts the rest.
_ROWS = 12

# How many tensors the terminal names for each finding about calibration.
_WORST = 3

# From which share of elements beyond a range on it is worth a line, and up to which consistency outliers are.
_CUT_OFF = 0.005
_CONSISTENT = 0.5

_GOOD, _BAD, _TITLE = "bold green", "bold yellow", "bold"


def result_tables(result: Result) -> list[Text]:
    """Whether the file can be used, what it is, what was left in float and why, and what to look out for."""
    plan = result.plan
    verdict = _verdict(result.comparison.outputs)
    if result.comparison.batches:
        unseen = "held-back batch" if plan.format.calibrated else "batch"
        verdict += f", judged on {count(result.held_out, unseen) if result.held_out else 'what calibration saw'}"
    if result.warnings:
        lines = [Text(f"{result.output}: check it before use; {verdict}", _BAD)]
    else:
        lines = [Text(f"{result.output}: ready; {verdict}", _GOOD)]
    lines += _warnings(result.warnings)
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    facts = [
        ("layers", _layers(plan)),
        ("made for", f"{plan.target} with recipe {plan.recipe}"),
        ("weights", _share(result.quantized_bytes, result.float_bytes)),
        ("", _without_lookups(result)),
        ("time", stages),
        *(("prepared", note) for note in result.notes),
    ]
    lines += [Text(), *_rows([fact for fact in facts if fact[1]], right=0)]
    if result.comparison.outputs:
        lines += [Text(), *_differences(result.comparison.outputs)]
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
    for group in done[:_ROWS]:
        crest = _change(group.crest, group.smoothed_crest)
        kept = _change(group.sqnr_db, group.smoothed_sqnr_db)
        growth = "" if group.weight_growth is None else f"x {group.weight_growth:.2g}"
        name = f"{group.value}, {group.method}" + (f", {count(group.nodes, 'node')} more" if group.nodes else "")
        rows.append((*crest, *kept, growth, name))
    title = f"channels scaled or shifted: {len(done)} of {count(len(groups), 'group')}; estimates for their layers"
    lines = [Text(), Text(title, _TITLE), *_rows(rows, right=5)]
    if len(done) > _ROWS:
        lines.append(_line(f"... and {len(done) - _ROWS} more"))
    changed = {group.value for group in done}
    left = [
        LayerPlan(group.value, "channels", "", "", group.reason)
        for group in groups
        if not group.method and group.value not in changed
    ]
    return lines + _by_reason(left)


def _change(before: float | None, after: float | None) -> tuple[str, str]:
    return ("", "") if before is None or after is None else (f"{before:.1f}", f"-> {after:.1f}")


def _calibration(found: Diagnostics) -> list[Text]:
    """The worst few of what is worth knowing; --json holds everything."""
    cut = [s for s in found.saturations if s.share >= _CUT_OFF]
    wander = [o for o in found.outliers if o.consistency.jaccard < _CONSISTENT]
    stay = [o for o in found.outliers if o.consistency.jaccard >= _CONSISTENT and o.consistency.constant]
    rows = [
        *_worst("larger on held-back data", [(f"{e.ratio:.2f} x", e.value) for e in found.excesses]),
        *_worst("elements beyond the range", [(_percent(s.share), s.value) for s in cut]),
        *_worst("outliers change channels", [(f"{o.consistency.outliers:.1f} a sample", o.value) for o in wander]),
        *_worst(
            "outliers keep their channels", [(count(len(o.consistency.constant), "channel"), o.value) for o in stay]
        ),
    ]
    if not rows and not found.warnings:
        return []
    title = [Text(), Text("calibration", _TITLE)]
    return [*title, *(Text(f"  note: {warning}") for warning in found.warnings), *_rows(rows, right=0)]


def _worst(what: str, found: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    for number, (figure, name) in enumerate(found[:_WORST]):
        yield f"  {what}" if not number else "", figure, name
    if len(found) > _WORST:
        yield "", "", f"... and {len(found) - _WORST} more"


def _layers(plan: QuantPlan) -> str:
    share = f"{len(plan.quantized_layers)} of {len(plan.layers)}"
    types = " and ".join(sorted({str(weight.dtype) for weight in plan.weights}))
    match plan.format:
        case Quantization.WEIGHT_ONLY:
            return f"{share} with weights in {types or 'float'}, computing in float"
        case Quantization.DYNAMIC | Quantization.PER_TOKEN:
            where = "tensor" if plan.format is Quantization.DYNAMIC else "token"
            return f"{share} on integers, with a scale for each {where} found at run time"
    return f"{share} on {'integers' if types.startswith(('int', 'uint')) or not types else types}"


def comparison_tables(comparison: Comparison) -> list[Text]:
    """The worst output, then every output, and every layer where layers were compared."""
    broken = [entry for entry in (*comparison.outputs, *comparison.layers) if _nonfinite(entry)]
    verdict = f"{_verdict(comparison.outputs)}, on {count(comparison.batches, 'batch')}"
    lines = [Text(verdict, _BAD if broken else _TITLE)]
    lines += _warnings(f"{entry.name}: {entry.nonfinite} values are NaN or infinite" for entry in broken[:_ROWS])
    lines += _warnings(
        f"{entry.name}: its shape differs in {count(entry.mismatched_batches, 'batch')}"
        for entry in comparison.outputs
        if entry.mismatched_batches
    )
    lines += [Text(), *_differences(comparison.outputs)]
    if comparison.layers:
        lines += [Text(), Text("layers in network order; errors add up on the way", _TITLE)]
        lines += _differences(comparison.layers)
    if comparison.unmatched_layers:
        lines.append(Text(f"{count(len(comparison.unmatched_layers), 'layer')} without a counterpart of that name"))
    return lines


def engine_tables(report: EngineReport, layers: bool = False) -> list[Text]:
    """The engine, and how it runs each matrix product and convolution of the model: those first that miss the plan.

    Args:
        report: what was built.
        layers: whether to list all of them, and every kernel.
    """
    in_float = [node for node in report.nodes if not node.int8]
    lost = [node for node in in_float if node.planned]
    share = f"{len(report.nodes) - len(in_float)} of {len(report.nodes)} convolutions and matrix products run on INT8"
    lines = [Text(f"{report.plan}: {share}", _BAD if lost or len(in_float) == len(report.nodes) else _GOOD)]
    for node in lost:
        reason = node.reason or "the compiler gives no reason"
        lines += _warnings([f"{node.node} ({node.op}) is quantized, and runs in float: {reason}"])
    lines += _warnings(report.warnings)
    capability = ".".join(str(part) for part in report.compute_capability)
    facts = [
        ("size", size_text(report.bytes)),
        ("made for", f"compute capability {capability}"),
        ("made by", f"{report.compiler} in {report.seconds:.1f} s"),
        *(("shapes", f"{name} {' '.join(map(_shape, shapes))}") for name, shapes in report.profiles.items()),
    ]
    lines += [Text(), *_rows(facts, right=0), *_node_rows(report.nodes, layers)]
    left = [LayerPlan(node.node, node.op, "", node.path, node.reason) for node in in_float if not node.planned]
    if any(layer.reason for layer in left):
        lines += [Text(), Text("left in float", _TITLE), *_by_reason([layer for layer in left if layer.reason])]
    if layers:
        rows = [("reads", "writes", "kernel"), *map(_kernel, report.layers)]
        lines += [Text(), Text("kernels in order of execution", _TITLE), *_rows(rows, right=0)]
    return lines


def _node_rows(nodes: Sequence[NodeInspection], everything: bool) -> list[Text]:
    """One line a node: those that miss the plan, then those in float, then the others."""
    if not nodes:
        return []
    ordered = sorted(nodes, key=lambda node: (node.int8, not node.planned))
    shown = ordered if everything else ordered[:_ROWS]
    rows = [("reads", "writes", "copies", "layer -> engine layer")]
    for node in shown:
        fused = f", fused with {', '.join(node.fused)}" if node.fused else ""
        name = f"{node.node} ({node.op}) -> {node.layer or 'none: folded away'}{fused}"
        rows.append((" ".join(node.reads), " ".join(node.writes), str(len(node.copies)), name))
    lines = [Text(), Text("layers, those in float first", _TITLE), *_rows(rows, right=0)]
    rest = len(ordered) - len(shown)
    return [*lines, Text(f"... and {rest} more: --layers lists them all")] if rest else lines


def bench_tables(report: BenchReport) -> list[Text]:
    """How fast the engine is, beside the float model, and how close its outputs are."""
    speed = f"{report.quantized.p50:.3f} ms a batch"
    if report.speedup is not None:
        speed += f", {report.speedup:.2f} times as fast as the float model in {report.quantized.float_type}"
    capability = ".".join(map(str, report.compute_capability))
    shapes = ", ".join(f"{name} {_shape(shape)}" for name, shape in report.shapes.items())
    engines = [("quantized", report.quantized), *([("float", report.reference)] if report.reference else [])]
    rows = [("p50 ms", "p90", "p95", "p99", "samples/s", "size", "engine")]
    for name, timing in engines:
        p50, p90, p95, p99 = (f"{figure:.3f}" for figure in (timing.p50, timing.p90, timing.p95, timing.p99))
        rows.append((p50, p90, p95, p99, f"{timing.samples_per_second:.0f}", size_text(timing.bytes), name))
    lines = [Text(speed, _TITLE), Text(), *_rows(rows, right=6), Text()]
    lines += [Text(f"on {shapes}; {report.compiler}, compute capability {capability}; without copies to the GPU")]
    compared = [("ONNX Runtime's", report.against_onnxruntime), ("the float model's", report.against_float)]
    for whose, differences in compared:
        if differences:
            title = f"outputs beside {whose}, on {count(report.batches, 'batch')}"
            lines += [Text(), Text(title, _TITLE), *_differences(differences)]
    return lines


def roofline_tables(result: Roofline, unprofitable: Mapping[str, str], layers: bool = False) -> list[Text]:
    """The speed-up at best, then the slowest layers with what bounds them, and those that gain too little."""
    device = result.device
    variants = [variant for variant in Variant if variant is not Variant.PLAN or result.has_plan]
    best = variants[-1] if result.has_plan else Variant.INT8
    dims = ", ".join(f"{name} {size}" for name, size in result.dims.items())
    verdict = f"{best} at most {result.speedup(best):.2f} times as fast as fp16 on {device.description}"
    lines = [Text(verdict + (f" with {dims}" if dims else ""), _TITLE)]
    ridges = ", ".join(f"{device.ridge(fmt):.0f} in {fmt}" for fmt in (Format.FP16, Format.INT8))
    facts = [
        *((str(v), f"{_time(result.seconds(v))} at least, {result.speedup(v):.2f} x") for v in variants),
        ("arithmetic", f"{result.flop / 2e9:.3f} GMAC"),
        ("ridge", f"{ridges} FLOP per byte: below it a layer is bound by memory"),
        ("figures", f"{device.source}{'; ' if device.note else ''}{device.note}"),
        (
            "assumes",
            "the whole peak or bandwidth, fused element-wise operators, free launches: real kernels are slower",
        ),
    ]
    lines += [Text(), *_rows(facts, right=0), *(Text(f"note: {note}") for note in result.notes)]
    ordered = sorted(result.layers, key=lambda layer: -layer.work[Variant.FP16].seconds(device))
    shown = ordered if layers else ordered[:_ROWS]
    rows = [("FLOP/B", "bound", *(f"{variant} us" for variant in variants), "")]
    for layer in shown:
        work = layer.work[Variant.FP16]
        times = (f"{layer.work[variant].seconds(device) * 1e6:.2f}" for variant in variants)
        name = f"{layer.path or layer.node} ({layer.op})"
        rows.append((f"{work.intensity:.1f}", str(work.bound(device)), *times, name))
    rest = ordered[len(shown) :]
    if rest:
        times = (f"{sum(x.work[v].seconds(device) for x in rest) * 1e6:.2f}" for v in variants)
        rows.append(("", "", *times, f"... and {len(rest)} more"))
    for other in result.others:
        times = (f"{other.bytes[variant] / device.bandwidth * 1e6:.2f}" for variant in variants)
        rows.append(("", "memory", *times, f"{other.count} {other.op}"))
    lines += [Text(), Text("layers, slowest first", _TITLE), *_rows(rows, right=2 + len(variants))]
    if unprofitable:
        left = [
            LayerPlan(x.node, x.op, "", x.path, unprofitable[x.node]) for x in result.layers if x.node in unprofitable
        ]
        lines += [Text(), Text("not worth quantizing at these sizes", _TITLE), *_by_reason(left)]
    return lines


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _verdict(outputs: Sequence[Difference]) -> str:
    """The worst that happened to any output, in a few words."""
    if any(_nonfinite(entry) for entry in outputs):
        return "outputs are NaN or infinite where those of the float model are not"
    ratio = min((entry.sqnr_db for entry in outputs if not math.isnan(entry.sqnr_db)), default=math.nan)
    agreement = min((entry.agreement for entry in outputs if not math.isnan(entry.agreement)), default=math.nan)
    parts = []
    if ratio == math.inf:
        parts.append("outputs are the same as in float")
    elif ratio == -math.inf:
        parts.append("an output that is zero in float is not")
    elif not math.isnan(ratio):
        parts.append(f"outputs keep {ratio:.1f} dB (the error is {_percent(10 ** (-ratio / 20))} of the signal)")
    if not math.isnan(agreement):
        parts.append(f"{_percent(agreement)} of integer outputs are equal")
    return ", ".join(parts) or "nothing could be compared"


def _nonfinite(entry: Difference) -> bool:
    return entry.nonfinite > entry.nonfinite_reference


def _differences(entries: Sequence[Difference]) -> list[Text]:
    """One line a value, figures first; for integers the share of equal elements."""
    rows = [("SQNR dB", "cosine", "largest error", "")]
    for entry in entries:
        name = f"{entry.name} ({entry.op})" if entry.op else entry.name
        if math.isnan(entry.agreement):
            rows.append((f"{entry.sqnr_db:.1f}", f"{entry.cosine:.5f}", f"{entry.max_error:.3g}", name))
        else:
            rows.append(("", "", f"{_percent(entry.agreement)} equal", name))
    return _rows(rows, right=3)


def _costs(costs: Sequence[LayerCost]) -> list[Text]:
    rows = [("SQNR dB", ""), *((f"{cost.sqnr_db:.1f}", f"{cost.path or cost.node} ({cost.op})") for cost in costs)]
    title = Text("what the outputs keep when only this layer is quantized", _TITLE)
    return [title, *_rows(rows[: _ROWS + 1], right=1)]


def _left_in_float(plan: QuantPlan) -> list[Text]:
    lines = []
    if plan.float_layers:
        title = f"left in float: {len(plan.float_layers)} of {count(len(plan.layers), 'layer')}"
        lines += [Text(), Text(title, _TITLE), *_by_reason(plan.float_layers)]
    if plan.float_operators:
        counts: dict[str, list[str]] = {}
        for entry in sorted(plan.float_operators, key=lambda entry: -entry.count):
            counts.setdefault(entry.reason, []).append(f"{entry.count} {entry.op}")
        lines += [Text(), Text("other operators, in float", _TITLE)]
        lines += [Text(f"  {', '.join(found)}: {reason}") for reason, found in counts.items()]
    return lines


def _by_reason(layers: Sequence[LayerPlan]) -> list[Text]:
    """Each reason once, with the layers that it keeps in float."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.reason, []).append(f"{layer.path or layer.node} ({layer.op})")
    lines: list[Text] = []
    said = 0
    for reason, names in groups.items():
        if said >= _ROWS:
            return [*lines, Text(f"  ... and {len(layers) - said} more: --save-plan lists them all")]
        if len(names) == 1:
            lines.append(Text(f"  {names[0]}: {reason}"))
        else:
            lines += [Text(f"  {reason}"), *_named(names, _ROWS - said, "    ")]
        said += len(names)
    return lines


def _named(names: Sequence[str], most: int = _ROWS, indent: str = "  ") -> list[Text]:
    lines = [_line(indent + name) for name in names[:most]]
    if len(names) > most:
        lines.append(_line(f"{indent}... and {len(names) - most} more"))
    return lines


def _kernel(layer: EngineLayer) -> tuple[str, ...]:
    def kinds(types: Iterable[ir.DataType]) -> str:
        return " ".join(dict.fromkeys(kind.name.lower() for kind in types)) or "-"

    return kinds(layer.inputs + layer.constants), kinds(layer.outputs), layer.name


def _warnings(warnings: Iterable[str]) -> Iterator[Text]:
    return (Text(f"warning: {warning}", _BAD) for warning in warnings)


def _rows(rows: Sequence[tuple[str, ...]], right: int) -> list[Text]:
    """Columns under one another, the first `right` of them flush right; the last is as long as it likes."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)] if rows else []
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column < right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append(_line("  ".join([*cells, row[-1]]).rstrip()))
    return lines


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ignore")


def _without_lookups(result: Result) -> str:
    if not result.lookup_bytes:
        return ""
    rest = _share(result.quantized_bytes - result.lookup_bytes, result.float_bytes - result.lookup_bytes)
    return f"{rest} without embedding tables, which stay in float"


def _share(after: int, before: int) -> str:
    return f"{size_text(before)} -> {size_text(after)} ({_percent(after / max(before, 1))})"


def size_text(size: int) -> str:
    """A size that keeps two digits or more.

    >>> size_text(999), size_text(59_879), size_text(90_265_600)
    ('999 B', '59.9 kB', '90.3 MB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"


def _percent(share: float) -> str:
    """A percentage that is not rounded to 0 % or 100 % unless it is.

    >>> _percent(0.158), _percent(0.00042), _percent(0.99996), _percent(1.0)
    ('16%', '0.042%', '99.996%', '100%')
    """
    percent = 100 * share
    if 0 < percent < 10:
        return f"{percent:.2g}%"
    if 99 < percent < 100:
        return f"{percent:.{-math.floor(math.log10(100 - percent))}f}%"
    return f"{percent:.0f}%"


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def count(number: int, noun: str) -> str:
    """A number of things.

    >>> count(1, "batch"), count(2, "batch"), count(0, "layer")
    ('1 batch', '2 batches', '0 layers')
    """
    plural = f"{noun}es" if noun.endswith(("ch", "s", "x")) else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"
