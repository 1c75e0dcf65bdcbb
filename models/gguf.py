"""Reads the weights and the vocabulary that a GGUF file holds.

The format: a header, keys with typed values, the shapes and offsets of all tensors, and their bytes, aligned. Matrices
are stored in blocks of 32 elements along the last axis (names as in llama.cpp):

    Q8_0    x = d q             float16 d, int8 q
    Q4_1    x = d q + m         float16 d and m, 4-bit q, the low halves of 16 bytes first
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qonnx.errors import DataError

_BLOCK = 32
_NUMBERS = dict(zip(range(8), "BbHhIif?", strict=True)) | {10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_F32, _Q4_1, _Q8_0 = 0, 3, 8

_Q8_0_BLOCK = np.dtype([("d", "<f2"), ("q", "i1", _BLOCK)])
_Q4_1_BLOCK = np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", _BLOCK // 2)])
_STORED = {_F32: (np.dtype("<f4"), 1), _Q4_1: (_Q4_1_BLOCK, _BLOCK), _Q8_0: (_Q8_0_BLOCK, _BLOCK)}


def metadata(path: Path) -> dict[str, Any]:
    """Reads the keys of a file, such as `llama.block_count` and `tokenizer.ggml.tokens`.

    Raises:
        DataError: it is no GGUF file of version 2 or 3.
    """
    with _opened(path) as cursor:
        return cursor.metadata


def tensors(path: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yields every tensor with its name, in the order of axes that numpy and torch use.

    Raises:
        DataError: it is no GGUF file of version 2 or 3, or a tensor is neither F32 nor Q4_1 nor Q8_0.
    """
    with _opened(path) as cursor:
        entries = [_entry(cursor) for _ in range(cursor.tensors)]
        alignment = cursor.metadata.get("general.alignment", 32)
        start = -(-cursor.place // alignment) * alignment
        for name, shape, kind, offset in entries:
            yield name, _tensor(cursor.data, name, shape, kind, start + offset)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Cursor]:
    """The file, read up to the list of tensors."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF" or int.from_bytes(data[4:8], "little") not in (2, 3):
            raise DataError(f"{path}: not a GGUF file of version 2 or 3; fetch it again")
        yield _Cursor(data)


class _Cursor:
    """A file, read up to `place`."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = 8
        self.tensors, keys = self.numbers("QQ")
        self.metadata = {self.text(): self.value() for _ in range(keys)}

    def numbers(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{layout}", self.data, self.place)
        self.place += struct.calcsize(f"<{layout}")
        return values

    def text(self) -> str:
        (length,) = self.numbers("Q")
        (text,) = self.numbers(f"{length}s")
        return str(text, "utf-8")

    def value(self, kind: int | None = None) -> Any:
        if kind is None:
            (kind,) = self.numbers("I")
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            item, length = self.numbers("IQ")
            return [self.value(item) for _ in range(length)]
        (number,) = self.numbers(_NUMBERS[kind])
        return number


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of a tensor. Files list the fastest axis first."""
    name = cursor.text()
    (rank,) = cursor.numbers("I")
    shape = cursor.numbers(f"{rank}Q")[::-1]
    kind, offset = cursor.numbers("IQ")
    return name, shape, kind, offset


def _tensor(data: mmap.mmap, name: str, shape: tuple[int, ...], kind: int, place: int) -> NDArray[np.float32]:
    if kind not in _STORED:
        raise DataError(f"GGUF tensor {name}: type {kind} is not one of F32, Q4_1 and Q8_0")
    dtype, block = _STORED[kind]
    stored = np.frombuffer(data, dtype, int(np.prod(shape)) // block, place).copy()
    if kind == _F32:
        return np.asarray(stored, np.float32).reshape(shape)
    scale = stored["d"].astype(np.float32)[:, None]
    if kind == _Q8_0:
        return np.asarray(scale * stored["q"], np.float32).reshape(shape)
    codes = np.concatenate([stored["q"] & 15, stored["q"] >> 4], axis=1)
    return np.asarray(scale * codes + stored["m"].astype(np.float32)[:, None], np.float32).reshape(shape)
