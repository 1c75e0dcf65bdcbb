"""How fast a graph can run at best, in FP16, INT8 and INT4, from its arithmetic and its memory traffic.

Each kernel takes the longer of two times: its operations at the device's peak, or its bytes at the device's bandwidth
(see `qonnx.work`). What counts as one kernel, and which tensors it reads and writes, is said in `qonnx.traffic`. Floats
are taken as FP16 throughout, whatever the type of the model: that is what an engine is compared with.

These are bounds, not forecasts. They assume that a kernel reaches the whole peak or the whole bandwidth, that the two
overlap perfectly, that caches keep nothing from one kernel to the next, and that launching a kernel takes no time. Real
kernels stay well below, more so in INT8 than in FP16, and small ones are bound by their launch. What the bounds are
good for is the order of things: which layers can gain from fewer bits, and by how much at most.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
import onnx_ir as ir

from qonnx.devices import Device, Format
from qonnx.devices import device as device_named
from qonnx.errors import ModelError, RecipeError
from qonnx.graph import all_graphs, load, module_path
from qonnx.linear import CONVOLUTIONS
from qonnx.numerics import Blocked, Dtype
from qonnx.placement import Edge
from qonnx.plan import QuantPlan
from qonnx.sizes import at_sizes, elements, resolve_dims
from qonnx.targets import INT4_WEIGHTS_FROM
from qonnx.traffic import Kernel, kernels, moves_before
from qonnx.work import FLOAT_BITS, Bound, Work, block_count, packed_bytes

_QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})


class Variant(enum.StrEnum):
    """A way to run a whole graph.

    * FP16: everything.
    * INT8: every product and convolution with weights and activations in INT8, and the tensors between them.
    * INT4: the constant weights of Gemm and MatMul in INT4 with one scale for `BLOCK_SIZE`, everything else in FP16.
    * PLAN: what a plan says, each layer with its types.
    """

    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"
    PLAN = "plan"


class LayerRoof(msgspec.Struct, frozen=True):
    """A matrix product, convolution or attention operator, with what is fused into it.

    Attributes:
        node: its node name.
        op: its operator.
        path: the path of the module that made it, or "".
        work: what it has to do in each variant; without a plan there is no PLAN.
    """

    node: str
    op: str
    path: str
    work: dict[Variant, Work]


class OtherOperators(msgspec.Struct, frozen=True):
    """All kernels of one operator that is not a product: their arithmetic is neglected.

    Attributes:
        op: the operator.
        count: how many there are.
        bytes: their traffic in each variant, all together.
    """

    op: str
    count: int
    bytes: dict[Variant, int]


class Roofline(msgspec.Struct, frozen=True):
    """The least time that a graph takes on a device.

    Attributes:
        device: the device.
        dims: sizes of dynamic dimensions.
        layers: the products, in graph order.
        others: the other kernels that move data.
        notes: what is not counted.
    """

    device: Device
    dims: dict[str, int]
    layers: tuple[LayerRoof, ...]
    others: tuple[OtherOperators, ...]
    notes: tuple[str, ...] = ()

    @property
    def flop(self) -> int:
        """Operations of all products; twice the multiply-accumulates."""
        return sum(layer.work[Variant.FP16].flop for layer in self.layers)

    @property
    def has_plan(self) -> bool:
        """Whether a plan was given."""
        return any(Variant.PLAN in layer.work for layer in self.layers)

    def seconds(self, variant: Variant) -> float:
        """The least time of one run: kernel after kernel, nothing between them."""
        products = sum(layer.work[variant].seconds(self.device) for layer in self.layers)
        return products + sum(other.bytes[variant] for other in self.others) / self.device.bandwidth

    def speedup(self, variant: Variant) -> float:
        """How much faster than FP16, if every kernel meets its roof; 1 for an empty graph."""
        seconds = self.seconds(variant)
        return self.seconds(Variant.FP16) / seconds if seconds else 1.0


def roofline(
    model: str | os.PathLike[str] | ir.Model,
    device: str | os.PathLike[str] | Device,
    *,
    dims: Mapping[str, int] | None = None,
    plan: str | os.PathLike[str] | QuantPlan | None = None,
) -> Roofline:
    """The least time of a float model on a device, layer by layer. See the module docstring for what is assumed.

    Args:
        model: path of a float ONNX model, or a model that `qonnx.passes.prepare` has prepared (it is not changed).
        device: a `Device`, its name or a YAML file, see `qonnx.devices.device`.
        dims: sizes of dynamic dimensions by name, see `qonnx.sizes.at_sizes`.
        plan: a plan for this model, or its file, to predict what it gains.

    Raises:
        ModelError: the model cannot be read, is quantized already, or its shapes cannot be inferred.
        DataError: a dynamic dimension has no size.
        TargetError: the device is unknown, or lacks a type of the plan.
        RecipeError: the plan cannot be read or is for another model.
    """
    gpu = device if isinstance(device, Device) else device_named(device)
    prepared = model if isinstance(model, ir.Model) else _prepared(model)
    _check_float(prepared)
    chosen = QuantPlan.load(plan) if isinstance(plan, str | os.PathLike) else plan
    if chosen is not None:
        _check_plan(chosen, prepared)
    sizes = resolve_dims(prepared, dims)
    sized = at_sizes(prepared, sizes)
    found = kernels(sized.graph)
    flop = {kernel: _flop(kernel) for kernel in found if kernel.is_product}
    counted = [kernel for kernel in found if not kernel.is_product or flop[kernel] is not None]
    types = {Variant.FP16: _Types(), Variant.INT8: _int8(counted), Variant.INT4: _int4(counted)}
    if chosen is not None:
        types[Variant.PLAN] = _planned(chosen, counted)
    works = {variant: _works(counted, flop, types[variant]) for variant in types}
    layers = tuple(
        LayerRoof(
            node=kernel.node.name or "",
            op=kernel.node.op_type,
            path=module_path(kernel.node),
            work={variant: works[variant][kernel] for variant in works},
        )
        for kernel in flop
        if flop[kernel] is not None
    )
    for fmt in {work.format for layer in layers for work in layer.work.values()}:
        gpu.peak(fmt)  # raises where the device lacks what the plan wants
    return Roofline(gpu, sizes, layers, _others(counted, works), tuple(_notes(sized, gpu, found, flop)))


def unprofitable(roofline: Roofline, threshold: float = 0.05) -> dict[str, str]:
    """The layers that INT8 makes faster by less than a share of their time, each with the reason.

    What launching a kernel costs is not in it, so that layers too small to matter may pass. The result is what
    `qonnx.plan.make_plan` and `qonnx.placement.place` take as `leave`.

    Args:
        roofline: at the sizes that the model will run at.
        threshold: the smallest share of the time in FP16 that INT8 must save.
    """
    reasons = {}
    for layer in roofline.layers:
        float_work, work = layer.work[Variant.FP16], layer.work[Variant.INT8]
        before, after = float_work.seconds(roofline.device), work.seconds(roofline.device)
        if after > before * (1 - threshold):
            bound = "arithmetic" if work.bound(roofline.device) is Bound.COMPUTE else "memory"
            gain = "saves nothing" if after >= before else f"saves {1 - after / before:.1%} of its time"
            reasons[layer.node] = f"int8 {gain} on {roofline.device.name}: bound by {bound} at these sizes"
    return reasons


@dataclass(frozen=True)
class _Types:
    """What is read in fewer bits than FP16.

    Attributes:
        activations: the type of an operand.
        weights: the bits of a kernel's constant weight, and the number of its blocks.
    """

    activations: Mapping[Edge, Dtype] = field(default_factory=dict)
    weights: Mapping[Kernel, tuple[int, int]] = field(default_factory=dict)

    def bits(self, edge: Edge) -> int:
        return self.activations[edge].bits if edge in self.activations else FLOAT_BITS

    def format(self, kernel: Kernel) -> Format:
        dtypes = {self.activations.get(edge) for edge in _operands(kernel)}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        if dtype is None or (kernel.linear is not None and kernel not in self.weights):
            return Format.FP16
        return Format.INT8 if dtype.is_integer else Format.FP8


def _operands(kernel: Kernel) -> tuple[Edge, ...]:
    """The inputs of a product that are multiplied and are not its constant weight."""
    indices = (kernel.linear.data_index,) if kernel.linear is not None else (0, 1)
    return tuple(Edge(kernel.node.name or "", index) for index in indices)


def _int8(found: Iterable[Kernel]) -> _Types:
    activations: dict[Edge, Dtype] = {}
    weights = {}
    for kernel in found:
        linear = kernel.linear
        if kernel.is_product and kernel.node.op_type != "Attention":
            activations |= dict.fromkeys(_operands(kernel), Dtype.INT8)
            if linear is not None:
                weights[kernel] = (8, 0)
        # What lies between convolutions stays on integers: pooling, and what a fused Add adds to their result.
        skips = kernel.node.op_type in CONVOLUTIONS
        for read in kernel.reads:
            computed = not any(value.is_initializer() for value in read.values)
            if kernel.node.op_type == "MaxPool" or (skips and computed and read.edge.node != kernel.node.name):
                activations[read.edge] = Dtype.INT8
    return _Types(activations, weights)


def _int4(found: Iterable[Kernel]) -> _Types:
    weights = {}
    for kernel in found:
        if kernel.linear is not None and kernel.node.op_type in ("Gemm", "MatMul"):
            weight = elements(kernel.linear.weight) or 0
            weights[kernel] = (4, block_count(weight, kernel.linear.output_channels))
    return _Types(weights=weights)


def _planned(plan: QuantPlan, found: Iterable[Kernel]) -> _Types:
    dtypes = {edge: tensor.dtype for tensor in plan.activations for edge in tensor.edges}
    planned = {edge: tensor for tensor in plan.weights for edge in tensor.edges}
    activations: dict[Edge, Dtype] = {}
    weights = {}
    for kernel in found:
        operands = [(kernel.node, edge.input) for edge in _operands(kernel)] if kernel.is_product else []
        for node, index in (*operands, *((read.node, read.index) for read in kernel.reads)):
            dtype = next((dtypes[edge] for edge in moves_before(node, index) if edge in dtypes), None)
            if dtype is not None:
                activations[Edge(node.name or "", index)] = dtype
        if kernel.linear is not None:
            reader, position = kernel.linear.weight_reader
            tensor = planned.get(Edge(reader.name or "", position))
            if tensor is not None:
                blocks = len(tensor.scale) if isinstance(tensor.granularity, Blocked) else 0
                weights[kernel] = (tensor.dtype.bits, blocks)
    return _Types(activations, weights)


def _works(found: Iterable[Kernel], flop: Mapping[Kernel, int | None], types: _Types) -> dict[Kernel, Work]:
    found = list(found)
    written: dict[ir.Value, set[int]] = {}
    for kernel in found:
        for read in kernel.reads:
            for value in read.values:
                written.setdefault(value, set()).add(types.bits(read.edge))
        for value in kernel.returned:
            written.setdefault(value, set()).add(FLOAT_BITS)
    converted: set[ir.Value] = set()
    works = {}
    for kernel in found:
        # What two operands of a kernel share, such as the input that a residual Add adds again, is read once.
        sizes: dict[tuple[tuple[ir.Value, ...], int], int] = {}
        for read in kernel.reads:
            key = (read.values, types.bits(read.edge))
            sizes[key] = max(read.elements, sizes.get(key, 0))
        inputs = sum(packed_bytes(count, bits) for (_, bits), count in sizes.items())
        for read in kernel.reads:
            # A graph input is turned into integers by a kernel of its own, which the first reader pays for.
            for value in read.values if types.bits(read.edge) < FLOAT_BITS else ():
                if value.is_graph_input() and value not in converted:
                    converted.add(value)
                    inputs += packed_bytes(elements(value) or 0, FLOAT_BITS + types.bits(read.edge))
        weight_bits, blocks = types.weights.get(kernel, (FLOAT_BITS, 0))
        works[kernel] = Work(
            flop=flop.get(kernel) or 0,
            inputs=inputs,
            weights=0 if kernel.linear is None else packed_bytes(elements(kernel.linear.weight) or 0, weight_bits),
            scales=packed_bytes(blocks, FLOAT_BITS),
            outputs=sum(
                packed_bytes(elements(value) or 0, bits) for value in kernel.writes for bits in written.get(value, ())
            ),
            format=types.format(kernel) if kernel.is_product else Format.FP16,
        )
    return works


def _others(found: Iterable[Kernel], works: Mapping[Variant, Mapping[Kernel, Work]]) -> tuple[OtherOperators, ...]:
    groups: dict[str, list[Kernel]] = {}
    for kernel in found:
        if not kernel.is_product and works[Variant.FP16][kernel].bytes:
            groups.setdefault(kernel.node.op_type, []).append(kernel)
    return tuple(
        OtherOperators(
            op, len(group), {variant: sum(work[kernel].bytes for kernel in group) for variant, work in works.items()}
        )
        for op, group in groups.items()
    )


def _flop(kernel: Kernel) -> int | None:
    """Two operations per multiply-accumulate, None where a size is not known. Masks of attention save nothing."""
    node = kernel.node
    inputs, output = node.inputs, node.outputs[0]
    if node.op_type == "Attention":
        past = _along(inputs[4], -2) if len(inputs) > 4 and inputs[4] is not None else 0
        keys = _along(inputs[1], -2)
        factors = (elements(inputs[0]), elements(output))
        if past is None or keys is None or None in factors:
            return None
        return 2 * sum(factor or 0 for factor in factors) * (keys + past)
    if node.op_type in CONVOLUTIONS:
        weight, outer = inputs[1], output if node.op_type == "Conv" else inputs[0]
        positions, filters, first = elements(outer), elements(weight), _along(weight, 0)
        if positions is None or filters is None or not first:
            return None
        return 2 * positions * (filters // first)
    transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transA", 0))
    summed, results = _along(inputs[0], 0 if transposed else -1), elements(output)
    return None if summed is None or results is None else 2 * results * summed


def _along(value: ir.Value | None, axis: int) -> int | None:
    """The size of one axis, or None where it is not known."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def _prepared(path: str | os.PathLike[str]) -> ir.Model:
    from qonnx.passes.prepare import prepare

    model = load(path)
    _check_float(model)
    prepare(model)
    return model


def _check_float(model: ir.Model) -> None:
    if any(node.op_type in _QUANTIZED for graph in all_graphs(model) for node in graph):
        raise ModelError("the model is quantized already; give the float model, and its plan with --plan")


def _check_plan(plan: QuantPlan, model: ir.Model) -> None:
    names = {node.name for node in model.graph}
    for layer in plan.layers:
        if layer.node not in names:
            raise RecipeError(f"the plan is for another model: it has no node {layer.node!r}; make a plan for this one")


def _notes(
    model: ir.Model, device: Device, found: Iterable[Kernel], flop: Mapping[Kernel, int | None]
) -> Iterable[str]:
    if device.compute_capability < INT4_WEIGHTS_FROM:
        yield f"TensorRT does not run weights in INT4 on {device.sm}: that variant is hypothetical"
    unsized = [kernel.node.name for kernel, count in flop.items() if count is None]
    if unsized:
        yield f"{len(unsized)} layers are left out, such as {unsized[0]!r}: their sizes depend on the data"
    unknown = [name for kernel in found for name in kernel.unknown]
    if unknown:
        yield f"{len(unknown)} tensors are left out, such as {unknown[0]!r}: their sizes depend on the data"
    recurrent = sorted({node.op_type for node in model.graph if node.op_type in ("LSTM", "GRU", "RNN", "Einsum")})
    if recurrent:
        yield f"the arithmetic of {', '.join(recurrent)} is left out, their traffic is counted"
    if len(list(all_graphs(model))) > 1:
        yield "the bodies of If, Loop and Scan are left out"
