"""Findings and repairs as lines of text: alike ones together, names whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.text import Text

from qonnx.linter.findings import Finding, Fix, Repair, Severity
from qonnx.text import TITLE, columns, count, line

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow"}
_REPAIRS = {Repair.NONE: "", Repair.EXACT: " (--fix does)", Repair.APPROXIMATE: " (--fix does, approximately)"}

# How many nodes that one remedy is for are shown.
_ROWS = 3


def findings_lines(findings: Sequence[Finding]) -> list[Text]:
    """Errors first, then warnings, by rule and remedy; of each the first few nodes, and how many more there are."""
    if not findings:
        return [Text("nothing found")]
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    lines = [Text(f"{count(errors, 'error')}, {count(len(findings) - errors, 'warning')}", TITLE)]
    for (severity, *_), alike in groupby(sorted(findings, key=_order), key=_order):
        group = list(alike)
        remedy = f"{group[0].rule}: {group[0].remedy}{_REPAIRS[group[0].repair]}"
        lines += [Text(), Text(remedy, _STYLES[severity])]
        lines += [line(f"  {finding.node}: {finding.message}") for finding in group[:_ROWS]]
        if len(group) > _ROWS:
            lines.append(line(f"  ... and {len(group) - _ROWS} more"))
    return lines


def fixes_lines(fixes: Iterable[Fix]) -> list[Text]:
    """How often each repair was made, and where first."""
    counts: dict[tuple[str, str, bool], list[str]] = {}
    for fix in fixes:
        counts.setdefault((fix.rule, fix.description, fix.exact), []).append(fix.node)
    rows = [("rule", "nodes", "same function", "repair, and where first")]
    for (rule, description, exact), nodes in counts.items():
        rows.append((rule, str(len(nodes)), "yes" if exact else "no: compare", f"{description}: {nodes[0]}"))
    return columns(rows, right=0)


def _order(finding: Finding) -> tuple[Severity, str, int, str, str]:
    # "error" sorts before "warning", E before W.
    return finding.severity, finding.rule[0], int(finding.rule[1:]), finding.remedy, finding.repair
