"""What `build` and its child process say to each other: one JSON request on stdin, one JSON reply on stdout."""

from __future__ import annotations

import msgspec

# The smallest, the usual and the largest shape of one input.
Profile = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class Request(msgspec.Struct, frozen=True):
    """What to compile.

    Attributes:
        model: absolute path of the ONNX file; TensorRT finds external data beside it.
        plan: where to write the engine.
        compute_capability: of the device that will run it, such as (8, 0).
        profiles: for every input with a dynamic dimension, the shapes that the engine must accept.
    """

    model: str
    plan: str
    compute_capability: tuple[int, int]
    profiles: dict[str, Profile]


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


class Reply(msgspec.Struct, frozen=True):
    """What came of it; there is an engine exactly when there is no refusal.

    Attributes:
        compiler: name and version.
        seconds: time to parse and compile, loading the library excepted.
        listing: the compiler's "Layers:" text.
        warnings: what the compiler warned about, each once.
        refusals: why there is no engine.
    """

    compiler: str
    seconds: float = 0.0
    listing: str = ""
    warnings: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
