"""What each consumer of a quantized graph accepts, and what it runs fastest."""

from __future__ import annotations

import msgspec

from qonnx.devices import Device, device
from qonnx.errors import TargetError
from qonnx.numerics import Dtype


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A device or runtime that the quantized graph is made for.

    Attributes:
        name: the word for `--target`.
        description: one line for people.
        device: the GPU whose figures predict speed; None for a CPU.
        activations: the types it takes for activations, the default first.
        weights: the types it takes for weights that quantized activations are multiplied with, the default first.
        weight_only: the types it takes for weights that float activations are multiplied with.
        symmetric: whether every zero point must be 0.
        quantize_outputs: whether a convolution only runs on integers when its output is quantized too.
        integer_operators: whether it takes MatMulInteger, QLinearConv and the like.
        simulates: whether it computes in float what Q/DQ nodes say, whatever their granularity.
    """

    name: str
    description: str
    device: Device | None
    activations: tuple[Dtype, ...]
    weights: tuple[Dtype, ...]
    weight_only: tuple[Dtype, ...] = ()
    symmetric: bool
    quantize_outputs: bool
    integer_operators: bool = False
    simulates: bool = False

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """Of the CUDA device, such as (8, 0); None for a CPU."""
        return None if self.device is None else self.device.compute_capability


# The compute capabilities from which on TensorRT has FP8 products, and INT4 weights in products of float.
_FP8_FROM = (8, 9)
INT4_WEIGHTS_FROM = (8, 0)


def _tensorrt(name: str, chips: str) -> Target:
    gpu = device(name)
    fp8 = gpu.compute_capability >= _FP8_FROM
    integers_or_fp8 = (Dtype.INT8, Dtype.FLOAT8E4M3FN) if fp8 else (Dtype.INT8,)
    return Target(
        name=name,
        description=f"TensorRT on NVIDIA {chips} ({gpu.sm}): symmetric INT8{' or FP8' if fp8 else ''}, zero point 0",
        device=gpu,
        activations=integers_or_fp8,
        weights=integers_or_fp8,
        weight_only=(Dtype.INT4, *integers_or_fp8) if gpu.compute_capability >= INT4_WEIGHTS_FROM else (),
        symmetric=True,
        quantize_outputs=False,
    )


# What ONNX Runtime computes as the specification says, if it is kept from optimizing.
_SIMULATED = (
    Dtype.INT8,
    Dtype.UINT8,
    Dtype.INT4,
    Dtype.UINT4,
    Dtype.INT16,
    Dtype.UINT16,
    Dtype.FLOAT8E4M3FN,
    Dtype.FLOAT8E5M2,
)

TARGETS: tuple[Target, ...] = (
    _tensorrt("a800", "A800 / A100"),
    _tensorrt("a100", "A100"),
    _tensorrt("h100", "H100"),
    _tensorrt("h800", "H800"),
    _tensorrt("h200", "H200"),
    _tensorrt("h20", "H20"),
    _tensorrt("l40s", "L40S"),
    _tensorrt("l20", "L20"),
    _tensorrt("l4", "L4"),
    _tensorrt("t4", "T4"),
    _tensorrt("rtx3090", "RTX 3090"),
    _tensorrt("rtx4090", "RTX 4090"),
    _tensorrt("orin", "Jetson AGX Orin"),
    Target(
        name="ort-cpu",
        description="ONNX Runtime's CPU kernels: UINT8 activations with zero point, INT8 weights; 16 bits in float",
        device=None,
        activations=(Dtype.UINT8, Dtype.INT8, Dtype.UINT16, Dtype.INT16),
        weights=(Dtype.INT8, Dtype.UINT8, Dtype.INT16, Dtype.UINT16),
        weight_only=(Dtype.INT4, *(dtype for dtype in Dtype if dtype is not Dtype.INT4)),
        symmetric=False,
        quantize_outputs=True,
        integer_operators=True,
    ),
    Target(
        name="onnx",
        description="any other runtime that computes what the ONNX specification says; here without optimizations",
        device=None,
        activations=_SIMULATED,
        weights=_SIMULATED,
        weight_only=_SIMULATED,
        symmetric=False,
        quantize_outputs=False,
        simulates=True,
    ),
)


def target(name: str) -> Target:
    """The target of that name.

    Raises:
        TargetError: there is none.
    """
    for candidate in TARGETS:
        if candidate.name == name:
            return candidate
    raise TargetError(f"unknown target {name!r}; choose one of {', '.join(known.name for known in TARGETS)}")


def check_types(target: Target, activations: Dtype | None, weights: Dtype) -> None:
    """Refuses types that the target does not multiply with each other.

    Args:
        target: the consumer of the graph.
        activations: the type of activations, None when they stay in float.
        weights: the type of weights.

    Raises:
        TargetError: with the reason and the alternative.
    """
    if activations is None:
        if weights not in target.weight_only:
            raise TargetError(_refusal("weights", weights, target, target.weight_only, " with float activations"))
        return
    if activations not in target.activations:
        raise TargetError(_refusal("activations", activations, target, target.activations))
    if weights in target.weight_only and weights not in target.weights:
        raise TargetError(
            f"weights in {weights} run on {target.name} with float activations only; "
            f"leave activations in float or use {_either(target.weights)}"
        )
    if weights not in target.weights:
        raise TargetError(_refusal("weights", weights, target, target.weights))
    if activations.is_integer != weights.is_integer:
        raise TargetError(
            f"activations in {activations} and weights in {weights} do not multiply on {target.name}; "
            f"use {activations} for both"
        )


def _refusal(role: str, dtype: Dtype, target: Target, allowed: tuple[Dtype, ...], where: str = "") -> str:
    gpu = target.device
    if gpu is not None and dtype is Dtype.FLOAT8E4M3FN and gpu.compute_capability < _FP8_FROM:
        return f"FP8 needs sm_{_FP8_FROM[0]}{_FP8_FROM[1]}; {target.name} is {gpu.sm}: use int8 or target h100"
    if not allowed:
        return f"{role} in {dtype}{where} do not run on {target.name}; quantize activations too"
    return f"{role} in {dtype}{where} do not run on {target.name}; use {_either(allowed)}"


def _either(dtypes: tuple[Dtype, ...]) -> str:
    return " or ".join(dtypes)
