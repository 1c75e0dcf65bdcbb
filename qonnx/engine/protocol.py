"""What `build` and its child process say to each other: a JSON request on stdin; steps and a reply on stdout.

Each line on stdout is one message; the reply is the last one.
"""

from __future__ import annotations

import msgspec

from qonnx.engine.settings import Backend, Calibrator, FloatType, Settings

# The smallest, the usual and the largest shape of one input.
Profile = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class Calibration(msgspec.Struct, frozen=True):
    """Where the ranges of a graph without Q/DQ nodes come from.

    Attributes:
        calibrator: the class that TensorRT is given.
        cache: the text of a calibration cache, or "" to calibrate on the batches.
        batches: `.npz` files with one batch each, all of the same shapes.
        shapes: of a batch, by the name of the input.
    """

    calibrator: Calibrator
    cache: str = ""
    batches: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = {}


class Request(msgspec.Struct, frozen=True):
    """What to compile.

    Attributes:
        model: absolute path of the ONNX file; TensorRT finds external data beside it.
        plan: where to write the engine.
        backend: the compiler.
        compute_capability: of the device that will run it, such as (8, 0).
        profiles: for every input with a dynamic dimension, the shapes that the engine must accept.
        settings: of the builder.
        quantized: whether there are ranges, from Q/DQ nodes or a calibrator.
        float_type: what a compiler without strong typing may compute in.
        calibration: for a graph without Q/DQ nodes.
    """

    model: str
    plan: str
    backend: Backend
    compute_capability: tuple[int, int]
    profiles: dict[str, Profile]
    settings: Settings = Settings()
    quantized: bool = True
    float_type: FloatType = FloatType.FP32
    calibration: Calibration | None = None


class Refusal(msgspec.Struct, frozen=True):
    """One reason why there is no engine.

    Attributes:
        text: the compiler's own words.
        node: the ONNX node that it complains about, or "".
        op: the operator of that node, or "".
    """

    text: str
    node: str = ""
    op: str = ""


class Step(msgspec.Struct, frozen=True, tag=True):
    """How far the builder is.

    Attributes:
        phase: in the builder's words.
        done: steps of the phase that are done.
        total: how many it has.
    """

    phase: str
    done: int
    total: int


class Reply(msgspec.Struct, frozen=True, tag=True):
    """What came of it; there is an engine exactly when there is no refusal.

    Attributes:
        compiler: name and version.
        seconds: time to parse and compile, loading the library excepted.
        listing: the "Layers:" text that TensorRT for RTX logs.
        inspection: the layers as JSON, from TensorRT's inspector, which needs the GPU.
        warnings: what the compiler warned about, each once.
        refusals: why there is no engine.
    """

    compiler: str
    seconds: float = 0.0
    listing: str = ""
    inspection: str = ""
    warnings: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
