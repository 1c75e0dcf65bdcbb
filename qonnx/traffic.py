"""Which tensors of a graph go through memory, and which stay inside a kernel.

A compiler makes few kernels of many nodes. What is assumed of it here is the least traffic that one can hope for from
TensorRT on common graphs:

* Every matrix product and convolution is a kernel.
* An operator that works element by element runs in the kernel that made one of its inputs, as long as none of its other
  inputs waits for that kernel; only those others are read from memory. It prefers the kernel of a product.
* Operators that only move data (Reshape, Transpose, Concat, Slice, Gather ...) are part of how their result is read.
* Scores and probabilities inside attention, between the product of queries by keys and the product of probabilities by
  values, never leave the chip.
* Everything else (normalisation, Softmax elsewhere, pooling, recurrences) is a kernel of its own.

A kernel reads each of its operands once, and writes each result that another kernel reads, or the caller. Only
floating-point tensors count: indices, masks and shapes are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from qonnx.graph import is_float
from qonnx.linear import Linear, linear_of
from qonnx.placement import Edge
from qonnx.sizes import elements

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Attention"})

_OPERATORS = {
    "moves": """
        Cast CastLike Concat DepthToSpace Dropout Expand Flatten Gather GatherElements GatherND Identity Pad Reshape
        Slice SpaceToDepth Split Squeeze Tile Transpose Unsqueeze""",
    "element by element": """
        Abs Add And BatchNormalization Ceil Celu Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual
        HardSigmoid HardSwish IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu
        Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Swish Tanh
        ThresholdedRelu Where Xor""",
    "describes": "Constant ConstantOfShape EyeLike Range Shape Size",
}
_MOVES = frozenset(_OPERATORS["moves"].split())
_ELEMENTWISE = frozenset(_OPERATORS["element by element"].split())
_DESCRIBES = frozenset(_OPERATORS["describes"].split())


@dataclass(frozen=True)
class Read:
    """One operand that a kernel reads.

    Attributes:
        node: the node that reads it: the kernel's own, or one that is fused into it.
        index: the input of that node.
        values: what is stored: the operand itself, or what it was moved from.
        elements: how many elements are read.
    """

    node: ir.Node
    index: int
    values: tuple[ir.Value, ...]
    elements: int

    @property
    def edge(self) -> Edge:
        """The same edge as plans name it."""
        return Edge(self.node.name or "", self.index)


@dataclass(eq=False)
class Kernel:
    """A node, and what it reads and writes together with the operators fused into it.

    Attributes:
        node: the node that gives the kernel its name.
        linear: its constant weight, which is not among the reads; None without one.
        reads: operands from memory.
        writes: results that go to memory.
        returned: those of them that the caller gets.
        unknown: names of values whose sizes depend on data and are not counted.
        ancestors: the kernels that must be done first, and itself, as a set of bits.
    """

    node: ir.Node
    linear: Linear | None = None
    reads: list[Read] = field(default_factory=list)
    writes: list[ir.Value] = field(default_factory=list)
    returned: list[ir.Value] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    ancestors: int = 0

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product or convolution."""
        return self.node.op_type in PRODUCTS and self.node.domain in ("", "ai.onnx")


def kernels(graph: ir.Graph) -> list[Kernel]:
    """The kernels of a graph with known shapes, in graph order. Subgraphs are not entered."""
    traffic = _Traffic()
    for node in graph:
        if node.outputs and not (node.domain in ("", "ai.onnx") and node.op_type in _MOVES | _DESCRIBES):
            traffic.add(node)
    traffic.write(graph.outputs)
    _keep_scores_on_chip(traffic)
    return traffic.kernels


def moves_before(node: ir.Node, index: int) -> Iterator[Edge]:
    """An edge, and those before it between which the operand is only moved: rounding it at any of them is the same."""
    reader: ir.Node | None = node
    while reader is not None:
        yield Edge(reader.name or "", index)
        value = reader.inputs[index]
        reader, index = None if value is None else value.producer(), 0
        if reader is not None and (reader.op_type not in _MOVES - {"Concat"} or reader.domain not in ("", "ai.onnx")):
            return


class _Traffic:
    """Assigns every computed value to the kernel that makes it."""

    def __init__(self) -> None:
        self.kernels: list[Kernel] = []
        self._owner: dict[ir.Value, int] = {}
        self._stored: dict[ir.Value, tuple[ir.Value, ...]] = {}

    def add(self, node: ir.Node) -> None:
        operands = [(index, value) for index, value in enumerate(node.inputs) if value is not None]
        host = self._host(node, [value for _, value in operands])
        if host is None:
            host = len(self.kernels)
            self.kernels.append(
                Kernel(node, linear_of(node) if node.op_type in PRODUCTS else None, ancestors=1 << host)
            )
        kernel = self.kernels[host]
        for index, value in operands:
            if kernel.node is not node or kernel.linear is None or index != kernel.linear.weight_index:
                self._read(host, node, index, value)
        for value in node.outputs:
            self._owner[value] = host

    def write(self, outputs: Iterable[ir.Value]) -> None:
        """Adds to the writes of each kernel what others read, and what the caller gets."""
        written: dict[ir.Value, None] = {}
        for kernel in self.kernels:
            written.update(dict.fromkeys(value for read in kernel.reads for value in read.values))
        returned = {value for output in outputs for value in self.stored(output)}
        written.update(dict.fromkeys(returned))
        for value in written:
            if value in self._owner and is_float(value):
                kernel = self.kernels[self._owner[value]]
                kernel.writes.append(value)
                if value in returned:
                    kernel.returned.append(value)
                if elements(value) is None:
                    kernel.unknown.append(value.name or "")

    def stored(self, value: ir.Value) -> tuple[ir.Value, ...]:
        """The values that lie in memory for this one: itself, or what it is a rearrangement of."""
        if value not in self._stored:
            producer = value.producer()
            if producer is None or producer.op_type not in _MOVES or producer.domain not in ("", "ai.onnx"):
                self._stored[value] = (value,)
            else:
                sources = producer.inputs if producer.op_type == "Concat" else producer.inputs[:1]
                found = [part for source in sources if source is not None for part in self.stored(source)]
                self._stored[value] = tuple(dict.fromkeys(found))
        return self._stored[value]

    def owner(self, value: ir.Value) -> Kernel | None:
        """The kernel that makes a value, None for inputs and constants."""
        return self.kernels[self._owner[value]] if value in self._owner else None

    def _host(self, node: ir.Node, operands: list[ir.Value]) -> int | None:
        """The kernel that an operator is fused into, or None when it is one of its own."""
        if node.op_type not in _ELEMENTWISE or node.domain not in ("", "ai.onnx"):
            return None
        owners = [[self._owner[part] for part in self.stored(value) if part in self._owner] for value in operands]
        size = elements(node.outputs[0])
        candidates = [
            (self.kernels[host].is_product, index, host)
            for index, hosts in enumerate(owners)
            for host in hosts
            if elements(operands[index]) == size and not self._waits(host, owners)
        ]
        return max(candidates)[2] if candidates else None

    def _waits(self, host: int, owners: list[list[int]]) -> bool:
        """Whether another operand can only be computed after the kernel `host` is done."""
        return any(other != host and self.kernels[other].ancestors >> host & 1 for hosts in owners for other in hosts)

    def _read(self, host: int, node: ir.Node, index: int, value: ir.Value) -> None:
        kernel = self.kernels[host]
        values = tuple(part for part in self.stored(value) if self._owner.get(part) != host)
        for part in values:
            if part in self._owner:
                kernel.ancestors |= self.kernels[self._owner[part]].ancestors
        values = tuple(part for part in values if is_float(part))
        sizes = [elements(part) for part in values]
        if values and (None in sizes or elements(value) is None):
            kernel.unknown.append(value.name or "")
        elif values:
            count = min(elements(value) or 0, sum(size or 0 for size in sizes))
            kernel.reads.append(Read(node, index, values, count))


def _keep_scores_on_chip(traffic: _Traffic) -> None:
    for softmax in traffic.kernels:
        if softmax.node.op_type != "Softmax" or softmax.returned:
            continue
        makers = {traffic.owner(value) for read in softmax.reads for value in read.values}
        scores = next(iter(makers)) if len(makers) == 1 else None
        made = set(softmax.writes)
        readers = [kernel for kernel in traffic.kernels if any(made & set(read.values) for read in kernel.reads)]
        if scores is None or not all(_is_product_of_two(kernel) for kernel in (scores, *readers)) or not readers:
            continue
        consumed = {value for read in softmax.reads for value in read.values}
        others = [kernel for kernel in traffic.kernels if kernel is not softmax]
        if consumed & set(scores.returned) or any(consumed & set(read.values) for k in others for read in k.reads):
            continue
        scores.writes = [value for value in scores.writes if value not in consumed]
        softmax.reads, softmax.writes = [], []
        for reader in readers:
            reader.reads = [read for read in reader.reads if not made & set(read.values)]


def _is_product_of_two(kernel: Kernel) -> bool:
    return kernel.node.op_type == "MatMul" and kernel.linear is None
