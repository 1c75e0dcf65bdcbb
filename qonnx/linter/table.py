"""Findings and repairs for a terminal: alike ones in one row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.table import Table
from rich.text import Text

from qonnx.linter.findings import Finding, Fix, Repair, Severity

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow"}
_REPAIRS = {Repair.NONE: "", Repair.EXACT: "yes", Repair.APPROXIMATE: "yes, approximately"}

# How many nodes of one rule are shown.
_ROWS = 3


def findings_table(findings: Sequence[Finding]) -> Table | Text:
    """Errors first, then warnings, by rule; of each rule the first few nodes, and how many more there are."""
    if not findings:
        return Text("nothing found")
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    table = _table(f"{errors} errors, {len(findings) - errors} warnings", "rule", "node", "what is wrong", "what to do")
    table.add_column("--fix")
    for _, alike in groupby(sorted(findings, key=_order), key=_order):
        group = list(alike)
        for finding in group[:_ROWS]:
            rule = Text(finding.rule, style=_STYLES[finding.severity])
            table.add_row(rule, finding.node, finding.message, finding.remedy, _REPAIRS[finding.repair])
        if len(group) > _ROWS:
            table.add_row(group[0].rule, f"... and {len(group) - _ROWS} more")
    return table


def fixes_table(fixes: Iterable[Fix]) -> Table:
    """How often each repair was made, and where first."""
    table = _table("repairs", "rule", "nodes", "first", "what was done", "same function")
    counts: dict[tuple[str, str, bool], list[str]] = {}
    for fix in fixes:
        counts.setdefault((fix.rule, fix.description, fix.exact), []).append(fix.node)
    for (rule, description, exact), nodes in counts.items():
        table.add_row(rule, str(len(nodes)), nodes[0], description, "yes" if exact else "no: compare")
    return table


def _order(finding: Finding) -> tuple[Severity, str, int]:
    # "error" sorts before "warning", E before W.
    return finding.severity, finding.rule[0], int(finding.rule[1:])


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
