"""What each consumer of a quantized graph accepts, and what it runs fastest."""

from __future__ import annotations

import msgspec

from qonnx.errors import TargetError
from qonnx.numerics import Dtype


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A device or runtime that the quantized graph is made for.

    Attributes:
        name: the word for `--target`.
        description: one line for people.
        compute_capability: of the CUDA device, such as (8, 0); None for a CPU.
        activations: the types it takes for activations, the default first.
        weights: the types it takes for weights, the default first.
        symmetric: whether every zero point must be 0.
        quantize_outputs: whether a convolution only runs on integers when its output is quantized too.
    """

    name: str
    description: str
    compute_capability: tuple[int, int] | None
    activations: tuple[Dtype, ...]
    weights: tuple[Dtype, ...]
    symmetric: bool
    quantize_outputs: bool


TARGETS: tuple[Target, ...] = (
    Target(
        name="a800",
        description="TensorRT on NVIDIA A800 / A100 (sm_80): symmetric INT8, zero point 0",
        compute_capability=(8, 0),
        activations=(Dtype.INT8,),
        weights=(Dtype.INT8,),
        symmetric=True,
        quantize_outputs=False,
    ),
    Target(
        name="ort-cpu",
        description="ONNX Runtime's CPU kernels: UINT8 activations with zero point, INT8 weights",
        compute_capability=None,
        activations=(Dtype.UINT8, Dtype.INT8),
        weights=(Dtype.INT8, Dtype.UINT8),
        symmetric=False,
        quantize_outputs=True,
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
