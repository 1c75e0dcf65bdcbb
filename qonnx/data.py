"""Calibration and evaluation data: from whatever form the user has it in to checked batches, one at a time."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qonnx.errors import DataError
from qonnx.rebatch import Array, Batch, fitted, rows, spread
from qonnx.runtime import InputSpec

_FILES = frozenset({".npz", ".npy"})
_FLOATS = frozenset(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))


def batches(data: Any, inputs: Sequence[InputSpec], *, max_batches: int | None = None) -> Iterator[Batch]:
    """Reads data in any of the accepted forms, one checked batch at a time.

    * a folder: its `.npz` and `.npy` files in the order of their names, one batch each;
    * an `.npz` file: an array per input name; an `.npy` file: that of a model with one input;
    * a dict of arrays by input name, or one array or tensor;
    * an iterable of batches: a list, a generator, a torch `DataLoader` ... Each is a dict by input name, a tuple or
      list in input order, or one array for a model with one input. A tuple or list may carry the labels as one further
      element, `(x, labels)` or `((x, mask), labels)`, and a dict may hold more than the inputs: these are dropped;
    * a function without arguments that returns one of the above.

    Samples for a model whose batch size is fixed may come all at once: they are cut to that size. Torch tensors become
    arrays, wherever they live. Batches may differ in size. Floats are converted to the float type
    of the input, integers and booleans to its integer type when every value fits; nothing else is converted. An input
    may be empty along a dynamic dimension other than the first (the past of a decoder at its first token), as long as
    some other input is not.

    Args:
        data: see above.
        inputs: what the model expects, `Session.inputs`.
        max_batches: stop after this many; a generator is not advanced further.

    Yields:
        A new dict per batch: one array per input, in the order of `inputs`, of exactly the input's type.

    Raises:
        DataError: there is no batch, or one does not fit. Batches are counted from 1.
    """
    if max_batches is not None and max_batches < 1:
        raise DataError(f"at most {max_batches} batches were asked for; ask for 1 or more")
    number = 0
    for source, given in _sources(data):
        named = _named(given, inputs, source)
        for part in fitted({spec.name: _array(named[spec.name], source, spec.name) for spec in inputs}, inputs):
            yield _checked(part, inputs, source)
            number += 1
            if number == max_batches:
                return
    if not number:
        raise DataError("the data hold no batch (a generator can be read only once); give at least one")


def expected_rows(data: Any, inputs: Sequence[InputSpec], max_batches: int | None = None) -> list[int] | None:
    """How many samples each of the batches that are to come will probably hold; None where only reading them tells.

    All are taken to be like the first, which is looked at where that does not use it up.

    >>> ids = [InputSpec("ids", np.dtype(np.int64), ("batch", 3))]
    >>> expected_rows([np.zeros((4, 3))] * 3, ids), expected_rows(np.zeros((8, 3)), ids)
    ([4, 4, 4], [1, 1, 1, 1, 1, 1, 1, 1])
    """
    try:
        count, parts = _source_count(data), [1]
        if count is None:
            return None
        if isinstance(data, str | os.PathLike | Mapping | Sequence) or _is_tensor(data):
            source, given = next(_sources(data))
            named = _named(given, inputs, source)
            first = list(fitted({spec.name: _array(named[spec.name], source, spec.name) for spec in inputs}, inputs))
            parts = list(map(rows, spread(first, inputs) if count == 1 else first))
    except (DataError, OSError, StopIteration):  # what is wrong is said when the data are read
        return None
    return (parts * count)[:max_batches]


def _source_count(data: Any) -> int | None:
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        return sum(_is_batch(file) for file in path.iterdir()) if path.is_dir() else 1
    if isinstance(data, Mapping) or _is_tensor(data):
        return 1
    try:
        return len(data)
    except TypeError:  # a generator, a function, a DataLoader over a stream
        return None


class Digest:
    """A fingerprint of a set of batches that does not depend on their order: two of them add up.

    The sum, modulo 2**128, of one BLAKE2b hash per batch over input names, types, shapes and the CRC-32 of the bytes,
    which is ten times as fast as a hash of all bytes: it tells accidents, not forgeries.

    Args:
        digits: what `hexdigest` gave, to go on from.
    """

    def __init__(self, digits: str = "") -> None:
        self._sum = int(digits or "0", 16)

    def update(self, batch: Mapping[str, Array]) -> None:
        """Adds one batch."""
        state = hashlib.blake2b(digest_size=16)
        for name in sorted(batch):
            array = np.asarray(batch[name], order="C")
            state.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
            text = array.dtype == object
            data = "\0".join(map(str, array.flat)).encode() if text else array.reshape(-1).view(np.uint8).data
            state.update(zlib.crc32(data).to_bytes(4))
        self._sum = (self._sum + int.from_bytes(state.digest())) % 2**128

    def merge(self, other: Digest) -> Digest:
        """That of both sets of batches together."""
        return Digest(f"{(self._sum + other._sum) % 2**128:x}")

    def hexdigest(self) -> str:
        """32 hexadecimal digits; all zero when nothing was added."""
        return f"{self._sum:032x}"


class HoldOut:
    """Passes batches on and keeps some of them back, so that a result is judged on data that calibration did not see.

    The second batch is kept back and every fourth after it, until there are four batches and 64 samples. A single batch
    serves for both.

    >>> stream = HoldOut([{"x": np.full(1, i)} for i in range(11)])
    >>> [int(batch["x"][0]) for batch in stream], [int(batch["x"][0]) for batch in stream.kept], stream.shared
    ([0, 2, 3, 4, 6, 7, 8, 10], [1, 5, 9], False)

    Args:
        stream: the batches.
        every: one batch in so many is kept back, at least 2.
        most: how many are kept back at most, as long as they hold `samples` samples.
        samples: see `most`.

    Attributes:
        kept: the batches held back; complete once the iteration is over.
        shared: whether there was only one batch, which was passed on and is in `kept` too.
        passed: how many batches were passed on.
    """

    @staticmethod
    def passes(samples: Sequence[int]) -> int:
        """How many batches of these numbers of samples are passed on.

        >>> HoldOut.passes([8] * 11), HoldOut.passes([1] * 200), HoldOut.passes([5])
        (8, 150, 1)
        """
        return sum(1 for _ in HoldOut({"": np.zeros(size, np.bool_)} for size in samples))

    def __init__(self, stream: Iterable[Batch], *, every: int = 4, most: int = 4, samples: int = 64) -> None:
        self._stream = stream
        self._every = every
        self._most = most
        self._samples = samples
        self._digest = Digest()
        self.kept: list[Batch] = []
        self.shared = False
        self.passed = 0

    @property
    def digest(self) -> str:
        """The `Digest` of all batches that went by, whether passed on or kept back."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Batch]:
        first: list[Batch] = []
        for index, batch in enumerate(self._stream):
            self._digest.update(batch)
            first = [batch] if index == 0 else []
            enough = len(self.kept) >= self._most and sum(map(rows, self.kept)) >= self._samples
            if index % self._every == 1 and not enough:
                self.kept.append(batch)
            else:
                self.passed += 1
                yield batch
        if first:
            self.kept, self.shared = first, True


def _sources(data: Any) -> Iterator[tuple[str, Any]]:
    """Pairs of where a batch comes from, for messages, and the batch as it was given."""
    if isinstance(data, str | os.PathLike):
        yield from _files(Path(data))
    elif isinstance(data, Mapping) or _is_tensor(data):
        yield "batch 1", data
    elif isinstance(data, Iterable):
        for number, batch in enumerate(data, 1):
            yield f"batch {number}", batch
    elif callable(data):
        made = data()
        if callable(made) and not isinstance(made, Iterable):
            raise DataError(f"the data function returned a {type(made).__name__}; return batches")
        yield from _sources(made)
    else:
        raise DataError(f"data of type {type(data).__name__} cannot be read; give a folder of .npz files or batches")


def _files(path: Path) -> Iterator[tuple[str, Any]]:
    if path.is_dir():
        files = sorted(filter(_is_batch, path.iterdir()))
        if not files:
            raise DataError(f"{path}: the folder holds no .npz file; write one per batch with numpy.savez")
    elif path.is_file():
        if path.suffix not in _FILES:
            raise DataError(f"{path}: not an .npz or .npy file; write one with numpy.savez")
        files = [path]
    else:
        raise DataError(f"{path}: no such file or folder; give a folder of .npz files")
    for file in files:
        yield str(file), _read(file)


def _is_batch(file: Path) -> bool:
    return file.suffix in _FILES and file.is_file()


def _read(file: Path) -> Array | Batch:
    try:
        with file.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except Exception as error:  # zipfile, zlib and numpy raise many types for a damaged file
        raise DataError(f"{file}: cannot be read as {file.suffix}; write it again with numpy.savez") from error


def _is_tensor(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "detach") or hasattr(value, "__array__")


def _is_group(value: Any) -> bool:
    """Whether a value holds several inputs: a dict, or a tuple or list of arrays (and not a list of numbers)."""
    return isinstance(value, Mapping) or (isinstance(value, list | tuple) and all(map(_is_tensor, value)))


def _array(value: Any, source: str, name: str) -> Array:
    if hasattr(value, "detach"):  # a torch tensor; torch itself is not imported for this
        value = value.detach().cpu()
        try:
            return np.asarray(value.numpy())
        except TypeError:  # bfloat16 has no numpy type in torch
            return np.asarray(value.float().numpy())
    try:
        array = np.asarray(value)
    except Exception as error:  # lists of lists of unequal length, objects with an __array__ of their own
        raise DataError(f"{source}: input {name!r} is not an array; give numbers in a regular grid") from error
    return array.astype(object) if array.dtype.kind in "US" else array


def _named(given: Any, inputs: Sequence[InputSpec], source: str) -> dict[str, Any]:
    """Gives every array the name of an input: dicts by name, anything else by position."""
    expected = [spec.name for spec in inputs]
    if not isinstance(given, Mapping):
        values = [given] if _is_tensor(given) else list(given) if isinstance(given, list | tuple) else None
        if values is None:
            raise DataError(f"{source}: is a {type(given).__name__}; give a dict by input name: {_listed(expected)}")
        if len(values) == 2 and _is_group(values[0]):
            return _named(values[0], inputs, source)
        if isinstance(given, list | tuple) and len(values) == len(expected) + 1:
            values.pop()
        if len(values) != len(expected):
            raise DataError(
                f"{source}: holds {len(values)} arrays, the model has {len(expected)} inputs: {_listed(expected)}"
            )
        return dict(zip(expected, values, strict=True))
    missing = [name for name in expected if name not in given]
    if missing:
        raise DataError(f"{source}: input {missing[0]!r} is missing; given {_listed(map(str, given))}")
    return {name: given[name] for name in expected}


def _checked(given: Batch, inputs: Sequence[InputSpec], source: str) -> Batch:
    batch: Batch = {}
    sizes: dict[str, tuple[int, str]] = {}
    for spec in inputs:
        array = given[spec.name]
        _check_shape(array, spec, sizes, source)
        batch[spec.name] = _converted(array, spec, source)
    if batch and not any(array.size for array in batch.values()):
        raise DataError(f"{source}: every input is empty; give at least one sample")
    return batch


def _check_shape(array: Array, spec: InputSpec, sizes: dict[str, tuple[int, str]], source: str) -> None:
    """Compares with the declared shape; `sizes` tells the batch's named dimensions so far, and in which input."""
    where = f"{source}: input {spec.name!r}"
    if array.ndim and not array.shape[0]:
        raise DataError(f"{where} is empty, its shape is {_shape(array.shape)}; give at least one sample")
    if spec.shape is None:
        return
    fits = len(spec.shape) == array.ndim and all(
        not isinstance(expected, int) or expected == given
        for expected, given in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        hint = "; add the batch dimension" if array.ndim == len(spec.shape) - 1 else ""
        raise DataError(f"{where} has shape {_shape(array.shape)}, the model takes {_shape(spec.shape)}{hint}")
    for expected, given in zip(spec.shape, array.shape, strict=True):
        if isinstance(expected, str):
            known, first = sizes.setdefault(expected, (given, spec.name))
            if known != given:
                raise DataError(f"{where} has {given} for dimension {expected!r}, input {first!r} has {known}")


def _converted(array: Array, spec: InputSpec, source: str) -> Array:
    where = f"{source}: input {spec.name!r}"
    result = array
    if array.dtype != spec.dtype:
        from_float, to_float = array.dtype in _FLOATS, spec.dtype in _FLOATS
        from_integer, to_integer = array.dtype.kind in "iub", spec.dtype.kind in "iu"
        if not ((from_float and to_float) or (from_integer and to_integer)):
            raise DataError(f"{where} holds {array.dtype.name}, the model takes {spec.dtype.name}; convert it")
        with np.errstate(over="ignore"):  # what overflows is found below
            result = array.astype(spec.dtype)
        if to_integer and not np.array_equal(result, array):
            raise DataError(f"{where} holds {array.dtype.name} values beyond {spec.dtype.name}, which the model takes")
    if spec.dtype in _FLOATS:
        finite = np.isfinite(result)
        if not finite.all():
            nans = int(np.isnan(result).sum())
            infinite = result.size - int(finite.sum()) - nans
            raise DataError(
                f"{where} holds {nans} NaN and {infinite} infinite values out of {result.size} as {spec.dtype.name}; "
                "clean the data"
            )
    return result


def _shape(shape: Iterable[int | str | None]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
