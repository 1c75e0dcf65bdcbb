"""What calibration costs, beside ONNX Runtime's own: time as a multiple of the bare forward pass, and peak memory.

    python -m benchmarks.calibration [minilm] [mobilenet] [--samples 32 256] [--repeats 3] [--peers-at-256]

MiniLM reads 128 tokens and MobileNetV2 224 pixels, in batches of 8. Every method runs in a process of its own, so that
the peak is its own. Seconds are those of the quickest of all repeats. What a method costs is told by forward passes:
each run is divided by a forward pass that was measured just before it, since the speed of a machine that others use too
changes by the minute, and the median of these ratios is given; it is not the ratio of the seconds. Loading the model
and the choice of thresholds are apart: they do not grow with the data, and in ONNX Runtime's entropy calibrator they
are the larger part.

ONNX Runtime's histogram calibrators keep every activation, and choose thresholds for minutes. They are run once, and
beyond 32 samples with --peers-at-256 only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

MODELS: dict[str, dict[str, int]] = {"minilm": {}, "mobilenet": {"size": 224}}
BATCH = 8
TOKENS = 128

# Beyond these a method is given up: other people use the machine too.
TIMEOUT = 600
MEMORY = 14 * 2**30

# More samples than this are too many for calibrators that keep every activation.
PEERS_LIMIT = 32

Feeds = dict[str, npt.NDArray[Any]]


class Cost(NamedTuple):
    """What one method took, in seconds and bytes: over the batches, and for everything before and after.

    `passes` is the time over the batches divided by that of the forward pass before it, one per repeat.
    """

    batches: float
    rest: float
    peak: int
    passes: tuple[float, ...] = ()


def forward(model: Path, data: Path) -> tuple[float, float]:
    """The model as it is, in one session on all cores."""
    from qonnx.runtime import session

    start = time.perf_counter()
    runner = session(model)
    ready = time.perf_counter()
    for feeds in _read(data):
        runner.run(feeds)
    return time.perf_counter() - ready, ready - start


def returned(model: Path, data: Path) -> tuple[float, float]:
    """The prepared model in such a session; what is calibrated is returned, and dropped."""
    from qonnx.graph import load
    from qonnx.runtime import session

    start = time.perf_counter()
    prepared = load(model)
    values, _ = _observed(prepared)
    known = {value.name: value for node in prepared.graph for value in node.outputs}
    prepared.graph.outputs[:] = [known[name] for name in values if name in known]
    runner = session(prepared)
    ready = time.perf_counter()
    for feeds in _read(data):
        runner.run(feeds)
    return time.perf_counter() - ready, ready - start


def extremes(model: Path, data: Path) -> tuple[float, float]:
    """Our pass without distributions, and min-max ranges."""
    from qonnx.calibrators import MinMax

    return _ours(model, data, False, MinMax())


def everything(model: Path, data: Path) -> tuple[float, float]:
    """Our pass as `qonnx.calibrate` makes it, and the ranges of every calibrator that `auto` tries."""
    from qonnx.calibrators import Auto

    return _ours(model, data, True, *Auto().candidates)


def without_numba(model: Path, data: Path) -> tuple[float, float]:
    """The same where numba is not installed."""
    sys.modules["numba"] = None  # type: ignore[assignment]  # what the import system takes for absent
    return everything(model, data)


def _ours(model: Path, data: Path, distributions: bool, *calibrators: Any) -> tuple[float, float]:
    from qonnx.graph import load
    from qonnx.numerics import Dtype
    from qonnx.observation import Progress, observe
    from qonnx.ranges import calibrated

    start, seen = time.perf_counter(), list[Progress]()
    prepared = load(model)
    values, wanted = _observed(prepared)
    found = observe(prepared, values, _read(data), distributions=wanted if distributions else (), progress=seen.append)
    for calibrator in calibrators:
        calibrated(wanted, found, calibrator, Dtype.INT8, symmetric=True)
    return seen[-1].seconds, time.perf_counter() - start - seen[-1].seconds


def _observed(model: Any) -> tuple[list[str], list[str]]:
    """Prepares a model; what is observed of it, and what of that is counted."""
    from qonnx.passes.prepare import prepare
    from qonnx.placement import candidates, place
    from qonnx.recipe import Recipe
    from qonnx.targets import target

    prepare(model)
    placement = place(model, Recipe(), target("a800"))
    values = candidates(placement)
    return list(values), [value for value in values if value not in placement.probabilities]


def ort_minmax(model: Path, data: Path) -> tuple[float, float]:
    """ONNX Runtime's default calibrator."""
    return _peer(model, data, "MinMax")


def ort_entropy(model: Path, data: Path) -> tuple[float, float]:
    """The canonical number of bins; with the default of 128, nothing is ever clipped."""
    return _peer(model, data, "Entropy", num_bins=2048)


def ort_percentile(model: Path, data: Path) -> tuple[float, float]:
    """With the defaults: 2048 bins, 99.999 %."""
    return _peer(model, data, "Percentile")


def _peer(model: Path, data: Path, method: str, **options: int) -> tuple[float, float]:
    """One of ONNX Runtime's calibrators, on the operators that its `quantize_static` calibrates by default."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = _read(data)

        def get_next(self) -> Feeds | None:
            return next(self._batches, None)

    start = time.perf_counter()
    calibrator = create_calibrator(
        str(model),
        sorted({*QDQRegistry, *QLinearOpsRegistry}),
        augmented_model_path=str(model.parent / "augmented.onnx"),
        calibrate_method=CalibrationMethod[method],
        use_external_data_format=True,
        extra_options=options,
    )
    ready = time.perf_counter()
    calibrator.collect_data(Reader())
    collected = time.perf_counter()
    calibrator.compute_data()
    return collected - ready, ready - start + time.perf_counter() - collected


METHODS: dict[str, Callable[[Path, Path], tuple[float, float]]] = {
    "forward pass": forward,
    "activations returned": returned,
    "qonnx: min-max only": extremes,
    "qonnx: everything": everything,
    "qonnx: everything, NumPy": without_numba,
    "ONNX Runtime: min-max": ort_minmax,
    "ONNX Runtime: entropy": ort_entropy,
    "ONNX Runtime: percentile": ort_percentile,
}
KEEP_EVERYTHING = ("ONNX Runtime: entropy", "ONNX Runtime: percentile")


def _read(data: Path) -> Iterator[Feeds]:
    """One batch in memory at a time."""
    for file in sorted(data.iterdir()):
        with np.load(file) as archive:
            yield dict(archive)


def child(method: str, model: str, data: str) -> None:
    """Runs one method and prints what it took as JSON."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    batches, rest = METHODS[method](Path(model), Path(data))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps((batches, rest, peak)))


def run(method: str, model: Path, data: Path) -> Cost | str:
    """What one method took, or why it did not come to an end."""
    try:
        done = _process("--child", method, str(model), str(data))
    except subprocess.TimeoutExpired:
        return f"more than {TIMEOUT // 60} min"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        memory = "MemoryError" in done.stderr or "bad_alloc" in done.stderr or not lines
        return f"more than {MEMORY >> 30} GiB" if memory else lines[-1]
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def _process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.calibration", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)


def files(name: str, samples: str, model: str, data: str) -> None:
    """Writes the float model to a file, and the batches into a folder."""
    import qonnx

    module = importlib.import_module(f"models.{name}")
    if not Path(model).exists():
        example = module.build(**MODELS[name])
        qonnx.export(example.module, example.args, model, dynamic_shapes=example.dynamic_shapes)
    Path(data).mkdir()
    batches = module.calibration(batches=int(samples) // BATCH, batch_size=BATCH, **MODELS[name])
    for index, batch in enumerate(batches):
        padded = {key: _padded(array) for key, array in batch.items()}
        np.savez(Path(data) / f"{index:05}.npz", allow_pickle=False, **padded)


def _padded(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Tokens to full length: ONNX Runtime's histograms refuse batches of different lengths."""
    return np.pad(array, ((0, 0), (0, TOKENS - array.shape[1]))) if array.ndim == 2 else array


def measure(name: str, samples: int, folder: Path, repeats: int, peers: bool) -> dict[str, Cost | str]:
    """Every method on one model and one number of samples."""
    model, data = folder / f"{name}.onnx", folder / f"{name}-{samples}"
    # In a process of its own too: what this one holds would count in the peak of every process that it starts.
    _process("--files", name, str(samples), str(model), str(data)).check_returncode()
    costs: dict[str, Cost | str] = {}
    for repeat in range(repeats):
        for method in list(METHODS)[1:]:
            if method in KEEP_EVERYTHING and repeat:
                continue
            if method in KEEP_EVERYTHING and samples > PEERS_LIMIT and not peers:
                costs[method] = "not run: it keeps every activation in memory"
                continue
            bare, cost = run("forward pass", model, data), run(method, model, data)
            if isinstance(bare, Cost) and isinstance(cost, Cost):
                bare, cost = bare._replace(passes=(1.0,)), cost._replace(passes=(cost.batches / bare.batches,))
            costs["forward pass"] = _better(costs.get("forward pass"), bare)
            costs[method] = _better(costs.get(method), cost)
    return costs


def _better(left: Cost | str | None, right: Cost | str) -> Cost | str:
    """The quicker of two runs in each part, the higher peak, and the forward passes of both."""
    if isinstance(left, str) or isinstance(right, str) or left is None:
        return left if isinstance(left, str) else right
    quicker = min(left.batches, right.batches), min(left.rest, right.rest)
    return Cost(*quicker, max(left.peak, right.peak), left.passes + right.passes)


def table(title: str, costs: Mapping[str, Cost | str]) -> Table:
    found = Table("method", "batches", "forward passes", "the rest", "peak memory", title=title, caption_justify="left")
    for method in METHODS:
        cost = costs[method]
        found.add_row(method, *(_columns(cost) if isinstance(cost, Cost) else ["-"]))
        if isinstance(cost, str):
            found.caption = f"{found.caption or ''}{method}: {cost}\n"
    return found


def growth(method: str, few: Cost | str, many: Cost | str) -> str:
    """What more samples do to the peak memory of one method."""
    if isinstance(few, str) or isinstance(many, str):
        return f"{method}: not measured"
    return f"{method}: {100 * (many.peak / few.peak - 1):+.1f} %"


def _columns(cost: Cost) -> list[str]:
    return [
        f"{cost.batches:.2f} s",
        f"{statistics.median(cost.passes):.2f}",
        f"{cost.rest:.1f} s",
        f"{cost.peak / 2**20:.0f} MiB",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; both if none is given")
    parser.add_argument("--samples", nargs="+", type=int, default=[32, 256], help=f"multiples of {BATCH}")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each method")
    parser.add_argument("--peers-at-256", action="store_true", help="also run what may take hours or all memory")
    chosen = parser.parse_args()
    if unknown := set(chosen.models) - set(MODELS):
        parser.error(f"no model {min(unknown)!r}; there are {', '.join(MODELS)}")
    if odd := [samples for samples in chosen.samples if samples < BATCH or samples % BATCH]:
        parser.error(f"--samples {odd[0]}: not a multiple of {BATCH}")
    console = Console(highlight=False, width=110)
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen.models or MODELS:
            by_samples = {}
            for samples in chosen.samples:
                costs = measure(name, samples, Path(folder), chosen.repeats, chosen.peers_at_256)
                by_samples[samples] = costs
                console.print(table(f"{name}, {samples} samples", costs))
            few, many = min(by_samples), max(by_samples)
            if few < many:
                console.print(f"peak memory from {few} to {many} samples:")
                for method in METHODS:
                    console.print(f"  {growth(method, by_samples[few][method], by_samples[many][method])}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    elif sys.argv[1:2] == ["--files"]:
        files(*sys.argv[2:])
    else:
        main()
