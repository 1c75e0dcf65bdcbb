"""What a user may ask of the compiler, beyond the graph and its shapes."""

from __future__ import annotations

import enum

import msgspec

from qonnx.errors import EngineError


class Backend(enum.StrEnum):
    """Which compiler builds the engine.

    * RTX: TensorRT for RTX, which builds on any machine, for the devices of `qonnx.engine.backends.RTX_BUILDS_FOR`.
    * TENSORRT: TensorRT 8.6, 10 or 11, which builds on the GPU that will run the engine.
    """

    RTX = "tensorrt-rtx"
    TENSORRT = "tensorrt"


class FloatType(enum.StrEnum):
    """What the engine computes in where it does not compute on integers."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Calibrator(enum.StrEnum):
    """The class of calibrator that TensorRT up to 10 is given for a graph without Q/DQ nodes.

    * ENTROPY_2: ranges of least relative entropy; what TensorRT recommends for convolutional networks.
    * MINMAX: the largest magnitude; what it recommends for transformers.
    * ENTROPY: the older form of the first, which calibrates after layers are fused.
    * LEGACY: percentiles.
    """

    ENTROPY_2 = "entropy-2"
    MINMAX = "minmax"
    ENTROPY = "entropy"
    LEGACY = "legacy"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The builder's own settings; what is left out is the builder's choice.

    Attributes:
        workspace_mib: how much GPU memory a kernel may use for itself, in 2^20 bytes.
        level: how long to search for fast kernels, 0 to 5; TensorRT takes 3 by default.
        timing_cache: a file of measured kernel times; read if it is there, and written back. TensorRT only.
        version_compatible: whether later versions of TensorRT may load the engine. TensorRT only.
        hardware_compatible: whether all GPUs from Ampere on may load the engine, at some cost in speed. TensorRT only.
        refit: whether weights can be replaced in the engine. TensorRT only.
        weight_streaming: whether weights may stay in host memory when it runs. Strongly typed graphs only.

    Raises:
        EngineError: a figure is out of its range.
    """

    workspace_mib: int | None = None
    level: int | None = None
    timing_cache: str | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    refit: bool = False
    weight_streaming: bool = False

    def __post_init__(self) -> None:
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise EngineError(f"workspace_mib is {self.workspace_mib}; give at least 1")
        if self.level is not None and not 0 <= self.level <= 5:
            raise EngineError(f"level is {self.level}; give 0 to 5")
