"""The smallest network with a skip connection: Conv1 -> ReLU -> Conv2, added to Conv3 of the same input.

Weights are random (He et al., 2015) and seeded, the data synthetic: nothing is fetched. 16 and 32 channels keep it
above the size under which convolutions are better left in float.

Task: tell the direction of a moving grating, seen as 16 frames in 16 channels under noise, by a linear probe on the
mean of each output channel. Random filters with a ReLU between them carry it; Conv3 alone, being linear, does not.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models import probe
from models.common import Batch, Evaluation, Example, Run, torch_run

CLASSES = 10
CHANNELS = 16
SIZE = 24
NOISE = 1.5
BATCH = 50


class Residual(nn.Module):
    """Conv2(ReLU(Conv1(x))) + Conv3(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(CHANNELS, 32, 1)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map `image` [batch, 16, h, w] to `output` [batch, 32, h, w]."""
        return {"output": self.conv2(self.conv1(image).relu()) + self.conv3(image)}


def build() -> Example:
    """Return the network, the same one in every call, with a dynamic batch."""
    module, generator = Residual(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for conv in (module.conv1, module.conv2, module.conv3):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=generator)
            assert conv.bias is not None
            conv.bias.uniform_(-0.1, 0.1, generator=generator)
    images, _ = gratings(seed=3, count=2)
    return Example(module.eval(), {"image": torch.from_numpy(images)}, {"image": {0: "batch"}})


def calibration(batches: int = 8, batch_size: int = 8) -> Iterator[Batch]:
    """Yield `image` [batch_size, 16, 24, 24] of a seed that neither fits nor tests the probe."""
    images, _ = gratings(seed=0, count=batches * batch_size)
    return _batches(images, batch_size)


def evaluate(run: Run, *, train: int = 1000, test: int = 1000) -> Evaluation:
    """Measure the accuracy of a linear probe that was fitted in float.

    Args:
        run: The model under test; must return `output`.
        train: Images that the probe is fitted on.
        test: Other images that it is measured on.
    """

    def compute() -> probe.Probe:
        images, labels = gratings(seed=1, count=train)
        return probe.fit(_pooled(torch_run(build().module), images), labels)

    images, labels = gratings(seed=2, count=test)
    fitted = probe.kept(f"residual-{train}", [Path(__file__)], compute)
    return probe.accuracy(fitted, _pooled(run, images), labels)


def gratings(seed: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return `count` images [count, 16, 24, 24], float32, and the direction of each, 0 to 9."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % CLASSES
    angle = 2 * np.pi * labels / CLASSES
    wavelength, start = random.uniform(4, 6, count), random.uniform(0, 2 * np.pi, count)
    y, x = np.mgrid[:SIZE, :SIZE]
    across = x * np.cos(angle)[:, None, None] + y * np.sin(angle)[:, None, None]
    phase = 2 * np.pi * across / wavelength[:, None, None] + start[:, None, None]
    frame = 2 * np.pi * np.arange(CHANNELS) / CHANNELS
    clean = np.sin(phase[:, None] + frame[:, None, None]) * random.uniform(0.5, 1.5, (count, 1, 1, 1))
    return (clean + NOISE * random.standard_normal(clean.shape)).astype(np.float32), labels


def _pooled(run: Run, images: NDArray[np.float32]) -> NDArray[np.float32]:
    output = probe.features(run, _batches(images, BATCH), "output")
    return np.asarray(output.mean(axis=(2, 3)))


def _batches(images: NDArray[np.float32], batch_size: int) -> Iterator[Batch]:
    return ({"image": images[start : start + batch_size]} for start in range(0, len(images), batch_size))
