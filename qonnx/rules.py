"""What a recipe says about each node: its defaults, changed by every rule that matches, the later ones last."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from qonnx.graph import module_path
from qonnx.recipe import Recipe, Rule, Weights


@dataclass(frozen=True)
class Settings:
    """How one node is quantized.

    Attributes:
        weights: its weights.
        reason: why it stays in float, or "".
    """

    weights: Weights
    reason: str = ""


def settings_of(graph: ir.Graph, recipe: Recipe, leave: Mapping[str, str] | None = None) -> dict[str, Settings]:
    """The settings of every node of the main graph, by name.

    Args:
        graph: in the form that `qonnx.passes.prepare` makes: every node has a name of its own.
        recipe: the defaults and the rules.
        leave: node names of layers to leave in float, each with the reason, whatever the rules say.
    """
    found = {}
    for node in graph:
        reason = ""
        for number, rule in enumerate(recipe.rules, start=1):
            if _matches(rule, node):
                reason = f"rule {number} of the recipe" if rule.skip else ""
        name = node.name or ""
        found[name] = Settings(recipe.weights, (leave or {}).get(name) or reason)
    return found


def _matches(rule: Rule, node: ir.Node) -> bool:
    match = rule.match
    return (
        fnmatch.fnmatchcase(node.op_type, match.op)
        and fnmatch.fnmatchcase(module_path(node), match.path)
        and fnmatch.fnmatchcase(node.name or "", match.name)
    )
