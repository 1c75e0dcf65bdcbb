"""Whether this machine has a GPU, asked of the driver itself.

TensorRT's own answer will not do: without a driver it hands out objects whose first use ends the process.
"""

from __future__ import annotations

import ctypes

# CUdevice_attribute in cuda.h.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


def compute_capability() -> tuple[int, int] | None:
    """Of the first GPU that CUDA shows, such as (8, 0); None without a GPU or a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, figures = ctypes.c_int(), []
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        figure = ctypes.c_int()
        if cuda.cuDeviceGetAttribute(ctypes.byref(figure), attribute, device) != 0:
            return None
        figures.append(figure.value)
    return figures[0], figures[1]
