"""How fast an engine is on this machine's GPU, beside the float model, and how close it comes to ONNX Runtime."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from qonnx.comparison import Difference, difference
from qonnx.data import batches
from qonnx.engine import gpu
from qonnx.engine.backends import find_compiler
from qonnx.engine.build import build_engine, member
from qonnx.engine.execution import Array, RunReply, RunRequest
from qonnx.engine.profiles import Range
from qonnx.engine.settings import Backend, FloatType, Settings
from qonnx.errors import EngineError, TargetError
from qonnx.runtime import session
from qonnx.targets import target as target_named

CHILD = (sys.executable, "-P", "-m", "qonnx.engine.execution")


class Timing(msgspec.Struct, frozen=True):
    """How fast an engine runs one batch.

    Attributes:
        float_type: what it computes in where it does not compute on integers.
        p50: half of the runs take so many milliseconds at most; inputs and outputs stay on the GPU.
        p90, p95, p99: the same for 90 %, 95 % and 99 % of them.
        samples_per_second: with one run behind the other.
        bytes: size of the engine.
    """

    float_type: FloatType
    p50: float
    p90: float
    p95: float
    p99: float
    samples_per_second: float
    bytes: int


class BenchReport(msgspec.Struct, frozen=True):
    """What was measured.

    Attributes:
        compiler: name and version.
        compute_capability: of the GPU.
        shapes: of the batch that was timed, by the name of the input.
        quantized: the engine of the quantized model.
        reference: the engine of the float model, if one was given.
        against_onnxruntime: outputs of the first engine beside ONNX Runtime's, of the same file.
        against_float: the same beside the float model in ONNX Runtime.
        batches: how many were compared.
    """

    compiler: str
    compute_capability: tuple[int, int]
    shapes: dict[str, tuple[int, ...]]
    quantized: Timing
    reference: Timing | None
    against_onnxruntime: tuple[Difference, ...]
    against_float: tuple[Difference, ...]
    batches: int

    @property
    def speedup(self) -> float | None:
        """How much faster than the float engine, by the median."""
        return None if self.reference is None else self.reference.p50 / self.quantized.p50


def bench(
    model: str | os.PathLike[str],
    data: Any,
    *,
    float_model: str | os.PathLike[str] | None = None,
    target: str = "a800",
    backend: Backend | str | None = None,
    dims: Mapping[str, Range] | None = None,
    float_type: FloatType | str = FloatType.FP16,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    runs: int = 200,
    max_batches: int = 8,
    timeout: float = 600,
) -> BenchReport:
    """Builds engines, times them on the first batch and compares their outputs on all.

    Args:
        model: the quantized model.
        data: see `qonnx.data.batches`.
        float_model: the model that it was made from, to compare with.
        target: the device; this machine must have it.
        backend: the compiler, see `qonnx.engine.build_engine`.
        dims: sizes that the engines accept, see there; taken from the data where not given.
        float_type: what is not on INT8 computes in this type, and so does the float model.
        settings: of the builder.
        runs: how often the batch is run.
        max_batches: use at most this many batches.
        timeout: seconds for each engine to build, and to run.

    Raises:
        TargetError: this machine has no GPU, or another one.
        QonnxError: see `qonnx.engine.build_engine`.
    """
    if gpu.compute_capability() is None:
        raise TargetError(
            "this machine has no GPU or no driver, so that nothing can be measured; "
            f"`qonnx roofline {float_model or 'FLOAT.onnx'} --device {target}` predicts the least time"
        )
    compiler = find_compiler(None if backend is None else member(Backend, backend, "backend"), target_named(target))
    short = member(FloatType, float_type, "float_type")
    reference = session(model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fed = list(batches(data, reference.inputs, max_batches=max_batches))
        files = [str(folder / f"batch{number}.npz") for number in range(len(fed))]
        for file, batch in zip(files, fed, strict=True):
            np.savez(file, allow_pickle=False, **batch)

        def measure(source: str | os.PathLike[str], name: str) -> tuple[Timing, list[dict[str, Array]], Any]:
            report = build_engine(
                source,
                folder / f"{name}.plan",
                target=target,
                backend=compiler.backend,
                dims=dims,
                data=fed,
                float_type=short,
                settings=settings,
                timeout=timeout,
            )
            (folder / name).mkdir()
            request = RunRequest(compiler.backend, report.plan, tuple(files), str(folder / name), runs=runs)
            reply = _run(request, os.fspath(source), timeout)
            samples = next((array.shape[0] for array in fed[0].values() if array.ndim), 1)
            found = [_loaded(folder / name / f"{number}.npz") for number in range(len(fed))]
            return _timing(reply, short, samples, report.bytes), found, report

        quantized, outputs, report = measure(model, "quantized")
        other = None if float_model is None else measure(float_model, "float")[0]
        original = [] if float_model is None else [session(float_model).run(batch) for batch in fed]
        return BenchReport(
            compiler=report.compiler,
            compute_capability=report.compute_capability,
            shapes={name: array.shape for name, array in fed[0].items()},
            quantized=quantized,
            reference=other,
            against_onnxruntime=_differences([reference.run(batch) for batch in fed], outputs),
            against_float=_differences(original, outputs),
            batches=len(fed),
        )


def _run(request: RunRequest, model: str, timeout: float) -> RunReply:
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
        raise EngineError(f"{model}: the engine was stopped after {timeout:g} s; give it a longer timeout") from None
    if child.returncode or not child.stdout:
        last = (child.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise EngineError(f"{model}: the engine does not run ({last}); see whether nvidia-smi lists the GPU")
    reply = msgspec.json.decode(child.stdout, type=RunReply)
    if reply.error:
        raise EngineError(f"{model}: {reply.error}")
    return reply


def _timing(reply: RunReply, float_type: FloatType, samples: int, size: int) -> Timing:
    """Percentiles of single runs, and the rate of all runs together.

    >>> timing = _timing(RunReply(tuple(range(1, 101)), together=2000), FloatType.FP16, samples=8, size=10)
    >>> timing.p50, timing.p99, timing.samples_per_second
    (50.5, 99.01, 400.0)
    """
    p50, p90, p95, p99 = (round(float(each), 6) for each in np.percentile(reply.milliseconds, (50, 90, 95, 99)))
    rate = samples * len(reply.milliseconds) / (reply.together / 1e3)
    return Timing(float_type, p50, p90, p95, p99, rate, size)


def _loaded(file: Path) -> dict[str, Array]:
    with np.load(file) as outputs:
        return dict(outputs)


def _differences(
    expected: Sequence[Mapping[str, Array]], found: Sequence[Mapping[str, Array]]
) -> tuple[Difference, ...]:
    """Of each output, over all batches."""
    names = expected[0] if expected else ()
    return tuple(
        difference(
            name,
            np.concatenate([np.ravel(batch[name]) for batch in expected]),
            np.concatenate([np.ravel(batch[name]) for batch in found]),
        )
        for name in names
    )
