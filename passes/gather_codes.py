"""Looks rows up in a quantized table before they are dequantized, so that the table is never float as a whole.

    DequantizeLinear(W, scale, zero_point) -> Gather(ids)
    Gather(W, ids), Gather(scale, ids), Gather(zero_point, ids) -> DequantizeLinear

ONNX Runtime runs the first form as it stands: for every batch all of the table. Where all rows share their scales those
are not looked up; scales per row become blocks as long as a row. Codes of 4 and 2 bits, which Gather does not take, are
looked up as the bytes that hold them, and each byte in a table of 256:

    Gather(bytes, ids) -> Cast -> Gather(codes of each byte) -> Reshape

TensorRT wants the first form: there nothing but DequantizeLinear may read quantized weights.

Only when

* the table has two axes and the rows are looked up;
* scales run along no axis, one, or blocks along the second;
* codes are integers of at most 16 bits; those of 4 and 2 bits fill whole bytes in each row;
* the rank of ids is known where the form depends on it, and is not 0 where rows have scales of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.graph import Names, constant, is_initializer, rank
from qonnx.passes.raise_opset import RaiseOpset
from qonnx.passes.writer import Writer, take_over

# What DequantizeLinear needs for scales of the rank of its input.
_BLOCKED_OPSET = 21


@dataclass(frozen=True)
class GatherCodes(ir.passes.InPlacePass):
    """See the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every such Gather of the main graph; raises the opset to 21 if one needs it."""
        tables = [table for node in model.graph if (table := _table(node)) is not None]
        if any(table.per_row for table in tables):
            RaiseOpset(_BLOCKED_OPSET)(model)
            tables = [table for node in model.graph if (table := _table(node)) is not None]
        names = Names(model)
        for table in tables:
            _rewrite(Writer(names, table.gather, "GatherCodes"), table)
        return ir.passes.PassResult(model, bool(tables))


@dataclass(frozen=True, eq=False)
class _Table:
    """A Gather of rows from a DequantizeLinear of an initializer.

    Attributes:
        gather: the lookup.
        codes: the initializer, [rows, columns].
        scale: of the table.
        zero_point: of the table, None for 0.
        per_row: whether rows have scales of their own.
        block_size: elements of a row that share a scale.
    """

    gather: ir.Node
    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    per_row: bool
    block_size: int

    @property
    def columns(self) -> int:
        """The length of a row."""
        assert self.codes.shape is not None
        return int(self.codes.shape.numpy()[1])


def _table(gather: ir.Node) -> _Table | None:
    table = gather.inputs[0] if gather.op_type == "Gather" and gather.domain == "" else None
    node = None if table is None else table.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.domain != "":
        return None
    codes, scale, zero_point = [*node.inputs, None][:3]
    if codes is None or scale is None or not is_initializer(codes) or not is_initializer(scale):
        return None
    if rank(codes) != 2 or gather.attributes.get_int("axis", 0) != 0 or codes.dtype is None:
        return None
    zeros = constant(zero_point)
    if zeros is not None and not zeros.astype(np.int32).any():
        zero_point = None
    axis, block_size = node.attributes.get_int("axis", 1) % 2, node.attributes.get_int("block_size", 0)
    columns = codes.shape.numpy()[1] if codes.shape is not None else 0
    if rank(scale) == 2:
        table_ = _Table(gather, codes, scale, zero_point, True, block_size) if axis == 1 else None
    elif rank(scale) == 1:
        table_ = _Table(gather, codes, scale, zero_point, axis == 0, columns)
    else:
        table_ = _Table(gather, codes, scale, zero_point, False, columns)
    return table_ if table_ is not None and _can_be_looked_up(table_) else None


def _can_be_looked_up(table: _Table) -> bool:
    dtype = table.codes.dtype
    if dtype is None or not dtype.is_integer() or dtype.bitwidth > 16:
        return False
    size = rank(table.gather.inputs[1])
    if table.per_row and not size:  # ONNX Runtime takes one block in one row for no blocks at all
        return False
    return dtype.bitwidth >= 8 or (table.columns * dtype.bitwidth % 8 == 0 and size is not None)


def _rewrite(write: Writer, table: _Table) -> None:
    gather, (ids,) = table.gather, table.gather.inputs[1:]
    result = gather.outputs[0]
    assert table.codes.dtype is not None
    if table.codes.dtype.bitwidth < 8:
        codes = _unpacked(write, table, ids)
    else:
        codes = write.add("Gather", [table.codes, ids], table.codes.dtype, result.shape)
    scale = _parameter(write, table, table.scale, None)
    zero_point = None if table.zero_point is None else _parameter(write, table, table.zero_point, codes.dtype)
    attributes = {"axis": -1} if rank(scale) else {}
    if table.per_row:
        attributes["block_size"] = table.block_size
        scale = write.add("Gather", [scale, ids], scale.dtype)
        zero_point = None if zero_point is None else write.add("Gather", [zero_point, ids], zero_point.dtype)
    take_over(result, write.add("DequantizeLinear", [codes, scale, zero_point], result.dtype, result.shape, attributes))


def _parameter(write: Writer, table: _Table, parameter: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """Scale or zero point: [rows, blocks of a row] if rows have their own, and of this type if one is given."""
    stored = constant(parameter)
    assert stored is not None
    wanted = stored if dtype is None else stored.astype(dtype.numpy())
    if table.per_row and stored.ndim == 1:
        wanted = wanted.reshape(-1, 1)
    if wanted.shape == stored.shape and wanted.dtype == stored.dtype:
        return parameter
    return write.constant(wanted, f"{parameter.name}_of_rows")


def _unpacked(write: Writer, table: _Table, ids: ir.Value | None) -> ir.Value:
    """The looked-up codes in 8 bits."""
    tensor, size = table.codes.const_value, rank(ids)
    assert tensor is not None
    assert size is not None
    rows, columns = tensor.shape.numpy()
    width = columns * tensor.dtype.bitwidth // 8

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.frombuffer(tensor.tobytes(), np.uint8).reshape(rows, width))

    packed = ir.LazyTensor(evaluate, dtype=ir.DataType.UINT8, shape=ir.Shape((rows, width)))
    held = write.constant(codes_of_bytes(tensor.dtype), f"{table.codes.name}_byte")
    found = write.add("Gather", [write.constant(packed, f"{table.codes.name}_bytes"), ids], ir.DataType.UINT8)
    index = write.add("Cast", [found], ir.DataType.INT32, None, {"to": ir.DataType.INT32})
    groups = write.add("Gather", [held, index], held.dtype)
    shape = write.constant(np.array([0] * size + [columns], np.int64), f"{table.codes.name}_shape")
    return write.add("Reshape", [groups, shape], held.dtype, table.gather.outputs[0].shape)


def codes_of_bytes(dtype: ir.DataType) -> npt.NDArray[Any]:
    """The codes of 4 or 2 bits that each byte holds, the lowest bits first, as int8 or uint8.

    >>> codes_of_bytes(ir.DataType.INT4)[0x7F].tolist(), codes_of_bytes(ir.DataType.UINT2)[0b11100100].tolist()
    ([-1, 7], [0, 1, 2, 3])
    """
    bits = int(dtype.bitwidth)
    codes = np.arange(256)[:, None] >> np.arange(0, 8, bits) & (2**bits - 1)
    if dtype.is_signed():
        codes[codes >= 2 ** (bits - 1)] -= 2**bits
    return np.asarray(codes, np.int8 if dtype.is_signed() else np.uint8)
