"""The process that runs an engine on the GPU: `python -m qonnx.engine.execution < request.json`.

A process of its own, because TensorRT ends the process where a driver or the memory fails it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from qonnx.engine.settings import Backend
from qonnx.errors import EngineError

Array = npt.NDArray[Any]

MODULES = {Backend.RTX: "tensorrt_rtx", Backend.TENSORRT: "tensorrt"}

# By the names of TensorRT's types; graphs keep their inputs and outputs in these.
_DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}


class RunRequest(msgspec.Struct, frozen=True):
    """What to run.

    Attributes:
        backend: whose runtime loads the engine.
        plan: the engine file.
        batches: `.npz` files with one batch each; the first one is timed.
        outputs: the folder for the results of each batch, `0.npz`, `1.npz` ...
        warmup: runs before the clock starts.
        runs: runs that are timed one by one, and once more back to back.
    """

    backend: Backend
    plan: str
    batches: tuple[str, ...]
    outputs: str
    warmup: int = 20
    runs: int = 200


class RunReply(msgspec.Struct, frozen=True):
    """How long it took.

    Attributes:
        milliseconds: of each run alone, from the first kernel to the end of the last one.
        together: of all runs back to back.
        error: why there are no figures, or "".
    """

    milliseconds: tuple[float, ...] = ()
    together: float = 0.0
    error: str = ""


class Device(Protocol):
    """The CUDA runtime; `qonnx.engine.device_memory.DeviceMemory` is one."""

    def put(self, name: str, array: Array) -> int:
        """Copies an array to the GPU and returns its address."""

    def reserve(self, name: str, size: int) -> int:
        """The address of memory for a result."""

    def get(self, name: str, into: Array) -> None:
        """Copies a result from the GPU."""

    def call(self, name: str, *arguments: Any) -> Any:
        """One function of the CUDA runtime; its result, or None."""


class Execution:
    """An engine with its inputs and outputs on the GPU.

    Raises:
        EngineError: the engine does not load here, or does not take the shapes of a batch.
    """

    def __init__(self, trt: Any, plan: bytes, device: Device) -> None:
        self._trt, self._device = trt, device
        self._log = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError("the engine does not load on this GPU; build it here")
        self._context = self._engine.create_execution_context()
        self._names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._stream = device.call("cudaStreamCreate")

    def prepare(self, batch: Mapping[str, Array]) -> None:
        """Copies a batch to the GPU and reserves memory for its results."""
        inputs = [name for name in self._names if self._is_input(name)]
        for name in inputs:
            array = np.ascontiguousarray(batch[name].astype(self._dtype(name)))
            if not self._context.set_input_shape(name, tuple(array.shape)):
                raise EngineError(f"input {name!r}: the engine takes no shape {array.shape}; build it for such sizes")
            self._context.set_tensor_address(name, self._device.put(name, array))
        for name in self._names:
            if name not in inputs:
                size = int(np.prod(self._shape(name))) * np.dtype(self._dtype(name)).itemsize
                self._context.set_tensor_address(name, self._device.reserve(name, size))

    def results(self) -> dict[str, Array]:
        """Runs the prepared batch and fetches what comes out."""
        self._enqueue()
        self._device.call("cudaStreamSynchronize", self._stream)
        found = {}
        for name in self._names:
            if not self._is_input(name):
                found[name] = np.empty(self._shape(name), self._dtype(name))
                self._device.get(name, found[name])
        return found

    def time(self, runs: int, together: int = 1) -> list[float]:
        """Milliseconds of each of `runs` times `together` runs in a row, by the GPU's own clock."""
        start, end = self._device.call("cudaEventCreate"), self._device.call("cudaEventCreate")
        measured = []
        for _ in range(runs):
            self._device.call("cudaEventRecord", start, self._stream)
            for _ in range(together):
                self._enqueue()
            self._device.call("cudaEventRecord", end, self._stream)
            self._device.call("cudaEventSynchronize", end)
            measured.append(float(self._device.call("cudaEventElapsedTime", start, end)))
        return measured

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise EngineError("the engine does not run on this batch")

    def _is_input(self, name: str) -> bool:
        return bool(self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT)

    def _dtype(self, name: str) -> Any:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise EngineError(f"tensor {name!r} is {kind}, which numpy does not have; keep inputs and outputs in float")
        return _DTYPES[kind]

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise EngineError(f"the shape of output {name!r} depends on the data, which cannot be measured here")
        return shape


def run(trt: Any, request: RunRequest, device: Device) -> RunReply:
    """Runs every batch once for its results, and the first one many times for the time."""
    try:
        execution = Execution(trt, Path(request.plan).read_bytes(), device)
        for number, file in enumerate(request.batches):
            with np.load(file) as batch:
                execution.prepare(dict(batch))
            np.savez(Path(request.outputs) / f"{number}.npz", allow_pickle=False, **execution.results())
        with np.load(request.batches[0]) as batch:
            execution.prepare(dict(batch))
        execution.time(request.warmup)
        alone = execution.time(request.runs)
        (together,) = execution.time(1, request.runs)
    except EngineError as error:
        return RunReply(error=str(error))
    return RunReply(tuple(alone), together)


def main() -> None:
    """Answers one request."""
    from qonnx.engine.device_memory import DeviceMemory

    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=RunRequest)
        answer.write(
            msgspec.json.encode(run(importlib.import_module(MODULES[request.backend]), request, DeviceMemory()))
        )


if __name__ == "__main__":
    main()
