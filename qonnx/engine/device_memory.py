"""Arrays on the GPU, through NVIDIA's cuda-python."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qonnx.errors import DependencyError, EngineError


class DeviceMemory:
    """Arrays by name on the current GPU; memory is kept for the next array of that name, and freed at the end.

    Raises:
        DependencyError: cuda-python is not installed.
        EngineError: the GPU refuses.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise DependencyError("running on the GPU needs cuda-python: pip install cuda-python") from error
        self._cuda: Any = runtime
        self._held: dict[str, tuple[int, int]] = {}

    def reserve(self, name: str, size: int) -> int:
        """The address of at least `size` bytes."""
        address, held = self._held.get(name, (0, 0))
        if held < max(size, 1):
            if held:
                self.call("cudaFree", address)
            address = int(self.call("cudaMalloc", max(size, 1)))
            self._held[name] = address, max(size, 1)
        return address

    def put(self, name: str, array: npt.NDArray[Any]) -> int:
        """Copies an array to the GPU and returns its address there."""
        array = np.ascontiguousarray(array)
        address = self.reserve(name, array.nbytes)
        self.call("cudaMemcpy", address, array.ctypes.data, array.nbytes, self._kind("HostToDevice"))
        return address

    def get(self, name: str, into: npt.NDArray[Any]) -> None:
        """Copies from the GPU into a contiguous array; waits for what runs there."""
        self.call("cudaMemcpy", into.ctypes.data, self._held[name][0], into.nbytes, self._kind("DeviceToHost"))

    def call(self, name: str, *arguments: Any) -> Any:
        """One function of the CUDA runtime; its result, or None."""
        error, *results = getattr(self._cuda, name)(*arguments)
        if int(error) != 0:
            raise EngineError(f"{name} failed on the GPU: {getattr(error, 'name', error)}")
        return results[0] if results else None

    def close(self) -> None:
        """Frees everything."""
        while self._held:
            self.call("cudaFree", self._held.popitem()[1][0])

    def _kind(self, direction: str) -> Any:
        return getattr(self._cuda.cudaMemcpyKind, f"cudaMemcpy{direction}")
