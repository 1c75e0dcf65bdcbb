"""An inspection as lines of text: what the file is, then its layers, alike ones together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.text import Text

from qonnx.inspector.inspect import Inspection, LayerView, Port
from qonnx.text import TITLE, columns, count, line, shape_text, size_text

# How many operators, and how many layers that are alike, are named before the rest is only counted.
_NAMED = 12
_NODES = 3

# Longer texts are cut.
_LONG = 80


def inspection_tables(found: Inspection, each: bool = False) -> list[Text]:
    """What the file is, what it holds, and how its layers are quantized.

    Args:
        found: what to show.
        each: a row for every layer, instead of one for all that are alike.
    """
    lines = columns(list(_header(found)), right=0)
    quantized = sum(layer.quantized for layer in found.layers)
    if found.layers:
        title = f"{quantized} of {count(len(found.layers), 'layer')} {'is' if quantized == 1 else 'are'} quantized"
        lines += [Text(), Text(title, TITLE), *(_every(found.layers) if each else _alike(found.layers))]
    lines += [Text(f"note: {note}") for note in found.notes[:_NODES]]
    if len(found.notes) > _NODES:
        lines.append(Text(f"and {count(len(found.notes) - _NODES, 'more note')} of this kind: --json has all"))
    return lines


def _header(found: Inspection) -> Iterator[tuple[str, str]]:
    opsets = ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())
    yield "opsets", f"{opsets}; file format {found.ir_version}" + (f"; by {found.producer}" if found.producer else "")
    for title, ports in (("inputs", found.inputs), ("outputs", found.outputs)):
        yield title, ", ".join(map(_port, ports))
    types = ", ".join(f"{name} {size_text(size)}" for name, size in found.bytes_by_type.items())
    yield "weights", f"{found.parameters:,} elements, {size_text(found.bytes)}" + (f": {types}" if types else "")
    operators = [f"{number} {name}" for name, number in found.operators.items()]
    more = f" and {len(operators) - _NAMED} more" if len(operators) > _NAMED else ""
    yield "operators", f"{', '.join(operators[:_NAMED])}{more}"
    for key, value in found.metadata.items():
        if key.startswith("qonnx."):
            shown = found.recipe if key == "qonnx.recipe" else value
            yield key.removeprefix("qonnx.").replace("_", " "), shown[:_LONG] + (" ..." if len(shown) > _LONG else "")


def _port(port: Port) -> str:
    sizes = "unknown shape" if port.shape is None else f"[{', '.join(str(each or '?') for each in port.shape)}]"
    return f"{port.name} {port.dtype}{'' if port.shape is None else ' '}{sizes}"


def _alike(layers: Iterable[LayerView]) -> Iterator[Text]:
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for layer in layers:
        groups.setdefault((layer.op, layer.weights, layer.activations, layer.reason), []).append(layer.node)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    rows = [("", "", "weights", "activations", "")]
    rows += [(str(len(names)), op, stored, others, why) for (op, stored, others, why), names in ordered]
    table = columns(rows, right=1)
    yield table[0]
    for row, (_, names) in zip(table[1:], ordered, strict=True):
        yield row
        yield from (line(f"    {name}") for name in names[:_NODES])
        if len(names) > _NODES:
            yield line(f"    ... and {len(names) - _NODES} more: --layers lists them all")


def _every(layers: Iterable[LayerView]) -> list[Text]:
    rows = [("", "weight", "weights", "activations", "")]
    for layer in layers:
        name = f"{layer.node}: {layer.reason}" if layer.reason else layer.node
        rows.append((layer.op, shape_text(layer.weight), layer.weights, layer.activations, name))
    return columns(rows, right=0)
