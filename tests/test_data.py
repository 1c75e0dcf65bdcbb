import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.data import Digest, HoldOut, batches
from qonnx.errors import DataError
from qonnx.rebatch import Batch
from qonnx.runtime import InputSpec

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
IMAGE = (InputSpec("image", F32, ("batch", 3, 4)),)
TEXT = (InputSpec("ids", I64, ("batch", "tokens")), InputSpec("mask", I64, ("batch", "tokens")))


def image(size: int = 2, fill: float = 1) -> Any:
    return np.full((size, 3, 4), fill, np.float32)


def text(tokens: int = 5) -> Any:
    return np.arange(2 * tokens).reshape(2, tokens), np.ones((2, tokens), np.int64)


def fills(stream: Any) -> list[float]:
    return [float(batch["image"].flat[0]) for batch in stream]


def write(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in (2, 1, 3):
        np.savez(folder / f"{number}.npz", image=image(number, number))
    (folder / "notes.txt").write_text("not data")
    return folder


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    assert fills(batches(str(write(tmp_path / "calib")), IMAGE)) == [1, 2, 3]


def test_a_file_is_one_batch(tmp_path: Path) -> None:
    folder = write(tmp_path / "calib")
    np.save(folder / "0.npy", image(2, 7))
    assert fills(batches(folder / "2.npz", IMAGE)) == [2]
    assert fills(batches(folder / "0.npy", IMAGE)) == [7]
    assert fills(batches(folder, IMAGE)) == [7, 1, 2, 3]


class Loader(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3, 4), float(index)), index


def data_loader() -> Any:
    return torch.utils.data.DataLoader(Loader(), batch_size=2)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"image": image()}, [1]),
        (image(), [1]),
        (torch.from_numpy(image()), [1]),
        ([image(1), image(2, 2)], [1, 2]),
        ([{"image": image()}], [1]),
        ((image(fill=i) for i in range(3)), [0, 1, 2]),
        (lambda: (image(fill=i) for i in range(3)), [0, 1, 2]),
        (lambda: image(), [1]),
        ([(image(), np.zeros(2))], [1]),
        ([[image()]], [1]),
        ([({"image": image()}, np.zeros(2))], [1]),
        ([((image(),), [3, 4])], [1]),
        (data_loader(), [0, 2, 4]),
        ([torch.ones(2, 3, 4, requires_grad=True)], [1]),
        ([torch.ones(2, 3, 4, dtype=torch.bfloat16)], [1]),
        ([{"image": image().tolist()}], [1]),
        ([image().astype(np.float64), image().astype(np.float16)], [1, 1]),
    ],
)
def test_every_form_of_data(data: Any, expected: list[float]) -> None:
    read = list(batches(data, IMAGE))
    assert fills(read) == expected
    assert all(batch["image"].dtype == np.float32 for batch in read)


def test_several_inputs_come_by_name_or_in_order() -> None:
    ids, mask = text()
    forms = [
        {"mask": mask, "ids": ids},
        (ids, mask),
        [ids, mask],
        (ids, mask, np.zeros(2)),
        ((ids, mask), np.zeros(2)),
        {"ids": ids.astype(np.int32), "mask": mask.astype(bool)},
        {"labels": ["a text", None], "mask": mask, "ids": ids},
        (torch.from_numpy(ids), torch.from_numpy(mask)),
    ]
    for batch in batches(forms, TEXT):
        assert list(batch) == ["ids", "mask"]
        np.testing.assert_array_equal(batch["ids"], ids)
        np.testing.assert_array_equal(batch["mask"], mask)
        assert {array.dtype for array in batch.values()} == {I64}


def test_a_generator_is_advanced_no_further_than_asked() -> None:
    seen = []

    def generate() -> Iterator[Any]:
        for number in range(10):
            seen.append(number)
            yield image(fill=number)

    assert fills(batches(generate(), IMAGE, max_batches=2)) == [0, 1]
    assert seen == [0, 1]


def test_batches_are_read_one_at_a_time() -> None:
    seen = []

    def generate() -> Iterator[Any]:
        for number in range(3):
            seen.append(number)
            yield image(fill=number)

    for number, _ in enumerate(batches(generate(), IMAGE)):
        assert seen == list(range(number + 1))


def test_the_past_of_a_decoder_may_be_empty_but_not_everything() -> None:
    inputs = (InputSpec("ids", I64, ("batch", "tokens")), InputSpec("past", F32, ("batch", 2, "past", 4)))
    past = np.zeros((1, 2, 0, 4), np.float32)
    (batch,) = batches({"ids": np.ones((1, 3), np.int64), "past": past}, inputs)
    assert batch["past"].shape == past.shape
    with pytest.raises(DataError, match="every input is empty"):
        list(batches({"ids": np.ones((1, 0), np.int64), "past": past}, inputs))


@pytest.mark.parametrize("shape", [None, (None, None, None), ("n", None, 4)])
def test_unknown_dimensions_take_any_size(shape: Any) -> None:
    assert fills(batches([image(1), image(2)], (InputSpec("image", F32, shape),))) == [1, 1]


@pytest.mark.parametrize(
    ("dtype", "given"),
    [
        (ml_dtypes.bfloat16, np.float32),
        (np.float16, np.float64),
        (np.int32, np.int64),
        (np.uint8, np.int64),
        (np.int64, np.uint8),
        (np.int64, np.bool_),
        (np.bool_, np.bool_),
        (object, object),
        (object, np.str_),
    ],
)
def test_types_that_are_converted(dtype: Any, given: Any) -> None:
    (batch,) = batches({"x": np.array([0, 1, 1]).astype(given)}, (InputSpec("x", np.dtype(dtype), (3,)),))
    assert batch["x"].dtype == dtype


def bad_file(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def pickled(folder: Path) -> Path:
    np.savez(folder / "objects.npz", image=np.array([{}], object))
    return folder / "objects.npz"


def truncated(folder: Path) -> Path:
    np.savez(folder / "cut.npz", image=image())
    return bad_file(folder, "cut.npz", (folder / "cut.npz").read_bytes()[:-40])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none", "none: no such file or folder; give a folder of .npz files"),
        (lambda folder: folder, ": the folder holds no .npz file; write one per batch with numpy.savez"),
        (lambda folder: bad_file(folder, "a.txt", b"1 2 3"), "a.txt: not an .npz or .npy file; write one with"),
        (lambda folder: bad_file(folder, "a.npz", b"1 2 3"), "a.npz: cannot be read as .npz; write it again with"),
        (lambda folder: bad_file(folder, "a.npy", b""), "a.npy: cannot be read as .npy; write it again with"),
        (truncated, "cut.npz: cannot be read as .npz; write it again with numpy.savez"),
        (pickled, "objects.npz: cannot be read as .npz; write it again with numpy.savez"),
    ],
)
def test_files_that_cannot_be_read(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        list(batches(make(tmp_path), IMAGE))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_is_named_in_the_message(tmp_path: Path) -> None:
    folder = write(tmp_path / "calib")
    np.savez(folder / "4.npz", picture=image())
    with pytest.raises(DataError, match=r"calib/4\.npz: input 'image' is missing; given picture"):
        list(batches(folder, IMAGE))


NAN = image()
NAN[0, 0, :3] = np.nan, np.nan, -np.inf

BAD = [
    ([], IMAGE, "the data hold no batch (a generator can be read only once); give at least one"),
    (iter(()), IMAGE, "the data hold no batch (a generator can be read only once); give at least one"),
    (7, IMAGE, "data of type int cannot be read; give a folder of .npz files or batches"),
    (lambda: len, IMAGE, "the data function returned a builtin_function_or_method; return batches"),
    ([7], IMAGE, "batch 1: is a int; give a dict by input name: image"),
    ([image(), {"x": image()}], IMAGE, "batch 2: input 'image' is missing; given x"),
    ([{}], IMAGE, "batch 1: input 'image' is missing; given none"),
    ([(image(), image(), image())], IMAGE, "batch 1: holds 3 arrays, the model has 1 inputs: image"),
    ([image()], TEXT, "batch 1: holds 1 arrays, the model has 2 inputs: ids, mask"),
    (image()[0], IMAGE, "batch 1: input 'image' has shape [3, 4], the model takes [batch, 3, 4]; add the batch dim"),
    (image()[:, :2], IMAGE, "batch 1: input 'image' has shape [2, 2, 4], the model takes [batch, 3, 4]"),
    (image()[None, None], IMAGE, "batch 1: input 'image' has shape [1, 1, 2, 3, 4], the model takes [batch, 3, 4]"),
    (image(0), IMAGE, "batch 1: input 'image' is empty, its shape is [0, 3, 4]; give at least one sample"),
    ((text()[0], text(6)[1]), None, "batch 1: input 'mask' has 6 for dimension 'tokens', input 'ids' has 5"),
    (image().astype(np.uint8), IMAGE, "batch 1: input 'image' holds uint8, the model takes float32; convert it"),
    ((text()[0] * 1.0, text()[1]), None, "batch 1: input 'ids' holds float64, the model takes int64; convert it"),
    ({"image": [[1, 2], [3]]}, IMAGE, "batch 1: input 'image' is not an array; give numbers in a regular grid"),
    ({"image": "abc"}, IMAGE, "batch 1: input 'image' has shape [], the model takes [batch, 3, 4]"),
    (NAN, IMAGE, "batch 1: input 'image' holds 2 NaN and 1 infinite values out of 24 as float32; clean the data"),
    (image().astype(np.float64) * 1e300, IMAGE, "batch 1: input 'image' holds 0 NaN and 24 infinite values out of 24"),
]


@pytest.mark.parametrize(("data", "inputs", "message"), BAD, ids=[case[2][:60] for case in BAD])
def test_data_that_do_not_fit(data: Any, inputs: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        list(batches([data] if inputs is None else data, inputs or TEXT))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_integers_that_do_not_fit_their_type() -> None:
    inputs = (InputSpec("x", np.dtype(np.uint8), (2,)),)
    for values in ([0, 256], [-1, 0]):
        with pytest.raises(DataError, match="input 'x' holds int64 values beyond uint8, which the model takes"):
            list(batches({"x": np.array(values)}, inputs))


def test_asking_for_no_batch_is_refused() -> None:
    with pytest.raises(DataError, match="at most 0 batches were asked for; ask for 1 or more"):
        list(batches([image()], IMAGE, max_batches=0))


def test_an_error_of_the_users_own_code_is_left_alone() -> None:
    def generate() -> Iterator[Any]:
        yield image()
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        list(batches(generate(), IMAGE))


def numbered(count: int) -> list[Batch]:
    return [{"x": np.full(1, number)} for number in range(count)]


def numbers(stream: Any) -> list[int]:
    return [int(batch["x"][0]) for batch in stream]


@given(st.integers(1, 60), st.integers(2, 9), st.integers(1, 5), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_held_out_batches_are_not_passed_on(count: int, every: int, most: int, samples: int) -> None:
    stream = HoldOut(iter(numbered(count)), every=every, most=most, samples=samples)
    passed = numbers(stream)
    kept = numbers(stream.kept)
    assert stream.passed == len(passed)
    if count == 1:
        assert (passed, kept, stream.shared) == ([0], [0], True)
    else:
        assert sorted(passed + kept) == list(range(count))
        assert kept == [i for i in range(count) if i % every == 1][: max(most, samples)]
        assert not stream.shared


def test_only_the_batches_held_back_stay_in_memory() -> None:
    class Tracked(dict[str, Any]):
        pass

    made: list[weakref.ref[Tracked]] = []

    def generate() -> Iterator[Batch]:
        for _ in range(30):
            batch = Tracked(x=np.zeros(1))
            made.append(weakref.ref(batch))
            yield batch

    for _ in HoldOut(generate(), every=8, most=2, samples=2):
        # The ones held back, the one in hand, and the one that the loop above has just given out.
        assert sum(reference() is not None for reference in made) <= 2 + 2


def test_the_digest_knows_content_and_names_but_not_order() -> None:
    def digest(given: list[Batch]) -> str:
        made = Digest()
        for batch in given:
            made.update(batch)
        return made.hexdigest()

    data = numbered(5)
    assert digest(data) == digest(data[::-1])
    assert len(digest(data)) == 32
    strings = [{"x": np.array(["a", "b"], object)}]
    scalar: list[Batch] = [{"x": np.array(1)}]
    different = [
        data,
        data[:4],
        [*data, data[0]],
        [*data[:4], {"y": data[4]["x"]}],
        [{"x": batch["x"].astype(np.int32)} for batch in data],
        [{"x": batch["x"][None]} for batch in data],
        strings,
        scalar,
        [{"x": np.array([1])}],
        [],
    ]
    assert len({digest(each) for each in different}) == len(different)
    assert digest([{"x": np.arange(6).reshape(2, 3).T}]) == digest([{"x": np.arange(6).reshape(2, 3).T.copy()}])
    stream = HoldOut(data)
    list(stream)
    assert stream.digest == digest(data)
