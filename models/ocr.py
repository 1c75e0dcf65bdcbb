"""PP-OCRv4's text recogniser on rendered lines.

Network: convolutions, attention and a CTC head, Apache-2.0, an ONNX file as its users have it: opset 12, weights in
Constant nodes, BatchNormalization not folded, LayerNormalization spelled out, dynamic batch and width.

Task: characters of rendered lines that are read correctly. The text is known because we render it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from models.common import Batch, Evaluation, Run
from models.fetch import debian, wheel
from qonnx.errors import DependencyError

HEIGHT = 48
WIDTH = 320
BATCH = 8

# Calibration and test share neither font nor text.
CALIBRATION_FONTS = ("DejaVuSerif.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf")
TEST_FONTS = ("DejaVuSans.ttf", "DejaVuSerif-Bold.ttf")

_SYLLABLES = (
    "ba",
    "co",
    "den",
    "fi",
    "gor",
    "hu",
    "jin",
    "ka",
    "lo",
    "mer",
    "nu",
    "pi",
    "qua",
    "ros",
    "sta",
    "tu",
    "vel",
    "ing",
)


def onnx_file() -> Path:
    """The recogniser: input `x` [batch, 3, 48, width], output [batch, steps, classes], softmax over the characters."""
    return wheel("rapidocr-onnxruntime", "1.4.4") / "rapidocr_onnxruntime" / "models" / "ch_PP-OCRv4_rec_infer.onnx"


def calibration(batches: int = 8, batch_size: int = BATCH) -> Iterator[Batch]:
    """Yields rendered lines, float32 [batch_size, 3, 48, 320], in fonts and words that `evaluate` does not use."""
    lines = text_lines(seed=1, count=batches * batch_size)
    images = [image for _, image in _rendered(lines, CALIBRATION_FONTS, seed=3)]
    return ({"x": np.stack(images[start : start + batch_size])} for start in range(0, len(images), batch_size))


def evaluate(run: Run, *, lines: int = 120) -> Evaluation:
    """Measures the share of characters read correctly: 1 - edit distance / length, over all lines.

    Args:
        run: the model under test.
        lines: how many lines to read.
    """
    characters = _alphabet()
    texts, images = zip(*_rendered(text_lines(seed=2, count=lines), TEST_FONTS, seed=4), strict=True)
    read: list[str] = []
    for start in range(0, lines, BATCH):
        (scores,) = run({"x": np.stack(images[start : start + BATCH])}).values()
        read += [_decode(row, characters) for row in scores]
    wrong = [_distance(text, found) for text, found in zip(texts, read, strict=True)]
    length = sum(map(len, texts))
    share = max(0.0, 1 - sum(wrong) / length)
    error = 100 * float(np.sqrt(share * (1 - share) / length))
    return Evaluation(metric="characters", value=100 * share, samples=length, standard_error=error)


def text_lines(seed: int, count: int) -> list[str]:
    """Lines of two to four made-up words or numbers."""
    random = np.random.default_rng(seed)

    def word() -> str:
        if random.random() < 0.25:
            return str(random.integers(10, 99999))
        text = "".join(random.choice(_SYLLABLES, random.integers(1, 4)))
        return text.capitalize() if random.random() < 0.3 else text

    return [" ".join(word() for _ in range(random.integers(2, 5)))[:28] for _ in range(count)]


def _rendered(lines: Sequence[str], fonts: Sequence[str], seed: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Each line as dark text on a light, noisy ground, scaled to height 48 and padded to width 320."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise DependencyError("rendering text needs Pillow: run pip install 'qonnx-pipeline[dev]'") from error
    random = np.random.default_rng(seed)
    folder = debian("fonts-dejavu-core") / "usr" / "share" / "fonts" / "truetype" / "dejavu"
    for text in lines:
        font = ImageFont.truetype(str(folder / random.choice(fonts)), int(random.integers(20, 34)))
        left, top, right, bottom = font.getbbox(text)
        image = Image.new("L", (int(right - left) + 16, int(bottom - top) + 14), int(random.integers(200, 256)))
        ImageDraw.Draw(image).text((8 - left, 7 - top), text, fill=int(random.integers(0, 80)), font=font)
        width = min(WIDTH, max(8, round(image.width * HEIGHT / image.height)))
        pixels = np.asarray(image.resize((width, HEIGHT), Image.Resampling.BILINEAR), np.float32)
        pixels = np.clip(pixels + random.normal(0, 6, pixels.shape), 0, 255)
        line = np.zeros((3, HEIGHT, WIDTH), np.float32)
        line[:, :, :width] = (pixels / 255 - 0.5) / 0.5
        yield text, line


def _alphabet() -> list[str]:
    """The characters by class: blank first, the space last."""
    model = ir.load(onnx_file())
    return ["", *model.metadata_props["character"].splitlines(), " "]


def _decode(scores: NDArray[np.float32], characters: Sequence[str]) -> str:
    """Greedy CTC: the best class of every step, repetitions and blanks dropped."""
    best = scores.argmax(axis=1)
    kept = best[np.concatenate([[True], best[1:] != best[:-1]])]
    return "".join(characters[index] for index in kept if index)


def _distance(left: str, right: str) -> int:
    """Edit distance: insertions, deletions and substitutions."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]
