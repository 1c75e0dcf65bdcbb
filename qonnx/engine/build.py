"""Compiles an ONNX file into a TensorRT engine, in a child process."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from qonnx.engine.listing import EngineLayer, parse_listing
from qonnx.engine.messages import reason, refusal_message
from qonnx.engine.profiles import Range, profiles_of
from qonnx.engine.protocol import Profile, Reply, Request
from qonnx.errors import DependencyError, EngineError, TargetError
from qonnx.graph import load, publish, staging
from qonnx.targets import TARGETS
from qonnx.targets import target as target_named

# -P: a file of the working directory must not shadow a module.
CHILD = (sys.executable, "-P", "-m", "qonnx.engine.compile_child")


class EngineReport(msgspec.Struct, frozen=True):
    """What was built.

    Attributes:
        plan: path of the engine file.
        bytes: its size.
        seconds: time to parse and compile.
        compiler: name and version of the compiler.
        compute_capability: of the devices that can run it.
        profiles: smallest, usual and largest shape of every input with a dynamic dimension.
        layers: the kernels in order of execution.
        warnings: what the compiler warned about.
    """

    plan: str
    bytes: int
    seconds: float
    compiler: str
    compute_capability: tuple[int, int]
    profiles: dict[str, Profile]
    layers: tuple[EngineLayer, ...]
    warnings: tuple[str, ...]


def build_engine(
    model: str | os.PathLike[str],
    plan: str | os.PathLike[str],
    *,
    target: str = "a800",
    dims: Mapping[str, Range] | None = None,
    profiles: Mapping[str, Sequence[Sequence[int]]] | None = None,
    timeout: float = 600,
) -> EngineReport:
    """Compiles an ONNX file for a GPU; this machine needs neither the GPU nor a driver.

    The compiler is TensorRT-RTX with strong typing: Q/DQ nodes alone decide what runs on INT8. It works in a child
    process, so that a crash of the library is an error and not the end of the caller.

    Args:
        model: an ONNX file, with its external data beside it.
        plan: where to write the engine; nothing is written unless all goes well.
        target: the device to build for.
        dims: smallest, usual and largest size of dynamic dimensions by name: `{"sequence": (1, 128, 256)}`. The
            batch, which is any named dimension that comes first in an input, is (1, 8, 32) if not given.
        profiles: smallest, usual and largest shape of inputs by name; they win over `dims`.
        timeout: seconds after which the compiler is stopped.

    Raises:
        ModelError: the model is missing or cannot be read.
        TargetError: the target is not a GPU.
        OutputError: the plan cannot be written there.
        DependencyError: tensorrt-rtx is not installed.
        EngineError: the compiler refuses the graph, crashes or takes too long; or a dynamic dimension has no sizes.
    """
    capability = target_named(target).compute_capability
    if capability is None:
        devices = ", ".join(known.name for known in TARGETS if known.compute_capability)
        raise TargetError(f"target {target!r} runs no TensorRT engine; choose one of {devices}")
    try:
        shapes = profiles_of(load(model), dims, profiles)
    except EngineError as error:
        raise EngineError(f"{model}: {error}") from None
    if importlib.util.find_spec("tensorrt_rtx") is None:
        raise DependencyError("tensorrt-rtx is not installed: pip install 'qonnx-pipeline[rtx]'")
    with staging(plan) as folder:
        staged = folder / Path(plan).name
        request = Request(
            model=str(Path(model).resolve()), plan=str(staged), compute_capability=capability, profiles=shapes
        )
        reply = _compile(request, os.fspath(model), timeout)
        size = staged.stat().st_size
        publish(folder, Path(plan).parent)
    return EngineReport(
        plan=os.fspath(plan),
        bytes=size,
        seconds=reply.seconds,
        compiler=reply.compiler,
        compute_capability=capability,
        profiles=shapes,
        layers=parse_listing(reply.listing),
        warnings=tuple(reason(warning) for warning in reply.warnings),
    )


def _compile(request: Request, model: str, timeout: float) -> Reply:
    """Runs the child, and turns every way in which it can fail into one line."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    try:
        child = subprocess.run(
            CHILD,
            input=msgspec.json.encode(request),
            capture_output=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"{model}: the compiler was stopped after {timeout:g} s; give it a longer timeout") from None
    if child.returncode or not child.stdout:
        raise EngineError(f"{model}: the compiler {_death(child.returncode, child.stderr)}")
    reply = msgspec.json.decode(child.stdout, type=Reply)
    if reply.refusals:
        others = f" (and {len(reply.refusals) - 1} more)" if len(reply.refusals) > 1 else ""
        raise EngineError(f"{model}: {refusal_message(reply.refusals[0])}{others}")
    return reply


def _death(code: int, stderr: bytes) -> str:
    """How a process ended that did not answer."""
    if code < 0:
        name = signal.Signals(-code).name
        if name == "SIGKILL":
            return "was killed (SIGKILL): the machine is probably out of memory"
        return f"crashed ({name}): TensorRT cannot handle this graph; check it with onnx.checker"
    lines = stderr.decode(errors="replace").strip().splitlines()
    return f"failed: {lines[-1]}" if lines else f"ended with exit code {code}"
