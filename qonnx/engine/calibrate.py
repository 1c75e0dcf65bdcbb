"""Ranges for a graph without Q/DQ nodes, which TensorRT up to 10 takes from a calibrator: checked before any work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qonnx.data import batches
from qonnx.engine.backends import Compiler
from qonnx.engine.calibration_cache import Algorithm, header, loads, version_number
from qonnx.engine.protocol import Calibration
from qonnx.engine.settings import Calibrator
from qonnx.errors import DataError, EngineError
from qonnx.graph import all_graphs
from qonnx.runtime import input_specs

_READERS = {
    Algorithm.ENTROPY_2: Calibrator.ENTROPY_2,
    Algorithm.ENTROPY: Calibrator.ENTROPY,
    Algorithm.MINMAX: Calibrator.MINMAX,
}


def holds_qdq(model: ir.Model) -> bool:
    """Whether any node of the model quantizes or dequantizes."""
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for graph in all_graphs(model) for node in graph)


def from_cache(path: str | os.PathLike[str], compiler: Compiler) -> Calibration:
    """Answers from a calibration cache, by the calibrator that its first line names.

    Raises:
        DataError: it cannot be read, or TensorRT would pass it over: it was written for another version.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        version, algorithm = header(text)
        loads(text)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise DataError(f"{path}: cannot be read ({why}); give a calibration cache of TensorRT") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    installed = ".".join(map(str, (*compiler.version, 0, 0)[:3]))
    if version != version_number(installed):
        raise DataError(
            f"{path}: is for version number {version}, which TensorRT {installed} does not read; "
            f"write it with `qonnx calibrate --cache --tensorrt-version {installed}`"
        )
    return Calibration(_READERS[algorithm], cache=text)


def from_batches(model: ir.Model, data: Any, calibrator: Calibrator, folder: Path) -> Calibration:
    """Lets TensorRT calibrate on the user's batches.

    Args:
        model: whose inputs are fed.
        data: see `qonnx.data.batches`.
        calibrator: the class of calibrator.
        folder: where to put the batches for the process that calibrates.

    Raises:
        DataError: there is no batch, or they differ in shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    files = []
    for number, batch in enumerate(batches(data, input_specs(model))):
        found = {name: array.shape for name, array in batch.items()}
        shapes = shapes or found
        if found != shapes:
            raise DataError(f"batch {number + 1} has other shapes than the first; TensorRT calibrates on one shape")
        file = folder / f"batch{number}.npz"
        np.savez(file, allow_pickle=False, **batch)
        files.append(str(file))
    return Calibration(calibrator, batches=tuple(files), shapes=shapes)


def check_no_qdq(model: ir.Model) -> None:
    """Refuses to calibrate a graph that carries its ranges.

    Raises:
        EngineError: it holds Q/DQ nodes.
    """
    if holds_qdq(model):
        raise EngineError("the graph holds Q/DQ nodes, and takes no other ranges; leave out the calibrator")
