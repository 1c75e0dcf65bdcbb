"""Compiles an ONNX file into a TensorRT engine, in a child process."""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from qonnx.data import batches
from qonnx.engine.backends import capability_of, check_settings, find_compiler
from qonnx.engine.calibrate import check_no_qdq, from_batches, from_cache, holds_qdq
from qonnx.engine.inspection import NodeInspection, inspect
from qonnx.engine.inspector import parse_inspection
from qonnx.engine.listing import EngineLayer, parse_listing
from qonnx.engine.messages import located, planned_reason, reason, refusal_message
from qonnx.engine.profiles import Range, profiles_of, sizes_in
from qonnx.engine.protocol import Profile, Reply, Request, Step
from qonnx.engine.settings import Backend, Calibrator, FloatType, Settings
from qonnx.errors import EngineError
from qonnx.graph import load, publish, save, staging
from qonnx.passes.convert_float import ConvertFloat
from qonnx.runtime import input_specs
from qonnx.targets import target as target_named

_Enum = TypeVar("_Enum", bound=enum.StrEnum)

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
        nodes: how each matrix product and convolution of the graph runs.
        layers: the kernels in order of execution.
        warnings: what the compiler warned about.
    """

    plan: str
    bytes: int
    seconds: float
    compiler: str
    compute_capability: tuple[int, int]
    profiles: dict[str, Profile]
    nodes: tuple[NodeInspection, ...]
    layers: tuple[EngineLayer, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        """The whole report; types by their names."""
        layers = [
            {
                field: [kind.name.lower() for kind in value] if field in ("inputs", "constants", "outputs") else value
                for field, value in msgspec.structs.asdict(layer).items()
            }
            for layer in self.layers
        ]
        return msgspec.json.encode(msgspec.structs.asdict(self) | {"layers": layers}).decode()


def build_engine(
    model: str | os.PathLike[str],
    plan: str | os.PathLike[str],
    *,
    target: str = "a800",
    backend: Backend | str | None = None,
    dims: Mapping[str, Range] | None = None,
    profiles: Mapping[str, Sequence[Sequence[int]]] | None = None,
    data: Any = None,
    float_type: FloatType | str = FloatType.FP32,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    calibrator: Calibrator | str | None = None,
    calibration_cache: str | os.PathLike[str] | None = None,
    progress: Callable[[Step], None] | None = None,
    timeout: float = 600,
) -> EngineReport:
    """Compiles an ONNX file into a TensorRT engine.

    TensorRT for RTX needs neither a GPU nor a driver; TensorRT itself builds on the GPU that will run the engine. With
    both, Q/DQ nodes alone decide what runs on INT8. The compiler works in a child process, so that a crash of the
    library is an error and not the end of the caller.

    Args:
        model: an ONNX file, with its external data beside it.
        plan: where to write the engine; nothing is written unless all goes well.
        target: the device to build for.
        backend: the compiler; TensorRT where it is installed beside a GPU of the target, else TensorRT for RTX.
        dims: smallest, usual and largest size of dynamic dimensions by name: `{"sequence": (1, 128, 256)}`. The
            batch, which is any named dimension that comes first in an input, is (1, 8, 32) if not given.
        profiles: smallest, usual and largest shape of inputs by name; they win over `dims`.
        data: batches, see `qonnx.data.batches`: sizes that are not given are taken from them, and a calibrator
            calibrates on them.
        float_type: what is left in float32 computes in this type; inputs and outputs keep theirs.
        settings: of the builder.
        calibrator: for a graph without Q/DQ nodes and TensorRT up to 10: how it shall calibrate on `data`.
        calibration_cache: for such a graph: a cache to take the ranges from, as `qonnx calibrate --cache` writes it.
        progress: called after every step of the builder.
        timeout: seconds after which the compiler is stopped.

    Raises:
        ModelError: the model is missing or cannot be read.
        TargetError: the target is not a GPU, or the compiler cannot build for it or do what is asked.
        DataError: the data or the cache do not fit.
        OutputError: the plan cannot be written there.
        DependencyError: the compiler is not installed.
        EngineError: the compiler refuses the graph, crashes or takes too long; or a dynamic dimension has no sizes.
    """
    consumer = target_named(target)
    wanted = None if backend is None else member(Backend, backend, "backend")
    capability = capability_of(consumer)
    short = member(FloatType, float_type, "float_type")
    loaded = load(model)
    implicit = calibrator is not None or calibration_cache is not None
    if calibrator is not None and calibration_cache is None and data is None:
        raise EngineError(
            f"calibrator {str(calibrator)!r} needs data to calibrate on; give some, or a calibration cache"
        )
    try:
        if implicit:
            check_no_qdq(loaded)
        compiler = find_compiler(wanted, consumer, settings.hardware_compatible)
        check_settings(compiler, settings, short, implicit)
        seen = {} if data is None else _sizes(loaded, data)
        shapes = profiles_of(loaded, {**seen, **(dims or {})}, profiles)
    except EngineError as error:
        raise EngineError(f"{model}: {error}") from None
    with staging(plan) as folder, tempfile.TemporaryDirectory() as scratch:
        calibration = None
        if calibration_cache is not None:
            calibration = from_cache(calibration_cache, compiler)
        elif calibrator is not None:
            calibration = from_batches(loaded, data, member(Calibrator, calibrator, "calibrator"), Path(scratch))
        source = Path(model)
        if short is not FloatType.FP32 and compiler.strongly_typed and not implicit:
            source = _in_short_floats(loaded, short, Path(scratch) / "model.onnx")
        staged = folder / Path(plan).name
        request = Request(
            model=str(source.resolve()),
            plan=str(staged),
            backend=compiler.backend,
            compute_capability=capability,
            profiles=shapes,
            settings=settings,
            quantized=implicit or holds_qdq(loaded),
            float_type=short,
            calibration=calibration,
        )
        reply = _compile(request, loaded, os.fspath(model), timeout, progress or (lambda step: None))
        size = staged.stat().st_size
        publish(folder, Path(plan).parent)
    layers = parse_inspection(reply.inspection) or parse_listing(reply.listing)
    return EngineReport(
        plan=os.fspath(plan),
        bytes=size,
        seconds=reply.seconds,
        compiler=reply.compiler,
        compute_capability=capability,
        profiles=shapes,
        nodes=inspect(loaded, layers, consumer.name),
        layers=layers,
        warnings=tuple(reason(warning) for warning in reply.warnings),
    )


def member(kind: type[_Enum], value: str, what: str) -> _Enum:
    """A value of an enumeration, from its word.

    Raises:
        EngineError: there is none of that word.
    """
    try:
        return kind(value)
    except ValueError:
        raise EngineError(f"unknown {what} {value!r}; choose one of {', '.join(kind)}") from None


def _sizes(model: ir.Model, data: Any) -> dict[str, Range]:
    specs = input_specs(model)
    return sizes_in(model, ({name: array.shape for name, array in batch.items()} for batch in batches(data, specs)))


def _in_short_floats(model: ir.Model, short: FloatType, path: Path) -> Path:
    converted = model.clone()
    InlinePass()(converted)
    dtype = ir.DataType.FLOAT16 if short is FloatType.FP16 else ir.DataType.BFLOAT16
    ConvertFloat(dtype)(converted)
    save(converted, path)
    return path


def _compile(request: Request, model: ir.Model, name: str, timeout: float, progress: Callable[[Step], None]) -> Reply:
    """Runs the child, and turns every way in which it can fail into one line."""
    reply, code, stderr = _talk(msgspec.json.encode(request), timeout, progress)
    if code is None:
        raise EngineError(f"{name}: the compiler was stopped after {timeout:g} s; give it a longer timeout")
    if code or reply is None:
        raise EngineError(f"{name}: the compiler {_death(code, stderr)}")
    if reply.refusals:
        others = f" (and {len(reply.refusals) - 1} more)" if len(reply.refusals) > 1 else ""
        refusal = located(reply.refusals[0], model)
        raise EngineError(f"{name}: {refusal_message(refusal)}{others}{planned_reason(refusal, model)}")
    return reply


def _talk(request: bytes, timeout: float, progress: Callable[[Step], None]) -> tuple[Reply | None, int | None, bytes]:
    """What the child answers, its exit code (None when it was stopped), and what it prints to stderr."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    reply, stopped = None, threading.Event()
    with tempfile.TemporaryFile() as errors:
        pipe = subprocess.PIPE
        with subprocess.Popen(CHILD, stdin=pipe, stdout=pipe, stderr=errors, env=environment) as child:
            assert child.stdin is not None
            assert child.stdout is not None

            def stop() -> None:
                stopped.set()
                child.kill()

            clock = threading.Timer(timeout, stop)
            clock.start()
            try:
                with contextlib.suppress(BrokenPipeError), child.stdin:  # it is dead already; its exit code tells
                    child.stdin.write(request)
                for line in child.stdout:
                    message = msgspec.json.decode(line, type=Step | Reply)
                    if isinstance(message, Reply):
                        reply = message
                    else:
                        progress(message)
                code = child.wait()
            finally:
                clock.cancel()
                child.kill()
        errors.seek(0)
        return reply, None if stopped.is_set() else code, errors.read()


def _death(code: int, stderr: bytes) -> str:
    """How a process ended that did not answer."""
    if code < 0:
        name = signal.Signals(-code).name
        if name == "SIGKILL":
            return "was killed (SIGKILL): the machine is probably out of memory"
        return f"crashed ({name}): TensorRT cannot handle this graph; check it with onnx.checker"
    lines = stderr.decode(errors="replace").strip().splitlines()
    return f"failed: {lines[-1]}" if lines else f"ended with exit code {code}"
