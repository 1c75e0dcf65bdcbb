"""The process that calls the compiler: `python -m qonnx.engine.compile_child < request.json > reply.json`.

It is a process of its own because malformed graphs can crash the library, and a crash must not take the caller along.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from qonnx.engine.protocol import Refusal, Reply, Request


def compile_model(request: Request) -> Reply:
    """Parses and compiles with TensorRT-RTX, which needs neither a GPU nor a driver; writes the plan file."""
    import tensorrt_rtx as trt

    start = time.perf_counter()
    log = _recorder(trt)
    builder = trt.Builder(log)
    # Strong typing: every tensor has the type that the ONNX graph gives it, so that Q/DQ alone decide what is INT8.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    refusals: tuple[Refusal, ...] = ()
    if parser.parse_from_file(request.model):
        plan = builder.build_serialized_network(network, _configuration(trt, builder, network, request))
        if plan is None:
            refusals = tuple(Refusal(text=text) for text in log.errors) or (Refusal(text="no reason given"),)
        else:
            Path(request.plan).write_bytes(plan)
    else:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        refusals = tuple(Refusal(text=e.desc(), node=e.node_name(), op=e.node_operator()) for e in errors)
        refusals = refusals or (Refusal(text="the parser cannot read this file"),)
    return Reply(
        compiler=f"tensorrt-rtx {trt.__version__}",
        seconds=time.perf_counter() - start,
        listing=log.listing,
        warnings=tuple(dict.fromkeys(log.warnings)),
        refusals=refusals,
    )


def _configuration(trt: Any, builder: Any, network: Any, request: Request) -> Any:
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    major, minor = request.compute_capability
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{major}{minor}"), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # without it the listing lacks types and ONNX names
    if request.profiles:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            name = network.get_input(index).name
            if name in request.profiles:
                profile.set_shape(name, *request.profiles[name])
        config.add_optimization_profile(profile)
    return config


def _recorder(trt: Any) -> Any:
    """A logger that keeps errors, warnings and the layer listing, and drops the thousands of other lines."""

    class Recorder(trt.ILogger):  # type: ignore[misc]
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
                self.warnings.append(message)
            elif message.startswith("Layers:"):
                self.listing += message

    return Recorder()


def main() -> None:
    """Answers one request."""
    # The library prints to stdout at times; the reply must be alone there.
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
        answer.write(msgspec.json.encode(compile_model(request)))


if __name__ == "__main__":
    main()
