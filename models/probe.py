"""A linear probe: how much of a network's features survives quantization, as an accuracy.

A ridge classifier is fitted once on the features of the float network and kept in the cache, so that every quantized
form of the network is tested with the same head.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.common import Batch, Evaluation, Run
from models.fetch import cache_dir
from qonnx.errors import DataError

PENALTY = 1.0  # features are standardized, so one value serves every network; it is not tuned to any
KEPT = ("mean", "scale", "weight", "bias")


@dataclass(frozen=True, eq=False)
class Probe:
    """Class scores `(features - mean) / scale @ weight + bias`.

    Attributes:
        mean: [features]
        scale: [features]
        weight: [features, classes]
        bias: [classes]
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]

    def predict(self, features: NDArray[Any]) -> NDArray[np.int64]:
        """Return the class of each row of `features` [rows, features], and -1 where a row is not finite."""
        finite = np.isfinite(features).all(axis=1)
        z = (features[finite].astype(np.float64) - self.mean) / self.scale
        predicted = np.full(len(features), -1, dtype=np.int64)
        predicted[finite] = (z @ self.weight + self.bias).argmax(axis=1)
        return predicted


def fit(features: NDArray[Any], labels: NDArray[np.int64]) -> Probe:
    """Fit a ridge classifier on one-hot targets, in closed form.

    With standardized features Z and centred targets T of n rows: W = (Z'Z / n + PENALTY * I)^-1 Z'T / n.

    Args:
        features: [rows, features]
        labels: [rows], 0 to classes - 1.
    """
    x = features.astype(np.float64)
    mean, scale = (
        x.mean(axis=0),
        x.std(axis=0) + 1e-6,
    )  # a feature that never moves gets no say instead of a division by 0
    z = (x - mean) / scale
    targets = np.eye(int(labels.max()) + 1)[labels]
    bias = targets.mean(axis=0)
    covariance = z.T @ z / len(z) + PENALTY * np.eye(z.shape[1])
    return Probe(mean, scale, np.linalg.solve(covariance, z.T @ (targets - bias) / len(z)), bias)


def kept(name: str, sources: Iterable[Path], compute: Callable[[], Probe]) -> Probe:
    """Return the probe of an earlier call, or compute and keep it.

    Args:
        name: Start of the file name; tells settings apart.
        sources: Every file that the result follows from: weights, data, code. New contents, new probe.
        compute: Called when nothing is kept yet.
    """
    digest = hashlib.sha256()
    for source in (*sources, Path(__file__)):
        digest.update(hashlib.sha256(source.read_bytes()).digest())
    path = cache_dir() / "probes" / f"{name}-{digest.hexdigest()[:16]}.npz"
    if not path.exists():
        probe = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(
            f".{os.getpid()}.npz"
        )  # workers may compute the same probe at once; the last one stays
        np.savez(partial, **{key: getattr(probe, key) for key in KEPT})
        partial.replace(path)
    with np.load(path) as arrays:
        return Probe(*(arrays[key] for key in KEPT))


def features(run: Run, batches: Iterable[Batch], output: str) -> NDArray[Any]:
    """Run every batch and return the rows of one output.

    Raises:
        DataError: The run does not return `output`.
    """
    rows = []
    for batch in batches:
        outputs = run(batch)
        if output not in outputs:
            raise DataError(f"the run returned the outputs {sorted(outputs)}: '{output}' is needed to measure accuracy")
        rows.append(np.asarray(outputs[output]))
    return np.concatenate(rows)


def accuracy(probe: Probe, rows: NDArray[Any], labels: NDArray[np.int64]) -> Evaluation:
    """Measure a probe on features [rows, features] of labelled items; a row that is not finite counts as wrong.

    Raises:
        DataError: `rows` and `labels` differ in number.
    """
    if len(rows) != len(labels):
        raise DataError(f"the run returned {len(rows)} rows for {len(labels)} items: it must return one row per item")
    share = float(np.mean(probe.predict(rows) == labels))
    error = float(np.sqrt(share * (1 - share) / len(labels)))
    return Evaluation(metric="accuracy", value=100 * share, samples=len(labels), standard_error=100 * error)
