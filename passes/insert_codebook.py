"""Writes weights as indices into a short list of values: grids of up to 16 values that need no kernel of their own.

    DequantizeLinear(float4 codes of W, scale)   ->   Gather(values, Cast(indices of W)) * scale

The indices are uint4, the values float. One scale for the tensor goes into the values; scales along an axis are a Mul;
blocks are a Reshape, a Mul and a Reshape back. What is saved is storage: the weight is float again when it is used, and
ONNX Runtime computes all of this once, when it loads the graph.

ONNX Runtime knows the type float4e2m1 but has no kernel for it: in this form it runs, with the same values.

Sources: OCP Microscaling Formats 1.0, 2023 (float4e2m1); Han et al., Deep Compression, 2016 (arXiv 1510.00149),
section 3 (shared values).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import onnx_ir as ir

from qonnx.errors import TargetError
from qonnx.graph import Names, constant, is_initializer, rank
from qonnx.numerics import Blocked, Dtype, scale_shape
from qonnx.passes.allow_types import AllowTypes, need_onnxruntime
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.passes.writer import Writer, take_over
from qonnx.plan import QuantPlan, TensorPlan

FLOAT4E2M1 = tuple(np.arange(16, dtype=np.uint8).view(Dtype.FLOAT4E2M1.numpy).astype(np.float32).tolist())
"""The values of the codes 0 to 15.

>>> FLOAT4E2M1
(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""


@dataclass(frozen=True)
class InsertCodebook(ir.passes.InPlacePass):
    """Writes the float4e2m1 weights of a plan like that, and all other tensors as InsertQDQ does."""

    plan: QuantPlan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inserts the nodes.

        Raises:
            RecipeError: the plan names a node, value or edge that the graph does not have.
            TargetError: an activation is float4e2m1, the blocks of a weight do not divide its axis, or the target does
                not take uint4.
        """
        need_onnxruntime(self.plan, "uint4 weights")
        for tensor in self.plan.activations:
            if tensor.dtype is Dtype.FLOAT4E2M1:
                raise TargetError(f"activation {tensor.value!r}: only weights can be looked up in a codebook; use int4")
        for tensor in self.plan.weights:
            _check_blocks(tensor, model)
        weights = tuple(_indexed(tensor) for tensor in self.plan.weights)
        AllowTypes(msgspec.structs.replace(self.plan, weights=weights))(model)
        modified = InsertQDQ(self.plan)(model).modified
        names = Names(model)
        for node in list(model.graph):
            codes = node.inputs[0] if node.op_type == "DequantizeLinear" and node.domain == "" else None
            if codes is not None and codes.dtype == ir.DataType.FLOAT4E2M1 and is_initializer(codes):
                _rewrite(Writer(names, node, "InsertCodebook"), codes)
        return ir.passes.PassResult(model, modified)


def _check_blocks(tensor: TensorPlan, model: ir.Model) -> None:
    weight = model.graph.initializers.get(tensor.value)
    if tensor.dtype is not Dtype.FLOAT4E2M1 or not isinstance(tensor.granularity, Blocked) or weight is None:
        return
    axis, size = tensor.granularity.axis, tensor.granularity.block_size
    length = weight.shape.numpy()[axis] if weight.shape is not None else 0
    if length % size:
        raise TargetError(
            f"weight {tensor.value!r}: blocks of {size} leave a short one in an axis of {length}; use a block_size "
            "that divides it, or one scale per channel"
        )


def _indexed(tensor: TensorPlan) -> TensorPlan:
    """What is in the file in the end: uint4, and no DequantizeLinear with blocks."""
    return msgspec.structs.replace(tensor, dtype=Dtype.UINT4) if tensor.dtype is Dtype.FLOAT4E2M1 else tensor


def _rewrite(write: Writer, codes: ir.Value) -> None:
    node, tensor = write.node, codes.const_value
    scale, result = node.inputs[1], node.outputs[0]
    assert tensor is not None
    assert scale is not None

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().view(np.uint8).astype(Dtype.UINT4.numpy), dtype=ir.DataType.UINT4)

    shape = ir.Shape(tensor.shape.numpy())
    indices = write.constant(ir.LazyTensor(evaluate, dtype=ir.DataType.UINT4, shape=shape), f"{codes.name}_indices")
    axis, block_size = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    take_over(result, look_up(write, indices, FLOAT4E2M1, scale, axis, block_size))


def look_up(
    write: Writer, indices: ir.Value, values: Sequence[float], scale: ir.Value, axis: int, block_size: int
) -> ir.Value:
    """The nodes that compute `values[indices] * scale`.

    Args:
        write: where the nodes go.
        indices: uint4, of a known shape.
        values: at most 16.
        scale: a scalar, one per index of `axis`, or one per block.
        axis: along which scales run.
        block_size: neighbours along `axis` that share a scale, all blocks whole; 0 for one scale per index.
    """
    shape = tuple(indices.shape.numpy()) if indices.shape is not None else ()
    dtype, stem = scale.dtype or ir.DataType.FLOAT, indices.name
    grid, single = np.array(values, np.float32), constant(scale) if not rank(scale) else None
    if single is not None:
        grid = grid * single.astype(np.float32)
    book = write.constant(ir.Tensor(grid.astype(dtype.numpy()), dtype=dtype), f"{stem}_values")
    index = write.add("Cast", [indices], ir.DataType.INT32, indices.shape, {"to": ir.DataType.INT32})
    found = write.add("Gather", [book, index], dtype, indices.shape)
    if single is not None:
        return found
    axis %= len(shape)
    if not block_size:
        column = (-1, *[1] * (len(shape) - axis - 1))
        return write.add("Mul", [found, _reshaped(write, scale, column)], dtype, indices.shape)
    split = (*shape[:axis], -1, block_size, *shape[axis + 1 :])
    per_block = scale_shape(shape, Blocked(axis, block_size))
    column = (*per_block[: axis + 1], 1, *per_block[axis + 1 :])
    scaled = write.add("Mul", [_reshaped(write, found, split), _reshaped(write, scale, column)], dtype)
    return _reshaped(write, scaled, shape)


def _reshaped(write: Writer, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    tensor = value.const_value
    if tensor is not None and is_initializer(value):
        return write.constant(ir.Tensor(tensor.numpy().reshape(shape), dtype=tensor.dtype), f"{value.name}_reshaped")
    target = write.constant(np.array(shape, np.int64), f"{value.name}_shape")
    return write.add("Reshape", [value, target], value.dtype, None)
