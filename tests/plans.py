"""Plans made by hand, and the float network that a plan stands for."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qonnx.numerics import Dtype, Granularity, PerTensor, fake_quantize, minmax, scale_and_zero_point, scale_shape
from qonnx.placement import Edge
from qonnx.plan import QuantPlan, TensorPlan
from qonnx.runtime import session
from tests.helpers import LEVELS

Array = npt.NDArray[Any]

FLOAT8 = (Dtype.FLOAT8E4M3FN, Dtype.FLOAT8E5M2)
INTEGERS = tuple(dtype for dtype in Dtype if dtype.is_integer)


def tensor_plan(
    value: str, data: Array, edges: str, dtype: Dtype, granularity: Granularity, symmetric: bool = True
) -> TensorPlan:
    """The plan for a tensor of these values; `edges` is `node:input node:input`."""
    low, high = minmax(data, granularity)
    scale, zero = scale_and_zero_point(low, high, dtype, symmetric=symmetric)
    zeros = tuple(int(code) for code in np.ravel(zero)) if dtype.is_integer else ()
    return TensorPlan(
        value=value,
        edges=edges_of(edges),
        dtype=dtype,
        granularity=granularity,
        scale=tuple(float(step) for step in np.ravel(scale)),
        zero_point=zeros if any(zeros) else (),
    )


def weight_plan(
    model: ir.Model, value: str, edges: str, dtype: Dtype, granularity: Granularity, symmetric: bool = True
) -> TensorPlan:
    """The plan for an initializer."""
    return tensor_plan(value, stored(model, value), edges, dtype, granularity, symmetric)


def dynamic_plan(value: str, edges: str, dtype: Dtype, granularity: Granularity) -> TensorPlan:
    """The plan for an activation that is measured at run time."""
    return TensorPlan(value, edges_of(edges), dtype, granularity, ())


def edges_of(text: str) -> tuple[Edge, ...]:
    pairs = (edge.split(":") for edge in text.split())
    return tuple(Edge(node, int(index)) for node, index in pairs)


def quant_plan(*tensors: TensorPlan, weights: tuple[TensorPlan, ...] = (), target: str = "ort-cpu") -> QuantPlan:
    """A plan of activations and weights."""
    return QuantPlan(target, "by hand", tensors, weights, ())


def stored(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def rounded(data: Array, plan: TensorPlan) -> Array:
    """The values that a tensor has after it was quantized and dequantized."""
    shape = scale_shape(data.shape, plan.granularity)
    zero = np.array(plan.zero_point).reshape(shape).astype(plan.dtype.numpy) if plan.zero_point else None
    return fake_quantize(data, np.array(plan.scale, np.float32).reshape(shape), zero, plan.dtype, plan.granularity)


def with_rounded_weights(model: ir.Model, *weights: TensorPlan) -> ir.Model:
    """The float network with the values that the weights have after quantization."""
    copy = model.clone()
    for plan in weights:
        value = copy.graph.initializers[plan.value]
        assert value.dtype is not None
        data = rounded(stored(model, plan.value).astype(np.float32), plan).astype(value.dtype.numpy())
        value.const_value = ir.Tensor(data, dtype=value.dtype, name=plan.value)
    return copy


def inserted(step: ir.passes.InPlacePass, model: ir.Model) -> ir.Model:
    """What a pass makes of a copy of the model, checked."""
    copy = model.clone()
    assert step(copy).modified
    onnx.checker.check_model(ir.to_proto(copy), full_check=True)
    names = [node.name for node in copy.graph if node.name]
    assert len(set(names)) == len(names)
    assert all(value.uses() for value in copy.graph.initializers.values())
    return copy


def outputs(model: ir.Model, feeds: Mapping[str, Array], optimize: bool = False) -> list[Array]:
    return list(session(model, optimize=optimize, threads=1).run(feeds).values())


def assert_outputs(model: ir.Model, feeds: Mapping[str, Array], expected: list[Array], rtol: float = 3e-6) -> None:
    """The model returns this, with and without ONNX Runtime's optimizations, up to float rounding."""
    for optimize in LEVELS:
        for found, reference in zip(outputs(model, feeds, optimize), expected, strict=True):
            assert found.dtype == reference.dtype
            largest = float(np.abs(reference.astype(np.float64)).max(initial=0))
            np.testing.assert_allclose(found, reference, rtol=0, atol=rtol * largest, err_msg=f"optimize={optimize}")


def activation_plan(
    value: str, data: Array, edges: str, dtype: Dtype = Dtype.UINT8, symmetric: bool = False
) -> TensorPlan:
    return tensor_plan(value, data, edges, dtype, PerTensor(), symmetric)
