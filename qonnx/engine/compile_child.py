"""The process that calls the compiler: `python -m qonnx.engine.compile_child < request.json`.

It is a process of its own because malformed graphs can crash the library, and a crash must not take the caller along.
TensorRT 8.6, 10 and 11 and TensorRT for RTX share one API; where they differ is said here, and nowhere else.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from qonnx.engine.execution import MODULES
from qonnx.engine.implicit import Memory, make_calibrator
from qonnx.engine.protocol import Refusal, Reply, Request, Step
from qonnx.engine.settings import Backend, FloatType

_MIB = 1 << 20


def compile_model(trt: Any, request: Request, say: Callable[[Step], None], memory: Memory | None = None) -> Reply:
    """Parses and compiles; writes the plan file.

    Args:
        trt: the library.
        request: what to compile.
        say: called when the builder has done a step.
        memory: for calibration on batches.
    """
    start = time.perf_counter()
    # The library does not keep these alive, and calls them to the end of its own objects, which live in `_build`.
    log, errors = _logger(trt), _error_recorder(trt)
    monitor = _monitor(trt, say) if hasattr(trt, "IProgressMonitor") else None
    source = None if request.calibration is None else make_calibrator(trt, request.calibration, memory)
    refusals, inspection = _build(trt, request, log, errors, monitor, source)
    return Reply(
        compiler=f"{request.backend} {trt.__version__}",
        seconds=time.perf_counter() - start,
        listing=log.listing,
        inspection=inspection,
        warnings=tuple(dict.fromkeys(log.warnings)),
        refusals=refusals,
    )


def _build(
    trt: Any, request: Request, log: Any, errors: Any, monitor: Any, source: Any
) -> tuple[tuple[Refusal, ...], str]:
    """Why there is no engine; or what the inspector says of the one that was written."""
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt, request))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request.model):
        problems = [parser.get_error(index) for index in range(parser.num_errors)]
        refusals = tuple(_parser_refusal(problem) for problem in problems)
        return refusals or (Refusal(text="the parser cannot read this file"),), ""
    # What goes wrong from here on is told to the recorder instead of the log. The parser has errors of its own, and
    # with a recorder set before it has parsed, TensorRT for RTX 1.7 ends in a segmentation fault.
    builder.error_recorder = errors
    config = _configuration(trt, builder, network, request)
    if monitor is not None:
        config.progress_monitor = monitor
    if source is not None:
        _calibrate(builder, config, request, source)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        texts = errors.texts + log.errors or ["no reason given"]
        return tuple(Refusal(text=text) for text in texts), ""
    Path(request.plan).write_bytes(plan)
    _save_timing_cache(config, request)
    return (), _inspection(trt, log, plan, request)


def _network_flags(trt: Any, request: Request) -> int:
    """Strong typing where it exists: every tensor has the type that the graph gives it, so that Q/DQ alone decide.

    The number of the flag is another one in each major version.
    """
    flags = trt.NetworkDefinitionCreationFlag
    if hasattr(flags, "STRONGLY_TYPED") and request.calibration is None:
        return 1 << int(flags.STRONGLY_TYPED)
    return 1 << int(flags.EXPLICIT_BATCH)


def _configuration(trt: Any, builder: Any, network: Any, request: Request) -> Any:
    config, settings = builder.create_builder_config(), request.settings
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # without it layers lack their types and ONNX names
    if request.backend is Backend.RTX:
        config.num_compute_capabilities = 1
        major, minor = request.compute_capability
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{major}{minor}"), 0)
    for flag in _flags(trt, request):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib * _MIB)
    if settings.level is not None:
        config.builder_optimization_level = settings.level
    if settings.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if settings.timing_cache is not None:
        file = Path(settings.timing_cache)
        cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
        config.set_timing_cache(cache, False)  # of another device or version: refused, and measured again
    if request.profiles:
        config.add_optimization_profile(_profile(builder, network, request.profiles))
    return config


def _flags(trt: Any, request: Request) -> list[str]:
    settings = request.settings
    flags = {
        "VERSION_COMPATIBLE": settings.version_compatible,
        "REFIT": settings.refit,
        "WEIGHT_STREAMING": settings.weight_streaming,
    }
    if not _network_flags(trt, request) & _strong(trt):
        # Without strong typing INT8 must be allowed, for Q/DQ nodes as for a calibrator, and short floats too.
        short = {FloatType.FP32: "", FloatType.FP16: "FP16", FloatType.BF16: "BF16"}[request.float_type]
        flags |= {"INT8": request.quantized} | ({short: True} if short else {})
    return [name for name, wanted in flags.items() if wanted]


def _strong(trt: Any) -> int:
    flags = trt.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0


def _profile(builder: Any, network: Any, shapes: Any) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        if name in shapes:
            profile.set_shape(name, *shapes[name])
    return profile


def _calibrate(builder: Any, config: Any, request: Request, source: Any) -> None:
    config.int8_calibrator = source
    if request.profiles and request.calibration is not None and request.calibration.shapes:
        profile = builder.create_optimization_profile()
        for name, shape in request.calibration.shapes.items():
            profile.set_shape(name, shape, shape, shape)
        config.set_calibration_profile(profile)


def _save_timing_cache(config: Any, request: Request) -> None:
    if request.settings.timing_cache is not None:
        file = Path(request.settings.timing_cache)
        fresh = file.with_name(file.name + ".new")
        fresh.write_bytes(config.get_timing_cache().serialize())
        fresh.replace(file)


def _inspection(trt: Any, log: Any, plan: Any, request: Request) -> str:
    """The layers as the engine on the GPU has them."""
    if request.backend is Backend.RTX:
        return ""  # built without a GPU; the listing in the log tells
    runtime = trt.Runtime(log)
    if request.settings.version_compatible:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return ""
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _parser_refusal(problem: Any) -> Refusal:
    if not hasattr(problem, "node_name"):  # TensorRT 8.6 has only the number of the node
        return Refusal(text=problem.desc(), node=f"#{problem.node()}")
    return Refusal(text=problem.desc(), node=problem.node_name(), op=problem.node_operator())


def _logger(trt: Any) -> Any:
    """A logger that keeps errors, warnings and the layer listing, and drops the thousands of other lines."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.listing = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                if "catchCudaError" not in message:  # only says that there is no driver, which is no obstacle
                    self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                if "has Int64 binding" not in message:  # so it had in the model
                    self.warnings.append(message)
            elif message.startswith("Layers:"):
                self.listing += message

    return Logger()


def _error_recorder(trt: Any) -> Any:
    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self.texts: list[str] = []
            self.codes: list[Any] = []

        def report_error(self, code: Any, text: str) -> bool:
            self.codes.append(code)
            self.texts.append(text)
            return False  # the builder need not stop

        def num_errors(self) -> int:
            return len(self.texts)

        def get_error_code(self, index: int) -> Any:
            return self.codes[index]

        def get_error_desc(self, index: int) -> str:
            return self.texts[index]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self.texts.clear()
            self.codes.clear()

    return Recorder()


def _monitor(trt: Any, say: Callable[[Step], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._totals[phase_name] = num_steps
            say(Step(phase_name, 0, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            say(Step(phase_name, step + 1, self._totals.get(phase_name, 0)))
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            total = self._totals.pop(phase_name, 0)
            say(Step(phase_name, total, total))

    return Monitor()


def main() -> None:
    """Answers one request."""
    # The library prints to stdout at times; the messages must be alone there.
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
        lock = threading.Lock()  # the builder works on several threads

        def say(message: Step | Reply) -> None:
            with lock:
                answer.write(msgspec.json.encode(message) + b"\n")
                answer.flush()

        memory = None
        if request.calibration is not None and not request.calibration.cache:
            from qonnx.engine.device_memory import DeviceMemory

            memory = DeviceMemory()
        say(compile_model(importlib.import_module(MODULES[request.backend]), request, say, memory))


if __name__ == "__main__":
    main()
