"""PP-OCRv4's text detector on rendered pages.

Network: convolutions, squeeze-and-excitation, transposed convolutions, Apache-2.0, an ONNX file as its users have it:
opset 12, weights in Constant nodes, dynamic height and width.

Task: lines of text on a page; a line is found when most of the middle of its box is above the threshold, and the space
between two lines is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.common import Batch, Evaluation, Run
from models.fetch import debian, wheel
from models.ocr import CALIBRATION_FONTS, TEST_FONTS, text_lines
from qonnx.errors import DependencyError

SIZE = 320
LINES = 5
THRESHOLD = 0.3

Box = tuple[int, int, int, int]


def onnx_file() -> Path:
    """The detector: input `x` [batch, 3, height, width], output [batch, 1, height, width]: is there text."""
    return wheel("rapidocr-onnxruntime", "1.4.4") / "rapidocr_onnxruntime" / "models" / "ch_PP-OCRv4_det_infer.onnx"


def calibration(batches: int = 8, batch_size: int = 2) -> Iterator[Batch]:
    """Yields rendered pages, float32 [batch_size, 3, 320, 320], in fonts and words that `evaluate` does not use."""
    for index in range(batches):
        pages = [_page(CALIBRATION_FONTS, seed=100 * index + page)[0] for page in range(batch_size)]
        yield {"x": np.stack(pages)}


def evaluate(run: Run, *, pages: int = 24) -> Evaluation:
    """Measures the share of lines that are found, and kept apart from the next."""
    found: list[bool] = []
    for seed in range(pages):
        image, boxes = _page(TEST_FONTS, seed=10_000 + seed)
        (scores,) = run({"x": image[None]}).values()
        text = scores[0, 0] > THRESHOLD
        for left, top, right, bottom in boxes:
            middle = (top + bottom) // 2
            inside = text[middle - 2 : middle + 3, left + 4 : right - 4].mean() > 0.7
            below = text[min(bottom + 10, SIZE - 1), left:right].mean() < 0.3
            found.append(bool(inside and below))
    share = float(np.mean(found))
    error = 100 * float(np.sqrt(share * (1 - share) / len(found)))
    return Evaluation(metric="lines found", value=100 * share, samples=len(found), standard_error=error)


def _page(fonts: tuple[str, ...], seed: int) -> tuple[NDArray[np.float32], list[Box]]:
    """A page of lines in different places, and where they are: left, top, right, bottom."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise DependencyError("rendering text needs Pillow: run pip install 'qonnx-pipeline[dev]'") from error
    random = np.random.default_rng(seed)
    folder = debian("fonts-dejavu-core") / "usr" / "share" / "fonts" / "truetype" / "dejavu"
    image = Image.new("L", (SIZE, SIZE), int(random.integers(190, 256)))
    draw, boxes = ImageDraw.Draw(image), []
    for number, text in enumerate(text_lines(seed=seed, count=LINES)):
        font = ImageFont.truetype(str(folder / random.choice(fonts)), int(random.integers(14, 20)))
        place = (int(random.integers(8, 40)), 14 + number * 60 + int(random.integers(0, 12)))
        draw.text(place, text, fill=int(random.integers(0, 90)), font=font)
        left, top, right, bottom = draw.textbbox(place, text, font=font)
        boxes.append((int(left), int(top), min(int(right), SIZE), int(bottom)))
    pixels = np.asarray(image, np.float32) + random.normal(0, 5, (SIZE, SIZE))
    scaled = np.clip(pixels, 0, 255) / 255
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    channels = (scaled[None] - mean[:, None, None]) / deviation[:, None, None]
    return channels.astype(np.float32), boxes
