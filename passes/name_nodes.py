"""A unique name for every node, so that plans, rules and reports can point at one.

    "conv1"  the first of its name   ->  kept byte for byte
    "conv1"  a later one             ->  conv1_1, conv1_2 ...
    ""       an operator Conv        ->  Conv_0, Conv_1 ...

Nodes of subgraphs and functions count too; those of the main graph come first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir

from qonnx.graph import all_graphs


@dataclass(frozen=True)
class NameNodes(ir.passes.InPlacePass):
    """See the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Names the nodes."""
        taken: set[str] = set()
        pending = []
        for graph in sorted(all_graphs(model), key=lambda graph: graph is not model.graph):
            for node in graph:
                if node.name and node.name not in taken:
                    taken.add(node.name)
                else:
                    pending.append(node)
        counts: Counter[str] = Counter()
        for node in pending:
            stem = node.name or node.op_type
            counts[stem] += 1 if node.name else 0
            while f"{stem}_{counts[stem]}" in taken:
                counts[stem] += 1
            node.name = f"{stem}_{counts[stem]}"
            taken.add(node.name)
        return ir.passes.PassResult(model, bool(pending))
