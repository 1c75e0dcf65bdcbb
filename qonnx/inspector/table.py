"""An inspection for a terminal: alike layers in one row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.table import Table
from rich.text import Text

from qonnx.inspector.inspect import Inspection, LayerView, Port
from qonnx.text import size_text

# How many operators and nodes are named before the rest is only counted.
_NAMED = 12
_NODES = 3

# Longer texts are cut.
_LONG = 80


def inspection_tables(found: Inspection, each: bool = False) -> list[Table | Text]:
    """What the file is, what it holds, and how its layers are quantized.

    Args:
        found: what to show.
        each: a row for every layer, instead of one for all that are alike.
    """
    parts: list[Table | Text] = [Text(line) for line in _header(found)]
    quantized = [layer for layer in found.layers if layer.quantized]
    parts.append(Text(f"\n{len(quantized)} of {len(found.layers)} layers are quantized" if found.layers else ""))
    if found.layers:
        parts.append(_every(found.layers) if each else _alike(found.layers))
    parts += [Text(f"note: {note}") for note in found.notes[:_NODES]]
    if len(found.notes) > _NODES:
        parts.append(Text(f"and {len(found.notes) - _NODES} more notes of this kind: --json has all"))
    return parts


def _header(found: Inspection) -> Iterator[str]:
    opsets = ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())
    yield f"opsets      {opsets}; file format {found.ir_version}" + (f"; by {found.producer}" if found.producer else "")
    for title, ports in (("inputs", found.inputs), ("outputs", found.outputs)):
        yield f"{title:<11} {', '.join(map(_port, ports))}"
    types = ", ".join(f"{name} {size_text(count)}" for name, count in found.bytes_by_type.items())
    yield f"weights     {found.parameters:,} elements, {size_text(found.bytes)}" + (f": {types}" if types else "")
    operators = [f"{count} {name}" for name, count in found.operators.items()]
    more = f" and {len(operators) - _NAMED} more" if len(operators) > _NAMED else ""
    yield f"operators   {', '.join(operators[:_NAMED])}{more}"
    for key, value in found.metadata.items():
        if key.startswith("qonnx."):
            title = key.removeprefix("qonnx.").replace("_", " ")
            yield f"{title:<11} {value if len(value) < _LONG else value[:_LONG] + ' ...'}"


def _port(port: Port) -> str:
    sizes = "unknown shape" if port.shape is None else f"[{', '.join(str(each or '?') for each in port.shape)}]"
    return f"{port.name} {port.dtype}{'' if port.shape is None else ' '}{sizes}"


def _alike(layers: Iterable[LayerView]) -> Table:
    groups: dict[tuple[str, str, str, str], list[LayerView]] = {}
    for layer in layers:
        groups.setdefault((layer.op, layer.weights, layer.activations, layer.reason), []).append(layer)
    table = _table("layers", "operator", "weights", "activations", "nodes", "why not")
    for (op, weights, activations, reason), alike in sorted(groups.items(), key=lambda item: -len(item[1])):
        names = [layer.node for layer in alike[:_NODES]] + (["..."] if len(alike) > _NODES else [])
        table.add_row(str(len(alike)), op, weights, activations, "\n".join(names), reason)
    return table


def _every(layers: Iterable[LayerView]) -> Table:
    table = _table("node", "operator", "weight", "weights", "activations", "why not")
    for layer in layers:
        shape = " x ".join(map(str, layer.weight))
        table.add_row(layer.node, layer.op, shape, layer.weights, layer.activations, layer.reason)
    return table


def _table(*columns: str) -> Table:
    table = Table(header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
