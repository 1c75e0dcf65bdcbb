"""What is in a graph, and what a recipe says: lint, inspect, recipes, view."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qonnx.cli.shared import TargetName, show, suggest
from qonnx.errors import DependencyError, OutputError


def lint(
    model: Annotated[Path, typer.Argument(metavar="QUANTIZED.onnx", help="A quantized graph of any tool.")],
    target: TargetName = "a800",
    fix: Annotated[bool, typer.Option("--fix", help="Repair what can be repaired, and write it to --output.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="With --fix: only repairs that change no result.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where --fix writes the repaired model.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print findings and repairs as JSON.")] = False,
) -> None:
    """Find what TensorRT refuses or runs in float.

    Exit code 1 when errors are left.
    """
    import msgspec
    from rich.text import Text

    from qonnx import linter
    from qonnx.engine.calibrate import holds_qdq
    from qonnx.graph import load, save
    from qonnx.linter.table import findings_lines, fixes_lines

    if fix != (output is not None):
        raise OutputError("--fix and --output belong together: qonnx lint MODEL.onnx --fix -o FIXED.onnx")
    loaded = load(model)
    fixed = linter.fix(loaded, target=target, exact_only=exact) if fix else None
    findings = linter.lint(loaded, target=target) if fixed is None else fixed.findings
    if fixed is not None and output is not None:
        save(fixed.model, output)
    if json:
        report = {"findings": findings, "fixes": () if fixed is None else fixed.fixes}
        typer.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        if fixed is not None and fixed.fixes:
            show([*fixes_lines(fixed.fixes), Text()])
        show(findings_lines(findings))
        if not findings and not holds_qdq(loaded):
            show([Text("the graph is not quantized")])
            suggest("quantize", model, "--data", "FOLDER")
    if any(finding.severity is linter.Severity.ERROR for finding in findings):
        raise typer.Exit(1)


def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="A float or quantized graph of any tool.")],
    target: TargetName = "a800",
    layers: Annotated[bool, typer.Option("--layers", help="Show each layer in a row of its own.")] = False,
    plan: Annotated[
        Path | None, typer.Option("--save-plan", metavar="PLAN.json", help="Write the plan that the Q/DQ nodes follow.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a graph holds, and how each layer is quantized."""
    from qonnx import inspector
    from qonnx.graph import load
    from qonnx.inspector.table import inspection_tables

    loaded = load(model)
    found = inspector.inspect(loaded, target=target)
    if plan is not None:
        inspector.read_back(loaded, target=target).plan.save(plan)
    if json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    show(inspection_tables(found, layers))


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Only this one.", show_default=False)] = None,
) -> None:
    """Show the built-in recipes as YAML, to start your own from.

    For example `qonnx recipes int8 > mine.yaml`, then `qonnx quantize --recipe mine.yaml`.
    """
    from qonnx.recipe import RECIPES, load_recipe, to_yaml

    chosen = RECIPES if name is None else (load_recipe(name),)
    typer.echo("---\n".join(to_yaml(recipe) for recipe in chosen), nl=False)


def view(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="Any ONNX model.", show_default=False)],
) -> None:
    """Show a graph in the browser, with Netron."""
    from qonnx.graph import load

    load(model)
    try:
        import netron
    except ImportError as error:
        raise DependencyError("viewing needs Netron: pip install 'qonnx-pipeline[view]'") from error
    netron.start(str(model))
    netron.wait()
