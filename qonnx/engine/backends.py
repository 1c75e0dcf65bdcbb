"""Which compiler can build an engine for a target here, and what it can do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

from qonnx.engine import gpu
from qonnx.engine.settings import Backend, FloatType, Settings
from qonnx.errors import DependencyError, TargetError
from qonnx.targets import TARGETS, Target

# The members of ComputeCapability in TensorRT for RTX 1.7.
RTX_BUILDS_FOR = frozenset({(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)})

# AMPERE_PLUS, the one level of hardware compatibility that all versions have.
_COMPATIBLE_FROM = (8, 0)


@dataclass(frozen=True)
class Compiler:
    """A compiler that is installed.

    Attributes:
        backend: which one.
        version: of its Python package, such as (10, 16, 1).
    """

    backend: Backend
    version: tuple[int, ...]

    @property
    def strongly_typed(self) -> bool:
        """Whether the types in the graph decide alone what runs in which precision; older versions take flags."""
        return self.backend is Backend.RTX or self.version >= (10,)

    @property
    def calibrates(self) -> bool:
        """Whether it takes ranges from a calibrator, for graphs without Q/DQ nodes: up to TensorRT 10."""
        return self.backend is Backend.TENSORRT and self.version < (11,)

    def __str__(self) -> str:
        return f"{self.backend} {'.'.join(map(str, self.version))}"


def capability_of(target: Target) -> tuple[int, int]:
    """The compute capability of a target that is a GPU.

    Raises:
        TargetError: it is none.
    """
    if target.compute_capability is None:
        devices = ", ".join(known.name for known in TARGETS if known.compute_capability)
        raise TargetError(f"target {target.name!r} runs no TensorRT engine; choose one of {devices}")
    return target.compute_capability


def find_compiler(backend: Backend | None, target: Target, hardware_compatible: bool = False) -> Compiler:
    """The compiler to use: the wanted one, or TensorRT where this machine has the target's GPU, or TensorRT for RTX.

    Raises:
        TargetError: it cannot build for the target, or not on this machine; says what can.
        DependencyError: it is not installed.
    """
    capability = capability_of(target)
    if backend is None:
        backend = Backend.TENSORRT if _installed("tensorrt") and gpu.compute_capability() == capability else Backend.RTX
    if backend is Backend.RTX:
        if capability not in RTX_BUILDS_FOR:
            raise TargetError(
                f"target {target.name!r}: tensorrt-rtx does not build for {_sm(capability)}, only for "
                f"{', '.join(map(_sm, sorted(RTX_BUILDS_FOR)))}; build on such a GPU with backend 'tensorrt'"
            )
        if not _installed("tensorrt_rtx"):
            raise DependencyError("tensorrt-rtx is not installed: pip install 'qonnx-pipeline[rtx]'")
        return Compiler(backend, _version("tensorrt_rtx"))
    _check_gpu(target, capability, hardware_compatible)
    if not _installed("tensorrt"):
        raise DependencyError("TensorRT is not installed: pip install 'qonnx-pipeline[tensorrt]'")
    return Compiler(backend, _version("tensorrt"))


def check_settings(compiler: Compiler, settings: Settings, float_type: FloatType, implicit: bool) -> None:
    """Refuses what the compiler cannot do, before any work.

    Args:
        compiler: that will be asked.
        settings: what the user wants.
        float_type: what is left of the graph shall compute in.
        implicit: whether the ranges come from a calibrator.

    Raises:
        TargetError: with the alternative.
    """
    if compiler.backend is Backend.RTX:
        for name in ("timing_cache", "version_compatible", "hardware_compatible", "refit"):
            if getattr(settings, name):
                raise TargetError(f"{name}: tensorrt-rtx cannot do that without a GPU; leave it out, or use 'tensorrt'")
    if implicit and not compiler.calibrates:
        raise TargetError(
            f"{compiler} has no calibration: `qonnx quantize` puts the ranges into the graph; build what it writes"
        )
    if settings.weight_streaming and (implicit or not compiler.strongly_typed):
        raise TargetError(
            f"weight_streaming: {compiler} streams the weights of strongly typed graphs only; "
            "use TensorRT 10 or later and a graph with Q/DQ nodes"
        )
    if float_type is FloatType.BF16 and not compiler.strongly_typed:
        raise TargetError(f"{compiler} does not compute in bf16; use fp16, or TensorRT 10 or later")


def _check_gpu(target: Target, capability: tuple[int, int], hardware_compatible: bool) -> None:
    """TensorRT measures its kernels on the GPU at hand, so that must be the target's."""
    here = gpu.compute_capability()
    rtx = ", or use backend 'tensorrt-rtx', which needs none" if capability in RTX_BUILDS_FOR else ""
    if here is None:
        raise TargetError(
            f"TensorRT builds on the GPU that runs the engine, and this machine has no GPU or no driver; "
            f"build on a machine with {target.name}{rtx}"
        )
    if here == capability or (hardware_compatible and min(here, capability) >= _COMPATIBLE_FROM):
        return
    compatible = ", or ask for a hardware-compatible engine" if min(here, capability) >= _COMPATIBLE_FROM else ""
    raise TargetError(
        f"target {target.name!r} is {_sm(capability)} and the GPU of this machine is {_sm(here)}; "
        f"build on the target{compatible}"
    )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module without a specification stands in for it
        return True


def _version(module: str) -> tuple[int, ...]:
    """Of the distribution that the module comes from, without importing it; only the leading numbers of it count."""
    names = importlib.metadata.packages_distributions().get(module, [])
    text = importlib.metadata.version(names[0]) if names else ""
    numbers = [int(part) for part in text.split(".")[:3] if part.isdigit()]
    if not numbers:
        raise DependencyError(f"{module}: no version is recorded for this installation; install it with pip")
    return tuple(numbers)


def _sm(capability: tuple[int, int]) -> str:
    return "sm_{}{}".format(*capability)
