"""What became of an engine, how fast it is, and how fast it could be, as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from qonnx.devices import Format
from qonnx.plan import LayerPlan
from qonnx.roofline import Variant
from qonnx.text import (
    BAD,
    GOOD,
    MOST,
    TITLE,
    by_reason,
    columns,
    count,
    differences,
    shape_text,
    size_text,
    warning_lines,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from qonnx.engine import EngineLayer, EngineReport
    from qonnx.engine.bench import BenchReport
    from qonnx.engine.inspection import NodeInspection
    from qonnx.roofline import Roofline


def engine_tables(report: EngineReport, layers: bool = False) -> list[Text]:
    """The engine, and how it runs each matrix product and convolution of the model: those first that miss the plan.

    Args:
        report: what was built.
        layers: whether to list all of them, and every kernel.
    """
    in_float = [node for node in report.nodes if not node.int8]
    lost = [node for node in in_float if node.planned]
    share = f"{len(report.nodes) - len(in_float)} of {len(report.nodes)} convolutions and matrix products run on INT8"
    lines = [Text(f"{report.plan}: {share}", BAD if lost or len(in_float) == len(report.nodes) else GOOD)]
    for node in lost:
        reason = node.reason or "the compiler gives no reason"
        lines += warning_lines([f"{node.node} ({node.op}) is quantized, and runs in float: {reason}"])
    lines += warning_lines(report.warnings)
    capability = ".".join(str(part) for part in report.compute_capability)
    facts = [
        ("size", size_text(report.bytes)),
        ("made for", f"compute capability {capability}"),
        ("made by", f"{report.compiler} in {report.seconds:.1f} s"),
        *(("shapes", f"{name} {' '.join(map(shape_text, shapes))}") for name, shapes in report.profiles.items()),
    ]
    lines += [Text(), *columns(facts, right=0), *_node_rows(report.nodes, layers)]
    left = [LayerPlan(node.node, node.op, "", node.path, node.reason) for node in in_float if not node.planned]
    if any(layer.reason for layer in left):
        lines += [Text(), Text("left in float", TITLE), *by_reason([layer for layer in left if layer.reason])]
    if layers:
        rows = [("reads", "writes", "kernel"), *map(_kernel, report.layers)]
        lines += [Text(), Text("kernels in order of execution", TITLE), *columns(rows, right=0)]
    return lines


def _node_rows(nodes: Sequence[NodeInspection], everything: bool) -> list[Text]:
    """One line a node: those that miss the plan, then those in float, then the others."""
    if not nodes:
        return []
    ordered = sorted(nodes, key=lambda node: (node.int8, not node.planned))
    shown = ordered if everything else ordered[:MOST]
    rows = [("reads", "writes", "copies", "layer -> engine layer")]
    for node in shown:
        fused = f", fused with {', '.join(node.fused)}" if node.fused else ""
        name = f"{node.node} ({node.op}) -> {node.layer or 'none: folded away'}{fused}"
        rows.append((" ".join(node.reads), " ".join(node.writes), str(len(node.copies)), name))
    lines = [Text(), Text("layers, those in float first", TITLE), *columns(rows, right=0)]
    rest = len(ordered) - len(shown)
    return [*lines, Text(f"... and {rest} more: --layers lists them all")] if rest else lines


def bench_tables(report: BenchReport) -> list[Text]:
    """How fast the engine is, beside the float model, and how close its outputs are."""
    speed = f"{report.quantized.p50:.3f} ms a batch"
    if report.speedup is not None:
        speed += f", {report.speedup:.2f} times as fast as the float model in {report.quantized.float_type}"
    capability = ".".join(map(str, report.compute_capability))
    shapes = ", ".join(f"{name} {shape_text(shape)}" for name, shape in report.shapes.items())
    engines = [("quantized", report.quantized), *([("float", report.reference)] if report.reference else [])]
    rows = [("p50 ms", "p90", "p95", "p99", "samples/s", "size", "engine")]
    for name, timing in engines:
        p50, p90, p95, p99 = (f"{figure:.3f}" for figure in (timing.p50, timing.p90, timing.p95, timing.p99))
        rows.append((p50, p90, p95, p99, f"{timing.samples_per_second:.0f}", size_text(timing.bytes), name))
    lines = [Text(speed, TITLE), Text(), *columns(rows, right=6), Text()]
    lines += [Text(f"on {shapes}; {report.compiler}, compute capability {capability}; without copies to the GPU")]
    compared = [("ONNX Runtime's", report.against_onnxruntime), ("the float model's", report.against_float)]
    for whose, entries in compared:
        if entries:
            title = f"outputs beside {whose}, on {count(report.batches, 'batch')}"
            lines += [Text(), Text(title, TITLE), *differences(entries)]
    return lines


def roofline_tables(result: Roofline, unprofitable: Mapping[str, str], layers: bool = False) -> list[Text]:
    """The speed-up at best, then the slowest layers with what bounds them, and those that gain too little."""
    device = result.device
    variants = [variant for variant in Variant if variant is not Variant.PLAN or result.has_plan]
    best = variants[-1] if result.has_plan else Variant.INT8
    dims = ", ".join(f"{name} {size}" for name, size in result.dims.items())
    verdict = f"{best} at most {result.speedup(best):.2f} times as fast as fp16 on {device.description}"
    lines = [Text(verdict + (f" with {dims}" if dims else ""), TITLE)]
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
    lines += [Text(), *columns(facts, right=0, sentences=True), *(Text(f"note: {note}") for note in result.notes)]
    ordered = sorted(result.layers, key=lambda layer: -layer.work[Variant.FP16].seconds(device))
    shown = ordered if layers else ordered[:MOST]
    rows = [("FLOP/B", "bound", *(f"{variant} us" for variant in variants), "")]
    for layer in shown:
        work = layer.work[Variant.FP16]
        times = (_microseconds(layer.work[variant].seconds(device)) for variant in variants)
        name = f"{layer.path or layer.node} ({layer.op})"
        rows.append((f"{work.intensity:.1f}", str(work.bound(device)), *times, name))
    rest = ordered[len(shown) :]
    if rest:
        times = (_microseconds(sum(x.work[v].seconds(device) for x in rest)) for v in variants)
        rows.append(("", "", *times, f"... and {len(rest)} more"))
    for other in result.others:
        times = (_microseconds(other.bytes[variant] / device.bandwidth) for variant in variants)
        rows.append(("", "memory", *times, f"{other.count} {other.op}"))
    lines += [Text(), Text("layers, slowest first", TITLE), *columns(rows, right=2 + len(variants))]
    if unprofitable:
        left = [
            LayerPlan(x.node, x.op, "", x.path, unprofitable[x.node]) for x in result.layers if x.node in unprofitable
        ]
        lines += [Text(), Text("not worth quantizing at these sizes", TITLE), *by_reason(left)]
    return lines


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{_microseconds(seconds)} us"


def _microseconds(seconds: float) -> str:
    """With two digits after the point, and at least two digits that are not 0.

    >>> _microseconds(12.3456e-6), _microseconds(0.00312e-6), _microseconds(0)
    ('12.35', '0.0031', '0.00')
    """
    figure = seconds * 1e6
    return f"{figure:.2f}" if figure >= 0.1 or not figure else f"{figure:.2g}"


def _kernel(layer: EngineLayer) -> tuple[str, ...]:
    def kinds(types: Iterable[ir.DataType]) -> str:
        return " ".join(dict.fromkeys(kind.name.lower() for kind in types)) or "-"

    return kinds(layer.inputs + layer.constants), kinds(layer.outputs), layer.name
