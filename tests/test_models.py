import os
import re
import struct
import subprocess
import threading
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from models import fetch, gguf, minilm, mobilenet, probe, residual, smollm2
from models.common import Batch, Evaluation, Run, torch_run
from qonnx.errors import DataError, DependencyError

# Loaders


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that sees nothing but the folder `shop`."""
    (tmp_path / "shop").mkdir()
    monkeypatch.setattr(fetch, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(probe, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shop"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "cache"


def make_wheel(folder: Path) -> None:
    with zipfile.ZipFile(folder / "toy-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("toy/weights.bin", b"abc")
        archive.writestr("toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        archive.writestr("toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy-1.0.dist-info/RECORD", "")


def folders(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.glob("*/*") if path.is_dir())


def test_a_wheel_is_unzipped_and_then_served_without_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(cache.parent / "shop")
    folder = fetch.wheel("toy", "1.0")
    assert (folder / "toy" / "weights.bin").read_bytes() == b"abc"
    assert not list(folder.glob("*.whl"))
    monkeypatch.setattr(subprocess, "run", None)
    assert fetch.wheel("toy", "1.0") == folder
    assert folders(cache) == ["wheels/toy-1.0"]


def test_a_wheel_that_does_not_exist_is_one_line_and_leaves_nothing(cache: Path) -> None:
    with pytest.raises(DataError, match=re.escape("cannot fetch wheel toy==2.0: ")) as raised:
        fetch.wheel("toy", "2.0")
    assert "try again" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert folders(cache) == []


def test_a_damaged_wheel_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_pip_download", lambda _, folder: (folder / "toy.whl").write_bytes(b"PK"))
    with pytest.raises(DataError, match=r"toy\.whl: not a readable zip file"):
        fetch.wheel("toy", "1.0")
    assert folders(cache) == []


def test_what_a_killed_process_left_is_thrown_away(cache: Path) -> None:
    make_wheel(cache.parent / "shop")
    (cache / "wheels" / "toy-1.0.partial" / "half").mkdir(parents=True)
    assert not (fetch.wheel("toy", "1.0") / "half").exists()


def test_workers_that_ask_at_once_fetch_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, calls = threading.Barrier(4), []

    def download(_: str, folder: Path) -> None:
        calls.append(folder)
        make_wheel(folder)

    def ask(_: int) -> bytes:
        start.wait()
        return (fetch.wheel("toy", "1.0") / "toy" / "weights.bin").read_bytes()

    monkeypatch.setattr(fetch, "_pip_download", download)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [b"abc"] * 4
    assert len(calls) == 1


def test_a_cache_that_cannot_be_made_is_one_line(cache: Path) -> None:
    cache.write_text("a file in the way")
    with pytest.raises(DataError, match="cannot write to the cache"):
        fetch.wheel("toy", "1.0")


def fake_tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_debian_loads_package_lists_of_its_own_when_the_machine_has_none(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = cache.parent / "shop"
    fake_tool(
        shop, "apt-get", 'case "$*" in *update*) ;; *State::lists*) echo x > toy_1_all.deb ;; *) exit 100 ;; esac'
    )
    fake_tool(shop, "dpkg-deb", "mkdir usr && mv toy_1_all.deb usr/data && touch toy_1_all.deb")
    monkeypatch.setenv("PATH", str(shop), prepend=os.pathsep)
    folder = fetch.debian("toy")
    assert (folder / "usr" / "data").read_text() == "x\n"
    assert [path.name for path in folder.iterdir()] == ["usr"]
    monkeypatch.setenv("PATH", "")
    assert fetch.debian("toy") == folder


def test_a_debian_package_that_does_not_exist_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = cache.parent / "shop"
    fake_tool(
        shop, "apt-get", 'case "$*" in *update*) ;; *) echo "E: Unable to locate package toy" >&2; exit 100 ;; esac'
    )
    fake_tool(shop, "dpkg-deb", "exit 0")
    monkeypatch.setenv("PATH", str(shop), prepend=os.pathsep)
    with pytest.raises(DataError, match="cannot fetch Debian package toy: E: Unable to locate package toy; "):
        fetch.debian("toy")
    assert folders(cache) == []


def test_a_machine_without_apt_is_told_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DependencyError, match=r"apt-get is not installed: unpack the Debian package toy into .*toy by"):
        fetch.debian("toy")


# Linear probe


def clouds(seed: int, count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Three overlapping classes in 12 dimensions, one of which never moves."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    points = np.eye(3, 12)[labels] * 3 + random.standard_normal((count, 12)) * np.linspace(0.5, 20, 12)
    points[:, 11] = 7
    return points.astype(np.float32), labels


def test_probe_is_the_least_squares_solution() -> None:
    x, labels = clouds(0)
    fitted = probe.fit(x, labels)
    # The same minimum as an ordinary least squares problem with the penalty as further rows.
    z = (x.astype(np.float64) - fitted.mean) / fitted.scale
    targets = np.eye(3)[labels]
    rows = np.vstack([z, np.sqrt(probe.PENALTY * len(x)) * np.eye(12)])
    weight = np.linalg.lstsq(rows, np.vstack([targets - targets.mean(axis=0), np.zeros((12, 3))]), rcond=None)[0]
    np.testing.assert_allclose(fitted.weight, weight, atol=1e-9)
    assert probe.accuracy(fitted, *clouds(1)).value > 80


def test_accuracy_is_counted_in_percent_and_non_finite_rows_are_wrong() -> None:
    fitted = probe.Probe(np.zeros(2), np.ones(2), np.eye(2), np.zeros(2))
    rows = np.array([[1, 0], [0, 1], [1, 0], [np.nan, 1], [1, np.inf]], dtype=np.float32)
    measured = probe.accuracy(fitted, rows, np.array([0, 1, 1, 1, 1]))
    assert measured.metric == "accuracy"
    assert measured.samples == 5
    assert measured.value == pytest.approx(40)
    assert measured.standard_error == pytest.approx(100 * np.sqrt(0.4 * 0.6 / 5))


def test_a_run_that_does_not_fit_is_one_line() -> None:
    batch = {"image": np.zeros((2, 3), np.float32)}
    with pytest.raises(DataError, match=r"returned the outputs \['y'\]: 'features' is needed"):
        probe.features(lambda _: {"y": np.zeros(2)}, [batch], "features")
    fitted = probe.Probe(np.zeros(2), np.ones(2), np.eye(2), np.zeros(2))
    with pytest.raises(DataError, match="1 rows for 2 items"):
        probe.accuracy(fitted, np.zeros((1, 2)), np.array([0, 1]))


def test_a_probe_is_computed_once_for_the_same_sources(cache: Path, tmp_path: Path) -> None:
    calls = []

    def compute() -> probe.Probe:
        calls.append(1)
        return probe.fit(*clouds(0))

    source = tmp_path / "weights"
    source.write_text("first")
    first, again = (probe.kept("toy", [source], compute) for _ in range(2))
    assert len(calls) == 1
    np.testing.assert_array_equal(first.weight, again.weight)
    source.write_text("second")
    probe.kept("toy", [source], compute)
    assert len(calls) == 2
    assert all(path.name.startswith("toy-") for path in (cache / "probes").iterdir())


# Every model


def noisy(run: Run, relative: float) -> Run:
    """Add noise to every output, in units of its standard deviation."""
    random = np.random.default_rng(0)

    def disturbed(batch: Batch) -> dict[str, np.ndarray]:
        outputs = run(batch)
        return {k: v + relative * v.std() * random.standard_normal(v.shape).astype(v.dtype) for k, v in outputs.items()}

    return disturbed


def assert_same(first: Sequence[Mapping[str, np.ndarray]], second: Sequence[Mapping[str, np.ndarray]]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


FETCHED = [pytest.param(minilm, marks=pytest.mark.models), pytest.param(mobilenet, marks=pytest.mark.models)]


@pytest.mark.parametrize("model", [residual, *FETCHED])
def test_build_and_calibration_agree_and_repeat(model: ModuleType) -> None:
    module, args, dynamic_shapes = model.build()
    assert not any(part.training for part in module.modules())
    assert args.keys() == dynamic_shapes.keys()
    assert all(args[name].shape[0] == 2 and axes[0] == "batch" for name, axes in dynamic_shapes.items())
    batches = list(model.calibration(batches=3, batch_size=4))
    assert_same(batches, list(model.calibration(batches=3, batch_size=4)))
    run = torch_run(module)
    for batch in batches:
        for name, array in batch.items():
            assert array.dtype == args[name].numpy().dtype
            assert array.shape[0] == 4
        assert all(len(rows) == 4 and np.isfinite(rows).all() for rows in run(batch).values())
    assert_same([run(batches[0])], [torch_run(model.build().module)(batches[0])])


# Measured in full: residual 85.3 (1000/1000), MobileNetV2 84.1 (2000/2000), MiniLM 73.8 (1200/600).
@pytest.mark.parametrize(
    ("model", "train", "test", "low", "high"),
    [
        (residual, 400, 300, 74, 92),
        pytest.param(mobilenet, 400, 200, 72, 90, marks=pytest.mark.models),
        pytest.param(minilm, 400, 160, 56, 80, marks=pytest.mark.models),
    ],
)
def test_float_accuracy_is_what_is_known_and_noise_costs_some(
    model: ModuleType, train: int, test: int, low: float, high: float
) -> None:
    run = torch_run(model.build().module)
    measured = model.evaluate(run, train=train, test=test)
    assert isinstance(measured, Evaluation)
    assert measured.metric == "accuracy"
    assert measured.samples == test
    assert low < measured.value < high
    assert 1 < measured.standard_error < 4
    assert model.evaluate(noisy(run, 30), train=train, test=50).value < measured.value / 2


# Residual network


def test_residual_needs_no_network_and_is_the_documented_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    module, args, _ = residual.build()
    convolve = torch.nn.functional.conv2d
    weights = dict(module.named_parameters())
    image = args["image"]
    inner = convolve(image, weights["conv1.weight"], weights["conv1.bias"], padding=1).clamp(min=0)
    skip = convolve(image, weights["conv3.weight"], weights["conv3.bias"])
    expected = convolve(inner, weights["conv2.weight"], weights["conv2.bias"], padding=1) + skip
    torch.testing.assert_close(module(image)["output"], expected)


def test_residual_data_of_different_seeds_differ() -> None:
    sets = [residual.gratings(seed, 20)[0] for seed in range(4)]
    assert len(np.unique(np.concatenate(sets).reshape(80, -1), axis=0)) == 80


# MobileNetV2


def test_mobilenet_has_the_published_parameters() -> None:
    module = mobilenet.MobileNetV2()
    assert sum(parameter.numel() for parameter in module.parameters()) == 3_504_872
    assert "features.17.conv.1.1.running_var" in module.state_dict()


@pytest.mark.parametrize("size", [28, 96, 97, 224])
def test_images_are_enlarged_as_torch_does_it(size: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    (batch,) = mobilenet._batches(images, 4, size)
    grey = torch.from_numpy(images)[:, None].float() / 255
    big = torch.nn.functional.interpolate(grey, (size, size), mode="bilinear", align_corners=False).expand(
        -1, 3, -1, -1
    )
    expected = (big.numpy() - mobilenet.MEAN) / mobilenet.DEVIATION
    assert batch["image"].dtype == np.float32
    np.testing.assert_allclose(batch["image"], expected, atol=2e-5)


@pytest.mark.models
def test_mobilenet_images_for_calibration_are_in_no_other_set() -> None:
    (train, labels), (test, _) = mobilenet._read("train"), mobilenet._read("t10k")
    assert train.shape == (60_000, 28, 28)
    assert sorted(np.unique(labels)) == list(range(10))
    calibration = {image.tobytes() for image in train[mobilenet.CALIBRATION_START :]}
    fitting = {image.tobytes() for image in train[: mobilenet.CALIBRATION_START]}
    assert calibration.isdisjoint(fitting)
    assert (calibration | fitting).isdisjoint({image.tobytes() for image in test})
    (batch,) = mobilenet.calibration(batches=1, batch_size=2)
    expected = next(mobilenet._batches(train[mobilenet.CALIBRATION_START :][:2], 2))
    assert_same([batch], [expected])


# MiniLM


@pytest.mark.models
def test_minilm_posts_for_calibration_are_in_no_other_set() -> None:
    groups = minilm.calibration_posts(), minilm.fitting_posts(), minilm.testing_posts()
    assert [len(group) for group in groups] == [2903, 8370, 7514]
    texts = [{post.text for post in group} for group in groups]
    assert len(set().union(*texts)) == sum(map(len, groups))
    assert all({post.label for post in group} == set(range(20)) for group in groups)


@pytest.mark.models
def test_minilm_batches_are_tokenized_and_padded() -> None:
    for batch in minilm.calibration(batches=2, batch_size=5, length=40):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape == batch["token_type_ids"].shape
        assert ids.shape[1] <= 40
        assert (ids[:, 0] == 101).all()  # [CLS]
        lengths = mask.sum(axis=1)
        assert lengths.max() == ids.shape[1]
        assert (ids[np.arange(5), lengths - 1] == 102).all()  # [SEP] ends what counts
        assert (ids[mask == 0] == 0).all()
        assert not batch["token_type_ids"].any()


@pytest.mark.models
def test_minilm_embeddings_are_unit_vectors_that_ignore_padding_and_know_meaning() -> None:
    run = torch_run(minilm.build().module)
    texts = [
        "A cat sits on the mat.",
        "A kitten is resting on the rug in the sun.",
        "The central bank raised its rates.",
    ]
    together = run(minilm._padded(minilm._tokenize(texts, 128)))["sentence_embedding"]
    alone = [run(minilm._padded(minilm._tokenize([text], 128)))["sentence_embedding"][0] for text in texts]
    assert together.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    similarity = together @ together.T
    assert similarity[0, 1] > 0.5 > 0.2 > similarity[0, 2]


# SmolLM2


def gguf_file(path: Path, tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]]) -> Path:
    """A file of version 3 with one key; each tensor is its type, its shape as stored, and its bytes."""

    def text(string: str) -> bytes:
        return struct.pack("<Q", len(string.encode())) + string.encode()

    keys = text("words") + struct.pack("<IIQ", 9, 8, 2) + text("one") + text("ü")
    head, body = b"", b""
    for name, (kind, shape, stored) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(body))
        body += stored + bytes(-len(stored) % 32)
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), 1) + keys + head
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return path


def test_gguf_blocks_are_expanded(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    plain = random.standard_normal((3, 5)).astype("<f4")
    scale, offset = random.standard_normal((2, 4, 2)).astype("<f2")
    bytes_ = random.integers(-128, 128, (4, 2, 32), dtype=np.int8)
    nibbles = random.integers(0, 16, (4, 2, 32), dtype=np.uint8)
    small, mixed = b"", b""
    for row in range(4):
        for block in range(2):
            small += scale[row, block].tobytes() + bytes_[row, block].tobytes()
            packed = nibbles[row, block, :16] | (nibbles[row, block, 16:] << 4)
            mixed += scale[row, block].tobytes() + offset[row, block].tobytes() + packed.tobytes()
    file = gguf_file(
        tmp_path / "m.gguf",
        {"f32": (0, (5, 3), plain.tobytes()), "q8_0": (8, (64, 4), small), "q4_1": (3, (64, 4), mixed)},
    )
    assert gguf.metadata(file) == {"words": ["one", "ü"]}
    found = dict(gguf.tensors(file))
    wide = scale.astype(np.float32)[..., None]
    np.testing.assert_array_equal(found["f32"], plain)
    np.testing.assert_array_equal(found["q8_0"], (wide * bytes_).reshape(4, 64))
    expected = wide * nibbles + offset.astype(np.float32)[..., None]
    np.testing.assert_allclose(found["q4_1"], expected.reshape(4, 64), rtol=1e-6)
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}


def test_other_files_and_types_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"PK" + bytes(100))
    with pytest.raises(DataError, match="not a GGUF file of version 2 or 3"):
        gguf.metadata(tmp_path / "other")
    file = gguf_file(tmp_path / "m.gguf", {"odd": (14, (32, 1), bytes(100))})
    with pytest.raises(DataError, match="GGUF tensor odd: type 14 is not one of"):
        list(gguf.tensors(file))


def test_losses_are_those_of_the_next_token() -> None:
    tokens = np.array([[1, 0, 2], [2, 2, 1]])
    logits = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    losses = smollm2.token_losses(lambda _: {"logits": logits}, {"input_ids": tokens})
    for row in range(2):
        for place in range(2):
            likelihood = np.exp(logits[row, place]) / np.exp(logits[row, place]).sum()
            assert losses[row, place] == pytest.approx(-np.log(likelihood[tokens[row, place + 1]]), rel=1e-5)
    with pytest.raises(DataError, match="no logits for each token"):
        smollm2.token_losses(lambda _: {"logits": logits[:, :2]}, {"input_ids": tokens})


@pytest.mark.models
def test_smollm2_texts_are_split_and_tokenized_as_its_authors_do() -> None:
    splits = [set(smollm2._in_turn(name)) for name in ("calibration", "test")]
    assert splits[0].isdisjoint(splits[1])
    assert [len(split) for split in splits] == [82, 198]
    tokenizer = smollm2._tokenizer()
    assert tokenizer.encode("Hello world 12 Ross: it\u2019s\n").tokens == [
        *("Hello", "Ġworld", "Ġ", "1", "2", "ĠRoss", ":", "Ġit", "âĢĻ", "s", "Ċ")
    ]
    first, second = smollm2.calibration(batches=2, batch_size=3, length=40)
    assert first["input_ids"].shape == second["input_ids"].shape == (3, 40)
    assert first["input_ids"].dtype == np.int64


@pytest.mark.models
def test_smollm2_predicts_text_with_massive_activations_at_the_first_token() -> None:
    example = smollm2.build()
    assert sum(parameter.numel() for parameter in example.module.parameters()) == 134_515_008
    inputs: dict[str, torch.Tensor] = {}
    (down,) = [part for name, part in example.module.named_modules() if name.endswith("layers.11.mlp.down_proj")]
    down.register_forward_pre_hook(lambda _, args: inputs.update(down=args[0]))
    run = torch_run(example.module)
    measured = smollm2.evaluate(run, batches=1, batch_size=2, length=48)
    assert (measured.metric, measured.unit, measured.samples) == ("perplexity", "", 2 * 47)
    assert 10 < measured.value < 200  # by chance: 49152
    reach = inputs["down"].abs().amax((0, 2))
    assert reach[0] > 20 * reach[1:].max()
    tokenizer = smollm2._tokenizer()
    question = np.array([tokenizer.encode("The capital of France is").ids])
    answer = int(run({"input_ids": question})["logits"][0, -1].argmax())
    assert tokenizer.decode([answer]) == " Paris"
