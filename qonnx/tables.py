"""Results as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qonnx.comparison import Comparison, Difference
    from qonnx.engine import EngineReport
    from qonnx.pipeline import Result
    from qonnx.sensitivity import LayerCost

# How many layers a table names before it only counts the rest.
_ROWS = 12


def result_tables(result: Result) -> list[RenderableType]:
    """What was quantized, what it costs, and what to look out for."""
    plan = result.plan
    table = _table(f"quantized for {plan.target} with recipe {plan.recipe}", "", "")
    table.add_row("file", result.output)
    table.add_row("layers on integers", f"{len(plan.quantized_layers)} of {len(plan.layers)}")
    table.add_row("weights", _sizes(result))
    for output in result.comparison.outputs:
        table.add_row(f"output {output.name}", _quality(output))
    judged = f"{result.held_out} held-back batches" if result.held_out else "the calibration batch"
    table.add_row("judged on", judged)
    table.add_row("time", ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items()))
    parts: list[RenderableType] = [table]
    if plan.float_layers:
        left = _table("layers left in float", "layer", "operator", "reason")
        reasons = [(layer.path or layer.node, layer.op, layer.reason) for layer in plan.float_layers]
        parts.append(_filled(left, reasons))
    if result.costs and result.warnings:
        parts.append(_costs(result.costs))
    return [*parts, *(Text(f"warning: {warning}", style="bold yellow") for warning in result.warnings)]


def comparison_tables(comparison: Comparison) -> list[RenderableType]:
    """Every output, and every layer where layers were compared."""
    parts = [_differences(f"outputs over {comparison.batches} batches", comparison.outputs)]
    if comparison.layers:
        parts.append(_differences("layers in network order", comparison.layers))
    texts = [
        Text(f"warning: {entry.name}: {entry.nonfinite} values are not finite", style="bold yellow")
        for entry in (*comparison.outputs, *comparison.layers)
        if entry.nonfinite > entry.nonfinite_reference
    ]
    if comparison.unmatched_layers:
        texts.append(Text(f"{len(comparison.unmatched_layers)} layers have no counterpart of the same name"))
    return [*parts, *texts]


def engine_tables(report: EngineReport) -> list[RenderableType]:
    """The engine, and which of its layers compute on what."""
    capability = ".".join(str(part) for part in report.compute_capability)
    table = _table(f"engine for compute capability {capability}", "", "")
    table.add_row("file", f"{report.plan} ({report.bytes / 1e6:.1f} MB)")
    table.add_row("compiler", report.compiler)
    table.add_row("time", f"{report.seconds:.1f} s")
    layers = _table("engine layers", "layer", "inputs", "outputs")
    rows = [
        (layer.name, " ".join(kind.name for kind in layer.inputs), " ".join(kind.name for kind in layer.outputs))
        for layer in report.layers
    ]
    texts = [Text(f"warning: {warning}", style="bold yellow") for warning in report.warnings]
    return [table, _filled(layers, rows, most=60), *texts]


def _sizes(result: Result) -> str:
    share = result.quantized_bytes / max(result.float_bytes, 1)
    text = f"{result.float_bytes / 1e6:.1f} MB -> {result.quantized_bytes / 1e6:.1f} MB ({share:.0%})"
    if result.lookup_bytes:
        rest = result.float_bytes - result.lookup_bytes
        without = (result.quantized_bytes - result.lookup_bytes) / max(rest, 1)
        text += f"; without {result.lookup_bytes / 1e6:.1f} MB of embedding tables, which stay in float: {without:.0%}"
    return text


def _quality(output: Difference) -> str:
    if not math.isnan(output.agreement):
        return f"{output.agreement:.2%} equal"
    return f"SQNR {output.sqnr_db:.1f} dB, cosine {output.cosine:.5f}, largest error {output.max_error:.3g}"


def _differences(title: str, differences: Iterable[Difference]) -> Table:
    table = _table(title, "value", "operator", "SQNR dB", "cosine", "largest error")
    for entry in differences:
        if math.isnan(entry.agreement):
            figures = (f"{entry.sqnr_db:.1f}", f"{entry.cosine:.5f}", f"{entry.max_error:.3g}")
        else:
            figures = ("", "", f"{entry.agreement:.2%} equal")
        table.add_row(entry.name, entry.op, *figures)
    return table


def _costs(costs: Sequence[LayerCost]) -> Table:
    table = _table(
        "what single layers cost: the output when only this one is quantized", "layer", "operator", "SQNR dB"
    )
    return _filled(table, [(cost.path or cost.node, cost.op, f"{cost.sqnr_db:.1f}") for cost in costs])


def _filled(table: Table, rows: Sequence[tuple[str, ...]], most: int = _ROWS) -> Table:
    for row in rows[:most]:
        table.add_row(*row)
    if len(rows) > most:
        table.add_row(f"... and {len(rows) - most} more")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
