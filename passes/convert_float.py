"""Lets the float part of a graph, quantized or not, compute in float16 or bfloat16.

A strongly typed compiler runs every operator in the types that the graph gives it, so what is not quantized must be
written in short floats. Every float32 value of the main graph becomes short, those between Q/DQ nodes included, except
what `qonnx.short_floats` says is better left alone. Where the two meet stands a Cast, one for a value. Inputs and
outputs of the graph keep their types.

A scale is rounded to the short type. For an activation that makes another grid, as good as the first. For a weight with
stored codes it is an error where it moves a code by half a step or more, as scales below the normal numbers of float16
do; there the codes are computed again for the rounded scale.

A finite number beyond the range of the short type stands for infinity: it becomes half the largest number, which can
be added to any score. Were it infinite, a row that is masked throughout would become NaN.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from qonnx.graph import Names, constant, is_initializer, subgraphs
from qonnx.passes.infer_shapes import InferShapes
from qonnx.passes.raise_opset import RaiseOpset, opset
from qonnx.short_floats import QDQ, Keep, Limits, fixed_inputs, float_constant, kept, varying_outputs

# bfloat16 is a type of convolutions and pools from this opset on; both are a type of scales from 19 on.
_BFLOAT16_OPSET, _SCALE_OPSET = 22, 19

_BOUNDS = frozenset({"Clip", "Max", "Min"})


@dataclass(frozen=True)
class ConvertFloat(ir.passes.InPlacePass):
    """See the module docstring. Functions must be inlined before.

    Attributes:
        dtype: FLOAT16 or BFLOAT16.
    """

    dtype: ir.DataType = ir.DataType.FLOAT16

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph.

        Raises:
            ModelError: the graph cannot be raised to an opset that has the type, or its types cannot be inferred.
        """
        brain = self.dtype == ir.DataType.BFLOAT16
        raised = RaiseOpset(_BFLOAT16_OPSET if brain else _SCALE_OPSET)(model).modified
        raised |= bool(LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model).modified)
        InferShapes()(model)
        return ir.passes.PassResult(model, _Conversion(model, self.dtype).run() or raised)


class _Conversion:
    """One run over one graph."""

    def __init__(self, model: ir.Model, dtype: ir.DataType) -> None:
        self.graph, self.dtype, self.names = model.graph, dtype, Names(model)
        self.version, self.limits = opset(model), Limits.of(dtype)
        # A value in its other type.
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        # Values that were float32 and no longer are.
        self.short: set[ir.Value] = set()

    def run(self) -> bool:
        reasons = kept(self.graph, self.version, self.dtype)
        for node in list(self.graph):
            if node.op_type == "Cast":
                continue  # reads any type, and writes the one it says
            if node in reasons:
                self._keep(node, reasons[node])
            elif node.op_type in QDQ:
                self._shorten_quantizer(node)
            else:
                self._shorten(node)
        self._restore_outputs(self.graph)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del self.graph.initializers[name]
        return bool(self.casts or self.short)

    def _keep(self, node: ir.Node, reason: Keep) -> None:
        for index, value in enumerate(node.inputs):
            if value in self.short:
                self._read(node, index, ir.DataType.FLOAT)
            elif reason is Keep.INTEGRAL and self._stands_for_infinity(value):
                assert value is not None
                node.replace_input_with(index, self._constant(value, ir.DataType.FLOAT, node.op_type))
        for body in subgraphs(node):
            for inner in body:
                self._keep(inner, Keep.OTHER)
            self._restore_outputs(body)

    def _shorten(self, node: ir.Node) -> None:
        fixed, varying = fixed_inputs(node, self.version), varying_outputs(node, self.version, self.dtype)
        for index, value in enumerate(node.inputs):
            if value is not None and (value.dtype == ir.DataType.FLOAT or value in self.short):
                self._read(node, index, ir.DataType.FLOAT if index in fixed else self.dtype)
        self._mark(varying)

    def _shorten_quantizer(self, node: ir.Node) -> None:
        scale = node.inputs[1]
        if float_constant(scale) is not None and scale is not None:
            self._shorten_scale(node, scale)
        elif scale is not None:
            self._read(node, 1, self.dtype)
        if node.op_type == "QuantizeLinear":
            self._read(node, 0, self.dtype)
        else:
            self._mark(node.outputs)

    def _shorten_scale(self, node: ir.Node, scale: ir.Value) -> None:
        """Rounds the scale, and computes the codes of a weight again where that moves them."""
        exact = float_constant(scale)
        assert exact is not None
        rounded = np.maximum(exact.astype(self.dtype.numpy()), self.limits.smallest.astype(self.dtype.numpy()))
        if (scale, self.dtype) not in self.casts:
            self.casts[scale, self.dtype] = self._register(scale, ir.Tensor(rounded, dtype=self.dtype))
        node.replace_input_with(1, self.casts[scale, self.dtype])
        codes, ratio = node.inputs[0], exact / rounded.astype(np.float32)
        if node.op_type == "DequantizeLinear" and codes is not None and is_initializer(codes):
            assert codes.const_value is not None
            blocked = node.attributes.get_int("block_size", 0) > 0
            if not blocked and (np.abs(ratio - 1) * float(codes.const_value.dtype.max) >= 0.5).any():
                node.replace_input_with(0, self._register(codes, self._moved(node, codes.const_value, ratio)))

    def _moved(self, node: ir.Node, codes: ir.TensorProtocol, ratio: npt.NDArray[np.float32]) -> ir.TensorProtocol:
        array = codes.numpy()
        shape = [1] * array.ndim
        if ratio.size > 1:
            shape[node.attributes.get_int("axis", 1)] = ratio.size
        zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        offset = np.zeros(1, np.float32) if zero is None else zero.astype(np.float32).reshape(-1)
        offset = offset.reshape(shape) if offset.size > 1 else offset
        moved = np.rint((array.astype(np.float32) - offset) * ratio.reshape(shape if ratio.size > 1 else [])) + offset
        return ir.Tensor(
            np.clip(moved, float(codes.dtype.min), float(codes.dtype.max)).astype(array.dtype), codes.dtype
        )

    def _stands_for_infinity(self, value: ir.Value | None) -> bool:
        array = float_constant(value)
        return array is not None and bool((np.abs(array[np.isfinite(array)]) > self.limits.largest).any())

    def _mark(self, values: Iterable[ir.Value]) -> None:
        for value in values:
            value.type = ir.TensorType(self.dtype)  # a clone shares the type object with its original
            self.short.add(value)

    def _read(self, node: ir.Node, index: int, dtype: ir.DataType) -> None:
        """Makes the node read an input in a type."""
        value = node.inputs[index]
        if value is None or value.dtype == dtype:
            return
        if float_constant(value) is not None:
            node.replace_input_with(index, self._constant(value, dtype, node.op_type))
            return
        if (value, dtype) not in self.casts:
            self.casts[value, dtype] = self._cast(value, dtype)
        node.replace_input_with(index, self.casts[value, dtype])

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        name = self.names.fresh(f"{value.name}_{dtype.name.lower()}")
        node = ir.node(
            "Cast",
            [value],
            {"to": int(dtype)},
            name=self.names.fresh(f"{name}_Cast"),
            outputs=[
                ir.Value(
                    name=name, type=ir.TensorType(dtype), shape=None if value.shape is None else value.shape.copy()
                )
            ],
            metadata_props={"qonnx.pass": "ConvertFloat"},
        )
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)
        return node.outputs[0]

    def _constant(self, value: ir.Value, dtype: ir.DataType, op: str) -> ir.Value:
        """A constant in another type, finite where it was finite."""
        limit = self.limits.largest if op in _BOUNDS else self.limits.largest / 2
        key = (value, dtype) if not self._stands_for_infinity(value) else None
        if key in self.casts and key is not None:
            return self.casts[key]
        tensor = value.const_value
        assert tensor is not None

        def evaluate() -> ir.TensorProtocol:
            array = tensor.numpy()
            beyond = np.isfinite(array) & (np.abs(array) > self.limits.largest)
            return ir.Tensor(np.where(beyond, np.sign(array) * limit, array).astype(dtype.numpy()), dtype=dtype)

        made = self._register(value, ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(tensor.shape.numpy())))
        if key is not None:
            self.casts[key] = made
        return made

    def _register(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        made = ir.Value(
            name=self.names.fresh(f"{value.name}_{tensor.dtype.name.lower()}"),
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self.graph.register_initializer(made)
        return made

    def _restore_outputs(self, graph: ir.Graph) -> None:
        """Gives outputs their type back, and those of the main graph their name."""
        for index, value in enumerate(graph.outputs):
            if value not in self.short:
                continue
            cast = self._cast(value, ir.DataType.FLOAT)
            if graph is self.graph:
                name = value.name
                value.name, cast.name = self.names.fresh(f"{name}_{self.dtype.name.lower()}"), name
            graph.outputs[index] = cast
