"""Evaluates what depends on constants alone, and removes what nothing reads.

onnxscript's folder does the work: constant expressions, shapes that are known, If with a known condition, Identity,
Dropout. Only small results are stored: a large weight behind a Transpose or Cast stays where it is, to be read when it
is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass

from qonnx.errors import ModelError
from qonnx.graph import all_graphs, first_line

# A graph that is not finished by then oscillates, which no graph was seen to do.
_ROUNDS = 20


@dataclass(frozen=True)
class FoldConstants(ir.passes.InPlacePass):
    """Lifts Constant nodes to initializers, and folds until nothing changes; see the module docstring.

    Needs inferred shapes to be right: a Shape of a known shape is folded.

    Attributes:
        input_elements: an operator with a larger constant input is left alone.
        output_elements: so is one with a larger result, unless it is smaller than what it replaces.
    """

    input_elements: int = 8192
    output_elements: int = 65536

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Folds.

        Raises:
            ModelError: the folder failed at some node. What was folded before is right.
        """
        lift = LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
        modified = lift(model).modified
        for _ in range(_ROUNDS):
            changed = self._fold(model)
            changed |= RemoveUnusedNodesPass()(model).modified
            changed |= lift(model).modified
            if not changed:
                break
            modified = True
        return ir.passes.PassResult(model, modified)

    def _fold(self, model: ir.Model) -> bool:
        from onnxscript.optimizer import fold_constants_ir

        omitted = _omitted_outputs(model)
        try:
            result = fold_constants_ir(
                model,
                onnx_shape_inference=True,
                input_size_limit=self.input_elements,
                output_size_limit=self.output_elements,
                should_fold=self._should_fold,
            )
        except Exception as error:  # of whatever operator was evaluated
            raise ModelError(f"constants cannot be folded: {first_line(error)}") from error
        finally:
            # The folder names every output. One that has a name is computed, and some kernels refuse to.
            for value in omitted:
                if not value.uses() and not value.is_graph_output():
                    value.name = ""
        return result.modified

    def _should_fold(self, node: ir.Node) -> bool | None:
        """False to leave a node alone, True to fold it, None for the folder's own judgement."""
        if len(node.outputs) > 1:
            return False  # the folder cannot, and says so on standard error
        if node.op_type == "ConstantOfShape":
            return True
        if node.op_type == "Transpose":
            tensor = node.inputs[0].const_value if node.inputs and node.inputs[0] is not None else None
            return None if tensor is None or tensor.size <= self.input_elements else False
        return None


def _omitted_outputs(model: ir.Model) -> list[ir.Value]:
    return [value for graph in all_graphs(model) for node in graph for value in node.outputs if not value.name]
