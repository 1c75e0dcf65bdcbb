"""Makes initializers of weights that the graph computes from constants.

Exporters leave such arithmetic where weights are large: the projections of a cross attention, cut out of one matrix;
weight normalization, `g v / |v|`; the layers of a stack, stored in one tensor; adapters, `W + B A`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.errors import QonnxError
from qonnx.graph import Names, is_float, is_initializer, subgraphs
from qonnx.linear import WEIGHT_PATH_OPS
from qonnx.passes.initializers import store
from qonnx.runtime import session

# Their result is not the same twice, was made to be small in the file, or is quantized already.
_KEPT = frozenset(
    {
        *("Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"),
        "RandomUniformLike",
        *("ConstantOfShape", "Expand", "EyeLike", "Range", "Tile"),
        *("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"),
    }
)


@dataclass(frozen=True)
class FoldWeights(ir.passes.InPlacePass):
    """Stores the floats that the main graph computes from initializers alone, where something else reads them.

    A Transpose, Cast or Identity behind them stays: who asks for a weight looks through these. A stored value is
    computed whenever it is asked for, from weights that stay where they are.

    Left alone: results that take more bytes than what they are made of, or are not finite where that is; outputs of
    the graph; bodies of If, Loop and Scan; operators whose result is random, that repeat or quantize, or that ONNX
    Runtime does not compute.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Folds. The nodes are left to whoever removes what nothing reads."""
        names, constants = Names(model), _constants(model.graph)
        modified = False
        for value in _wanted(constants):
            formula = _Formula(model.graph, value, model.opset_imports)
            tensor = formula.tensor()
            if tensor is not None:
                stored = store(model.graph, names.fresh(f"{next(iter(formula.sources))}_folded"), tensor)
                ir.convenience.replace_all_uses_with(value, stored)
                modified = True
        return ir.passes.PassResult(model, modified)


def _constants(graph: ir.Graph) -> dict[ir.Value, None]:
    """What nodes make of initializers alone, in the order of the graph."""
    found: dict[ir.Value, None] = {}
    for node in graph:
        if node.domain not in ("", "ai.onnx") or node.op_type in _KEPT or any(subgraphs(node)) or not node.inputs:
            continue
        if all(value is None or is_initializer(value) or value in found for value in node.inputs):
            found |= dict.fromkeys(node.outputs)
    return found


def _wanted(constants: dict[ir.Value, None]) -> list[ir.Value]:
    """Those that something else reads, maybe through a Transpose, Cast or Identity, which are none of them."""
    read: set[ir.Value] = set()
    for value in reversed(constants):
        for usage in value.uses():
            maker = usage.node.outputs[0]
            if maker not in constants or (usage.node.op_type in WEIGHT_PATH_OPS and maker in read):
                read.add(value)
    return [
        value
        for value in constants
        if value in read and is_float(value) and not value.is_graph_output() and not _on_path(value)
    ]


def _on_path(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type in WEIGHT_PATH_OPS


class _Formula:
    """How a value comes about, apart from the graph that it is in.

    Attributes:
        sources: the initializers that it is made of, the largest first.
    """

    def __init__(self, graph: ir.Graph, value: ir.Value, versions: Mapping[str, int]) -> None:
        part = ir.convenience.extract(graph, [], [value])
        stored = sorted(part.initializers.values(), key=lambda each: (-_bytes(each), each.name or ""))
        self.sources = {each.name or "": each.const_value for each in stored if each.const_value is not None}
        part.initializers.clear()
        part.opset_imports.update(versions)
        part.inputs.extend(stored)
        for each in stored:
            each.const_value = None
        self._dtype = value.dtype
        self._model = ir.Model(part, ir_version=10)

    def tensor(self) -> ir.LazyTensor | None:
        """Computed whenever it is asked for; None where that fails, or gives what is not to be stored."""
        try:
            result = self._compute()
        except (QonnxError, TypeError):  # ONNX Runtime lacks an operator, or NumPy a type
            return None
        sources = self.sources.values()
        if result.dtype != self._dtype or result.nbytes > sum(tensor.nbytes for tensor in sources):
            return None
        if not np.isfinite(result.numpy()).all() and all(_is_finite(tensor.numpy()) for tensor in sources):
            return None
        return ir.LazyTensor(self._compute, dtype=result.dtype, shape=result.shape)

    def _compute(self) -> ir.Tensor[Any]:
        feeds: dict[str, Any] = {name: tensor.numpy() for name, tensor in self.sources.items()}
        (result,) = session(self._model).run(feeds).values()
        return ir.Tensor(np.asarray(result))


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes


def _is_finite(array: npt.NDArray[Any]) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())
