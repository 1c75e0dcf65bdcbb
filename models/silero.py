"""Silero VAD: is somebody speaking, 31 times a second, MIT.

Network: a short-time Fourier transform written as a convolution, four convolutions, an LSTM; an ONNX file as its users
have it, which reads a whole recording at once.

Task: spoken prompts with silence of the same loudness of noise between them; the area under the curve of the frames
that lie in a prompt against those that lie in silence.
"""

from __future__ import annotations

import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.common import Batch, Evaluation, Run
from models.fetch import debian, wheel

RATE = 16_000
HOP = 512
CONTEXT = 64
PROMPTS = 6


def onnx_file() -> Path:
    """Inputs `input` [frames, 576], `h` and `c` [1, 1, 128]; outputs `speech_probs` [frames], `hn` and `cn`."""
    return wheel("silero-vad", "6.2.3") / "silero_vad" / "data" / "silero_vad_16k_sequence.onnx"


def calibration(batches: int = 8) -> Iterator[Batch]:
    """Yields recordings of prompts that `evaluate` does not use."""
    return (_batch(_recording(_prompts(0), seed=index)[0]) for index in range(batches))


def evaluate(run: Run, *, recordings: int = 12) -> Evaluation:
    """Measures the area under the curve over all frames."""
    scores: list[NDArray[np.float32]] = []
    labels: list[NDArray[np.bool_]] = []
    for index in range(recordings):
        audio, speech = _recording(_prompts(1), seed=1000 + index)
        scores.append(run(_batch(audio))["speech_probs"].reshape(-1))
        labels.append(speech)
    area, error = _area(np.concatenate(scores), np.concatenate(labels))
    return Evaluation("frame AUC", 100 * area, sum(map(len, labels)), 100 * error)


def _prompts(half: int) -> list[Path]:
    """Every other of the spoken prompts."""
    folder = debian("asterisk-core-sounds-en-wav") / "usr" / "share" / "asterisk" / "sounds"
    files = sorted(path for path in folder.rglob("*.wav") if path.stat().st_size > 16_000)
    return [path for path in files if "silence" not in path.parts][half::2]


def _recording(prompts: list[Path], seed: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Prompts with a second of silence around each, under noise, and which frames are speech."""
    random = np.random.default_rng(seed)
    parts: list[NDArray[np.float32]] = [np.zeros(RATE, np.float32)]
    spoken: list[NDArray[np.bool_]] = [np.zeros(RATE, bool)]
    for path in random.choice(np.array(prompts, object), PROMPTS, replace=False):
        audio = _read(path)
        loud = np.convolve(np.abs(audio), np.ones(800) / 800, "same") > 0.1 * np.abs(audio).mean()
        parts += [audio, np.zeros(RATE, np.float32)]
        spoken += [loud, np.zeros(RATE, bool)]
    audio = np.concatenate(parts)
    audio = audio + random.normal(0, 0.02, audio.shape).astype(np.float32)
    frames = len(audio) // HOP
    share = np.concatenate(spoken)[: frames * HOP].reshape(frames, HOP).mean(axis=1)
    return audio[: frames * HOP], share > 0.5


def _read(path: Path) -> NDArray[np.float32]:
    """A recording at 16 kHz, the largest magnitude 0.5."""
    with wave.open(str(path)) as file:
        rate = file.getframerate()
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32)
    positions = np.arange(0, len(samples) - 1, rate / RATE)
    audio = np.interp(positions, np.arange(len(samples)), samples)
    return (0.5 * audio / max(float(np.abs(audio).max()), 1.0)).astype(np.float32)


def _batch(audio: NDArray[np.float32]) -> Batch:
    """Frames of 512 samples, each behind the last 64 of the one before."""
    padded = np.concatenate([np.zeros(CONTEXT, np.float32), audio])
    frames = np.lib.stride_tricks.sliding_window_view(padded, CONTEXT + HOP)[::HOP]
    state = np.zeros((1, 1, 128), np.float32)
    return {"input": np.ascontiguousarray(frames), "h": state, "c": state}


def _area(scores: NDArray[np.float32], labels: NDArray[np.bool_]) -> tuple[float, float]:
    """Area under the curve and its standard error (Hanley and McNeil, 1982); ties count half."""
    order = np.sort(scores)
    ranks = (np.searchsorted(order, scores, "left") + np.searchsorted(order, scores, "right") + 1) / 2
    positive, negative = int(labels.sum()), int((~labels).sum())
    area = (ranks[labels].sum() - positive * (positive + 1) / 2) / (positive * negative)
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (positive - 1) * (one - area**2) + (negative - 1) * (two - area**2)
    return float(area), float(np.sqrt(variance / (positive * negative)))
