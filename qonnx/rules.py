"""What a recipe says about each node: its defaults, changed by every rule that matches, the later ones last."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec
import onnx_ir as ir

from qonnx.calibrators import Calibrator
from qonnx.graph import module_path
from qonnx.numerics import Dtype
from qonnx.recipe import Match, Recipe, WeightChange, Weights, changed
from qonnx.roles import Role, roles_of

# The fields of a match that hold patterns, and what a person calls them.
_PATTERNS = {"op": "operator", "path": "module path", "name": "node", "value": "value"}


@dataclass(frozen=True)
class Settings:
    """How one node is quantized.

    Attributes:
        weights: its weights.
        reason: why it stays in float, or "".
        activation: the type of its activations where a rule names one.
        calibrator: of its activations where a rule names one.
        table: whether a rule says how a table is stored that the node looks rows up in.
    """

    weights: Weights
    reason: str = ""
    activation: Dtype | None = None
    calibrator: Calibrator | None = None
    table: bool = False


def settings_of(graph: ir.Graph, recipe: Recipe, leave: Mapping[str, str] | None = None) -> dict[str, Settings]:
    """The settings of every node of the main graph, by name.

    Args:
        graph: in the form that `qonnx.passes.prepare` makes: every node has a name of its own.
        recipe: the defaults and the rules.
        leave: node names of layers to leave in float, each with the reason, whatever the rules say.
    """
    roles = roles_of(graph) if any(rule.match.role is not msgspec.UNSET for rule in recipe.rules) else {}
    return {node.name or "": _settings(node, recipe, roles, leave or {}) for node in graph}


def _settings(
    node: ir.Node, recipe: Recipe, roles: Mapping[str, frozenset[Role]], leave: Mapping[str, str]
) -> Settings:
    weights, reason = recipe.weights, ""
    activation: Dtype | None = None
    calibrator: Calibrator | None = None
    table = False
    for number, rule in enumerate(recipe.rules, start=1):
        if not _matches(rule.match, node, roles):
            continue
        if rule.skip is not msgspec.UNSET:
            reason = f"rule {number} of the recipe" if rule.skip else ""
        weights = changed(weights, rule.weights)
        # A rule for everything in a module does not mean its tables.
        table |= rule.weights != WeightChange() and (rule.match.role is Role.EMBEDDING or rule.match.op == "Gather")
        if rule.activations.dtype is not msgspec.UNSET:
            activation = rule.activations.dtype
        if rule.activations.calibrator is not msgspec.UNSET:
            calibrator = rule.activations.calibrator
    return Settings(weights, leave.get(node.name or "") or reason, activation, calibrator, table)


def unmatched(graph: ir.Graph, recipe: Recipe) -> tuple[str, ...]:
    """What to say about rules that match no node, with the names that are nearest."""
    if not recipe.rules:
        return ()
    roles = roles_of(graph)
    nodes = list(graph)
    lost = [
        (number, rule.match)
        for number, rule in enumerate(recipe.rules, start=1)
        if not rule.optional and not any(_matches(rule.match, node, roles) for node in nodes)
    ]
    return tuple(f"rule {number} matches nothing: {_why(match, nodes, roles)}" for number, match in lost)


def _matches(match: Match, node: ir.Node, roles: Mapping[str, frozenset[Role]]) -> bool:
    if match.role is not msgspec.UNSET and match.role not in roles.get(node.name or "", ()):
        return False
    return all(
        (pattern := getattr(match, field)) == "*"
        or any(fnmatch.fnmatchcase(text, pattern) for text in _texts(node, field))
        for field in _PATTERNS
    )


def _texts(node: ir.Node, field: str) -> Iterator[str]:
    """What the pattern of a field is compared with."""
    match field:
        case "op":
            yield node.op_type
        case "path":
            yield module_path(node)
        case "name":
            yield node.name or ""
        case "value":
            yield from (value.name for value in (*node.inputs, *node.outputs) if value is not None and value.name)


def _why(match: Match, nodes: list[ir.Node], roles: Mapping[str, frozenset[Role]]) -> str:
    if match.role is not msgspec.UNSET and not any(match.role in found for found in roles.values()):
        present = sorted({role for found in roles.values() for role in found})
        return f"no layer has the role {match.role}; there are {', '.join(present) or 'none'}"
    for field, noun in _PATTERNS.items():
        pattern = getattr(match, field)
        known = sorted({text for node in nodes for text in _texts(node, field) if text})
        if pattern != "*" and not any(fnmatch.fnmatchcase(text, pattern) for text in known):
            nearest = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3)
            return f"no {noun} is called {pattern!r}" + (f"; nearest: {', '.join(nearest)}" if nearest else "")
    return "no single node has all that it asks for"
