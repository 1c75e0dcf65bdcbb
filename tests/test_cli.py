"""The command line as a user meets it: results that read well, and bad input that ends in one line."""

import contextlib
import errno
import json
import math
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

import qonnx
from qonnx import cli
from qonnx.comparison import Comparison, Difference
from qonnx.plan import LayerPlan, QuantPlan
from qonnx.recipe import RECIPES, load_recipe
from qonnx.result import Result
from qonnx.runtime import Optimization
from qonnx.statistics import Statistics
from qonnx.tables import comparison_tables, result_tables
from qonnx.targets import TARGETS
from tests.graphs import model_of
from tests.test_calibrate import assert_same

MLP = (
    "g (float[batch,32] x, int64[batch,1] ids, float[32,64] w, float[64] b, float[64,32] w2, float[7,32] table)"
    " => (float[batch,32] y, int64[batch,1] copy) "
    "{ [fc1] a = Gemm(x, w, b) r = Relu(a) [fc2] z = MatMul(r, w2) k = Constant<value_ints=[-1,32]>()"
    " e = Gather(table, ids) f = Reshape(e, k) y = Add(z, f) copy = Identity(ids) }"
)
ROOT = Path(qonnx.__file__).parents[1]

QUANTIZE = "quantize model.onnx --data calib -o out.onnx"
CALIBRATE = "calibrate model.onnx --data calib -o out.npz"
COMPARE = "compare model.onnx quantized.onnx --data calib"
ENGINE = "engine quantized.onnx -o out.plan"


class Done(NamedTuple):
    code: int
    out: str
    err: str


Qonnx = Callable[..., Done]
Setup = Callable[[Path], object]


@pytest.fixture
def qonnx_(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Qonnx:
    """Runs a command line in this process."""

    def run(line: str, *more: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["qonnx", *line.split(), *more])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    # The handlers are for a process of its own.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return run


def subprocess_of(line: str, cwd: Path, before: str = "", **environment: str) -> Done:
    """Runs a command line in a process of its own, after some Python code."""
    code = f"{before}\nfrom qonnx.cli import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code, *line.split()],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def batches(count: int = 4) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {"x": rng.standard_normal((8, 32)).astype(np.float32), "ids": rng.integers(0, 7, (8, 1))} for _ in range(count)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, with weights inside and beside it, data, a quantized model and its plan."""
    folder = tmp_path_factory.mktemp("made")
    model = model_of(MLP, weights="w b w2 table", scale=0.2)
    ir.save(model, folder / "model.onnx")
    ir.save(model, folder / "external.onnx", external_data="external.onnx.data", size_threshold_bytes=0)
    (folder / "calib").mkdir()
    for number, batch in enumerate(batches()):
        np.savez(folder / "calib" / f"{number}.npz", **batch)
    result = qonnx.quantize(folder / "model.onnx", folder / "calib", folder / "quantized.onnx")
    result.plan.save(folder / "plan.json")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `made` as the current directory."""
    copy = tmp_path / "work"
    shutil.copytree(made, copy)
    monkeypatch.chdir(copy)
    return copy


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, hidden files too, and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_refused(done: Done, folder: Path, before: Mapping[str, bytes | None], *words: str) -> None:
    assert done.code == 2, done
    assert done.err.startswith("error: "), done.err
    assert done.err.count("\n") == 1, done.err
    assert done.err.endswith("\n")
    assert done.out == ""
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err, (word, done.err)
    assert listing(folder) == before


# --- models ---------------------------------------------------------------------------------------------------------


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def external(change: Setup) -> Setup:
    def setup(folder: Path) -> None:
        for name in ("model.onnx", "quantized.onnx"):
            shutil.copy(folder / "external.onnx", folder / name)
        change(folder)

    return setup


def both(change: Callable[[Path], object]) -> Setup:
    def setup(folder: Path) -> None:
        for name in ("model.onnx", "quantized.onnx"):
            change(folder / name)

    return setup


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


BAD_MODELS: dict[str, tuple[Setup, str]] = {
    "missing": (both(Path.unlink), "no such file"),
    "a folder": (both(folder_instead), "is a folder; give an ONNX file"),
    "empty": (both(lambda path: path.write_bytes(b"")), "not an ONNX model"),
    "text": (both(lambda path: path.write_text("this is no model\n" * 9)), "not a readable ONNX model"),
    "noise": (both(lambda path: path.write_bytes(bytes(range(256)) * 9)), "not a readable ONNX model"),
    "truncated": (both(lambda path: cut(path, path.stat().st_size // 2)), "not a readable ONNX model"),
    "truncated at the end": (both(lambda path: cut(path, path.stat().st_size - 9)), "ONNX model"),
    "external data missing": (
        external(lambda folder: (folder / "external.onnx.data").unlink()),
        "is stored in external.onnx.data, which is not beside the model",
    ),
    "external data truncated": (
        external(lambda folder: cut(folder / "external.onnx.data", 5000)),
        "external.onnx.data is cut short",
    ),
}


@pytest.mark.parametrize("bad", BAD_MODELS)
@pytest.mark.parametrize("line", [QUANTIZE, CALIBRATE, COMPARE, ENGINE, "view model.onnx"], ids=lambda x: x.split()[0])
def test_a_model_that_cannot_be_read(qonnx_: Qonnx, folder: Path, line: str, bad: str) -> None:
    setup, words = BAD_MODELS[bad]
    setup(folder)
    before = listing(folder)
    assert_refused(qonnx_(line), folder, before, line.split()[1], words)


# --- data -----------------------------------------------------------------------------------------------------------


def saved(change: Callable[[dict[str, Any]], object]) -> Setup:
    """Changes one batch."""

    def setup(folder: Path) -> None:
        batch = batches(1)[0]
        change(batch)
        np.savez(folder / "calib" / "2.npz", **batch)

    return setup


def emptied(folder: Path) -> None:
    for file in (folder / "calib").iterdir():
        file.unlink()


def text_instead(folder: Path) -> None:
    emptied(folder)
    (folder / "calib" / "readme.txt").write_text("no data")


def with_value(value: float) -> Setup:
    return saved(lambda batch: batch["x"].__setitem__((1, 2), value))


BAD_DATA: dict[str, tuple[Setup, str]] = {
    "missing": (lambda folder: shutil.rmtree(folder / "calib"), "calib: no such file or folder"),
    "empty folder": (emptied, "calib: the folder holds no .npz file"),
    "folder of text": (text_instead, "calib: the folder holds no .npz file"),
    "damaged": (lambda folder: cut(folder / "calib" / "2.npz", 100), "2.npz: cannot be read"),
    "text named npz": (lambda folder: (folder / "calib" / "2.npz").write_text("x"), "2.npz: cannot be read"),
    "no arrays": (lambda folder: np.savez(folder / "calib" / "2.npz"), "2.npz: input 'x' is missing"),
    "wrong name": (saved(lambda batch: batch.update(image=batch.pop("x"))), "input 'x' is missing; given ids, image"),
    "wrong size": (
        saved(lambda batch: batch.update(x=batch["x"][:, 1:])),
        "shape [8, 31], the model takes [batch, 32]",
    ),
    "wrong rank": (saved(lambda batch: batch.update(x=batch["x"][0])), "add the batch dimension"),
    "unequal batches": (saved(lambda batch: batch.update(x=batch["x"][1:])), "for dimension 'batch'"),
    "integers": (
        saved(lambda batch: batch.update(x=np.ones((8, 32), np.int32))),
        "holds int32, the model takes float32",
    ),
    "text arrays": (saved(lambda batch: batch.update(x=np.full((8, 32), "a"))), "the model takes float32"),
    "pickled": (saved(lambda batch: batch.update(x=np.array([{}] * 8, object))), "2.npz: cannot be read"),
    "no samples": (saved(lambda batch: batch.update(x=batch["x"][:0], ids=batch["ids"][:0])), "is empty"),
    "NaN": (with_value(np.nan), "holds 1 NaN and 0 infinite values out of 256"),
    "infinite": (with_value(np.inf), "holds 0 NaN and 1 infinite values out of 256"),
    "out of bounds": (saved(lambda batch: batch["ids"].__setitem__((0, 0), 99)), "does not run on this batch"),
}


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        pytest.param(line, bad, id=f"{line.split()[0]}: {bad}")
        for line in (QUANTIZE, CALIBRATE, COMPARE)
        for bad in BAD_DATA
        if (line, bad) != (CALIBRATE, "out of bounds")  # no observed tensor depends on these
    ],
)
def test_data_that_do_not_fit(qonnx_: Qonnx, folder: Path, line: str, bad: str) -> None:
    setup, words = BAD_DATA[bad]
    setup(folder)
    before = listing(folder)
    assert_refused(qonnx_(line), folder, before, words)


# --- outputs --------------------------------------------------------------------------------------------------------

WRITERS = [
    "quantize model.onnx --data calib -o",
    QUANTIZE + " --save-plan",
    QUANTIZE + " --json",
    "calibrate model.onnx --data calib -o",
    CALIBRATE + " --cache",
    COMPARE + " --json",
    "engine quantized.onnx -o",
    "export factories:build -o",
]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("results", "results: is a folder"),
        ("nowhere/out", "the folder nowhere does not exist"),
        ("plan.json/out", "the folder plan.json does not exist"),
        ("", "is a folder"),
    ],
)
@pytest.mark.parametrize("line", WRITERS)
def test_an_output_that_cannot_be_written(qonnx_: Qonnx, folder: Path, line: str, output: str, words: str) -> None:
    (folder / "results").mkdir()
    before = listing(folder)
    assert_refused(qonnx_(line, output), folder, before, words)


@pytest.mark.parametrize("line", WRITERS)
def test_a_folder_that_is_read_only(qonnx_: Qonnx, folder: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    before = listing(folder)
    assert_refused(qonnx_(line, "out"), folder, before, "cannot write here (Permission denied); choose another folder")


@pytest.mark.parametrize(
    "line",
    [
        "quantize model.onnx --data calib -o model.onnx",
        "quantize model.onnx --data calib -o ./calib/../model.onnx",
        QUANTIZE + " --save-plan model.onnx",
        QUANTIZE + " --save-plan out.onnx",
        QUANTIZE + " --save-plan out.json --json out.json",
        QUANTIZE + " --plan plan.json --json plan.json",
        "quantize model.onnx --data calib/0.npz -o calib/0.npz",
        "calibrate model.onnx --data calib -o model.onnx",
        CALIBRATE + " --cache out.npz",
        CALIBRATE + " --cache model.onnx",
        COMPARE + " --json quantized.onnx",
        "engine quantized.onnx -o quantized.onnx",
    ],
)
def test_an_output_that_is_an_input(qonnx_: Qonnx, folder: Path, line: str) -> None:
    before = listing(folder)
    assert_refused(qonnx_(line), folder, before, "would overwrite", "choose another name")


@pytest.mark.parametrize("line", [QUANTIZE, CALIBRATE.replace("out.npz", "out.onnx")])
def test_a_disk_that_is_full(folder: Path, line: str) -> None:
    (folder / "out.onnx").write_text("what was here before")
    before = listing(folder)
    # Files that grow beyond this give an OSError, as on a full disk.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    done = subprocess_of(line, folder, limit)
    assert_refused(done, folder, before, "File too large")


# --- settings -------------------------------------------------------------------------------------------------------


def written(name: str, text: str) -> Setup:
    return lambda folder: (folder / name).write_text(text)


def nothing(folder: Path) -> None:
    """No setup."""


def other_model(folder: Path) -> None:
    text = MLP.replace("[fc1]", "[first]").replace("[fc2]", "[second]")
    ir.save(model_of(text, weights="w b w2 table"), folder / "model.onnx")


def wider_model(folder: Path) -> None:
    """The same names, other sizes."""
    text = MLP.replace(",64]", ",96]").replace("[64", "[96")
    ir.save(model_of(text, weights="w b w2 table"), folder / "model.onnx")


def edited_plan(**changes: object) -> Setup:
    def setup(folder: Path) -> None:
        plan = json.loads((folder / "plan.json").read_text())
        for key, change in changes.items():
            plan["activations"][0][key] = change
        (folder / "plan.json").write_text(json.dumps(plan))

    return setup


BAD_SETTINGS: list[tuple[str, Setup, str, str]] = [
    ("unknown recipe", nothing, "--recipe int9", "unknown recipe 'int9': neither a file nor one of int8"),
    ("recipe missing", nothing, "--recipe mine.yaml", "unknown recipe 'mine.yaml'"),
    ("recipe key", written("mine.yaml", "nam: x"), "--recipe mine.yaml", "unknown key `nam`"),
    ("recipe not YAML", written("mine.yaml", "a: [1"), "--recipe mine.yaml", "not readable as YAML"),
    ("recipe a list", written("mine.yaml", "- 1"), "--recipe mine.yaml", "expected keys and values"),
    ("recipe empty", written("mine.yaml", ""), "--recipe mine.yaml", "expected keys and values"),
    ("recipe a model", nothing, "--recipe model.onnx", "recipe model.onnx: not readable as YAML"),
    ("recipe a folder", nothing, "--recipe calib", "unknown recipe 'calib'"),
    ("set without =", nothing, "--set weights", "expected KEY=VALUE"),
    ("set without key", nothing, "--set =3", "expected KEY=VALUE"),
    ("set unknown key", nothing, "--set weigths.dtype=int8", "unknown key `weigths`"),
    ("set unknown value", nothing, "--set weights.dtype=int9", "in weights.dtype"),
    ("set wrong type", nothing, "--set goal_sqnr_db=high", "in goal_sqnr_db"),
    ("set below a value", nothing, "--set weights.dtype.bits=4", "dtype holds a value"),
    ("set unknown kind", nothing, "--set activations.calibrator.kind=magic", "in activations.calibrator"),
    ("unknown target", nothing, "--target h900", "unknown target 'h900'; choose one of a800"),
    ("not for the target", nothing, "--set activations.dtype=uint8", "do not run on a800; use int8"),
    ("plan missing", nothing, "--plan nowhere.json", "plan nowhere.json: cannot be read (No such file or directory)"),
    ("plan a folder", nothing, "--plan calib", "plan calib: cannot be read (Is a directory)"),
    ("plan not JSON", nothing, "--plan model.onnx", "plan model.onnx: not a valid plan"),
    ("plan of another model", other_model, "--plan plan.json", "no node 'fc1'; make the plan again for this model"),
    ("plan of a wider model", wider_model, "--plan plan.json", "plan"),
    ("plan with unknown type", edited_plan(dtype="int9"), "--plan plan.json", "not a valid plan"),
    ("plan and recipe", nothing, "--plan plan.json --recipe int8", "leave out --recipe and --set"),
    ("no batches", nothing, "--max-batches 0", "'--max-batches'"),
]


@pytest.mark.parametrize(("setup", "options", "words"), [pytest.param(*case[1:], id=case[0]) for case in BAD_SETTINGS])
def test_settings_that_make_no_sense(qonnx_: Qonnx, folder: Path, setup: Setup, options: str, words: str) -> None:
    setup(folder)
    before = listing(folder)
    assert_refused(qonnx_(f"{QUANTIZE} {options}"), folder, before, words)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("quantise", "No such command 'quantise'"),
        ("quantize", "Missing argument 'MODEL.onnx'"),
        ("quantize model.onnx --data calib", "Missing option '-o' / '--output'"),
        (QUANTIZE + " --bits 4", "No such option: --bits"),
        (QUANTIZE + " more", "unexpected extra argument(s) (more)"),
        (QUANTIZE + " --max-batches many", "Invalid value for '--max-batches'"),
        ("compare model.onnx --data calib", "Missing argument 'QUANTIZED.onnx'"),
        (CALIBRATE + " --target h900", "unknown target 'h900'"),
        (CALIBRATE + " --cache c --tensorrt-version 11.0.0", "TensorRT 11.0.0 reads no calibration cache"),
        (CALIBRATE + " --cache c --tensorrt-version new", "TensorRT version 'new'"),
        (CALIBRATE + " --cache c --calibrator auto", "name one calibrator for the cache"),
        (CALIBRATE + " --cache c --calibrator kl", "kl"),
        (CALIBRATE + " --device tpu", "unknown device 'tpu'; choose one of cpu, cuda"),
        (QUANTIZE + " --device tpu", "unknown device 'tpu'; choose one of cpu, cuda"),
        (CALIBRATE + " --resume", "out.partial.npz: no such file, so nothing was stopped here; leave out --resume"),
        (CALIBRATE + " --merge nowhere.npz", "nowhere.npz: no such file; `qonnx calibrate` writes one"),
        ("calibrate model.onnx -o out.npz", "--data is missing: give a folder of .npz files"),
        ("calibrate model.onnx -o out.npz --resume --merge calib/0.npz", "--data is missing"),
        (QUANTIZE + " --statistics calib/0.npz", "calib/0.npz: not a file of statistics; `qonnx calibrate` writes one"),
        (QUANTIZE + " --statistics nowhere.npz", "nowhere.npz: no such file; `qonnx calibrate` writes one"),
        ("recipes int9", "unknown recipe 'int9'"),
        (ENGINE + " --target h900", "unknown target 'h900'"),
        (ENGINE + " --target ort-cpu", "target 'ort-cpu' runs no TensorRT engine"),
        (ENGINE + " --dim batch=8", "--dim batch=8: give NAME=MIN,USUAL,MAX, such as sequence=1,128,256"),
        (ENGINE + " --dim batch=1,a,3", "--dim batch=1,a,3: give NAME=MIN,USUAL,MAX"),
        (ENGINE + " --dim length=1,2,3", "names 'length', which the model does not have; it has 'batch'"),
        (ENGINE + " --dim batch=9,2,3", "not (smallest, usual, largest) in ascending order"),
    ],
)
def test_command_lines_that_make_no_sense(qonnx_: Qonnx, folder: Path, line: str, words: str) -> None:
    before = listing(folder)
    assert_refused(qonnx_(line), folder, before, words)


def test_a_model_that_is_quantized_already(qonnx_: Qonnx, folder: Path) -> None:
    shutil.copy(folder / "quantized.onnx", folder / "model.onnx")
    before = listing(folder)
    for line in (QUANTIZE, CALIBRATE):
        assert_refused(qonnx_(line), folder, before, "quantized already; give the float model that it was made from")


def test_models_that_cannot_be_compared(qonnx_: Qonnx, folder: Path) -> None:
    text = MLP.replace("y = Add", "other = Add").replace("[batch,32] y,", "[batch,32] other,")
    ir.save(model_of(text, weights="w b w2 table"), folder / "quantized.onnx")
    before = listing(folder)
    assert_refused(qonnx_(COMPARE), folder, before, "has no output 'y', it has other, copy; compare like with like")


# --- packages that are not installed --------------------------------------------------------------------------------

FACTORY = """
import torch
def build():
    torch.manual_seed(0)
    return torch.nn.Linear(32, 32), {"input": torch.ones(2, 32)}, {"input": {0: "batch"}}
def broken():
    raise ValueError("no weights here")
"""

# Run before the command: hides a package as if it were not installed.
HIDE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name.partition(".")[0] == {package!r} else find(name, *more)
"""


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Makes a package look as if it were not installed."""
    find = PathFinder.find_spec

    def find_spec(name: str, *more: Any) -> Any:
        return None if name.partition(".")[0] == package else find(name, *more)

    monkeypatch.setattr(PathFinder, "find_spec", find_spec)
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("package", "line", "words"),
    [
        ("onnxruntime", QUANTIZE, "needs ONNX Runtime: pip install 'qonnx-pipeline[cpu]'"),
        ("onnxruntime", CALIBRATE, "needs ONNX Runtime: pip install 'qonnx-pipeline[cpu]'"),
        ("onnxruntime", COMPARE, "needs ONNX Runtime: pip install 'qonnx-pipeline[cpu]'"),
        ("onnxruntime", "export factories:build -o out.onnx", "needs ONNX Runtime: pip install 'qonnx-pipeline[cpu]'"),
        ("tensorrt_rtx", ENGINE, "pip install 'qonnx-pipeline[rtx]'"),
        ("netron", "view model.onnx", "pip install 'qonnx-pipeline[view]'"),
        ("transformers", "export directory -o out.onnx", "pip install 'qonnx-pipeline[hf]'"),
    ],
)
def test_a_package_that_is_not_installed(
    qonnx_: Qonnx, folder: Path, package: str, line: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "factories.py").write_text(FACTORY)
    (folder / "directory").mkdir()
    (folder / "directory" / "config.json").write_text("{}")
    hide(monkeypatch, package)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = listing(folder)
    assert_refused(qonnx_(line), folder, before, words)


@pytest.mark.parametrize(
    ("package", "line", "words"),
    [
        ("onnxruntime", QUANTIZE, "pip install 'qonnx-pipeline[cpu]'"),
        ("torch", "export factories:build -o out.onnx", "pip install 'qonnx-pipeline[torch]'"),
    ],
)
def test_a_package_that_is_not_installed_in_a_process_of_its_own(
    folder: Path, package: str, line: str, words: str
) -> None:
    before = listing(folder)
    assert_refused(subprocess_of(line, folder, HIDE.format(package=package)), folder, before, words)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("factories", "is neither a directory nor PACKAGE.MODULE:FACTORY"),
        ("nowhere:build", "nowhere cannot be imported"),
        ("factories:made", "factories has no function 'made'"),
        ("factories:broken", "factories:broken failed: ValueError: no weights here"),
        ("calib", "calib: no config.json in it"),
        ("factories:build --opset 26", "opset 26 cannot be exported: choose one from 18 to 25"),
    ],
)
def test_a_source_that_cannot_be_exported(
    qonnx_: Qonnx, folder: Path, source: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "factories.py").write_text(FACTORY)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    before = listing(folder)
    assert_refused(qonnx_(f"export {source} -o out.onnx"), folder, before, words)


# --- results --------------------------------------------------------------------------------------------------------


def test_the_whole_way(qonnx_: Qonnx, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "factories.py").write_text(FACTORY)
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    (folder / "data").mkdir()
    for number, batch in enumerate(batches(10)):
        np.savez(folder / "data" / f"{number}.npz", input=batch["x"])
    assert qonnx_("export factories:build -o linear.onnx") == Done(0, "wrote linear.onnx\n", "")
    done = qonnx_("export factories:build -o again.onnx --no-verify --opset 20")
    assert done == Done(0, "wrote again.onnx, not compared with torch\n", "")
    done = qonnx_("calibrate linear.onnx --data data -o statistics.npz --max-batches 5")
    assert done == Done(0, "wrote statistics.npz: 1 tensor over 5 batches\n", "")
    assert Statistics.load("statistics.npz").samples == 40
    options = "--cache c.cache --tensorrt-version 8.6.1 --calibrator minmax"
    done = qonnx_(f"calibrate linear.onnx --data data -o s.npz {options}")
    assert done.out.endswith("\nwrote c.cache: ranges by minmax, for TensorRT 8.6.1\n")
    assert Path("c.cache").read_text().startswith("TRT-8601-EntropyCalibration2\ninput: ")
    done = qonnx_("quantize linear.onnx --data data -o linear-int8.onnx")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("linear-int8.onnx: ready; outputs keep ")
    assert done.out.splitlines()[0].endswith(" of the signal), judged on 2 held-back batches")
    assert done.out.endswith("\nnext: qonnx engine linear-int8.onnx -o linear-int8.plan --target a800\n")
    done = qonnx_("quantize linear.onnx --data data -o again.onnx --statistics statistics.npz")
    assert (done.code, done.err) == (0, "")
    assert "layers    1 of 1 on integers\n" in done.out
    done = qonnx_("compare linear.onnx linear-int8.onnx --data data --max-batches 3")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0].endswith("on 3 batches")


@pytest.mark.rtx
def test_the_command_that_is_suggested_runs_where_sizes_are_dynamic(qonnx_: Qonnx, folder: Path) -> None:
    text = "g (float[batch,sequence,32] x, float[32,32] w) => (float[batch,sequence,32] y) { y = MatMul(x, w) }"
    ir.save(model_of(text, weights="w"), folder / "sequence.onnx")
    (folder / "my data").mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        np.savez(folder / "my data" / f"{number}.npz", x=rng.standard_normal((4, 3 + number, 32)).astype(np.float32))
    done = qonnx_("quantize sequence.onnx -o out.onnx --data", "my data")
    suggested = shlex.split(done.out.splitlines()[-1])
    assert suggested[:2] == ["next:", "qonnx"]
    built = qonnx_(suggested[2], *suggested[3:])
    assert (built.code, built.err) == (0, "")
    assert re.search(r"^shapes +x 1x3x32 4x\d+x32 4x10x32$", built.out, re.MULTILINE)


def test_lint_finds_and_repairs(qonnx_: Qonnx, folder: Path) -> None:
    clean = qonnx_("lint quantized.onnx --json")
    assert (clean.code, clean.err) == (0, "")
    assert not [entry for entry in json.loads(clean.out)["findings"] if entry["severity"] == "error"]
    text = "g (float[4,32] x, float[32,32] w, float s, uint8 z) => (float[4,32] y) "
    named = "[quantize_a_tensor_whose_name_is_longer_than_a_column]"
    nodes = f"{{ {named} q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, w) }}"
    bad = model_of(text + nodes, weights="w s z", scale=3.0)
    for name, value in (("s", np.float32(0.1)), ("z", np.uint8(128))):
        bad.graph.initializers[name].const_value = ir.tensor(value, name=name)
    ir.save(bad, folder / "bad.onnx")
    found = qonnx_("lint bad.onnx --json")
    assert found.code == 1
    assert {entry["severity"] for entry in json.loads(found.out)["findings"]} >= {"error"}
    names = {entry["node"] for entry in json.loads(found.out)["findings"]}
    assert len(max(names, key=len)) > 40
    listed = qonnx_("lint bad.onnx")
    assert listed.code == 1
    assert all(name in listed.out for name in names), "a folded name cannot be searched for"
    fixed = qonnx_("lint bad.onnx --fix -o fixed.onnx")
    assert (fixed.code, fixed.err) == (0, "")
    assert re.search(r"^E1 .* quantize_a_tensor_whose_name_is_longer_than_a_column$", fixed.out, re.MULTILINE)
    assert qonnx_("lint fixed.onnx").code == 0
    assert_refused(qonnx_("lint bad.onnx --fix"), folder, listing(folder), "--output")
    assert "not quantized" not in qonnx_("lint quantized.onnx").out


def test_lint_says_that_a_float_model_is_one(qonnx_: Qonnx, folder: Path) -> None:
    model = ir.load(folder / "model.onnx")
    for value in model.graph.inputs:
        value.shape = ir.Shape([2, *(value.shape or ())[1:]])
    ir.save(model, folder / "fixed_size.onnx")
    done = qonnx_("lint fixed_size.onnx")
    assert done.code == 0
    assert "nothing found" in done.out
    assert "the graph is not quantized" in done.out
    assert "next: qonnx quantize fixed_size.onnx --data FOLDER" in done.out


def test_the_roofline_needs_no_gpu(qonnx_: Qonnx, folder: Path) -> None:
    done = qonnx_("roofline model.onnx --device a800 --dim batch=8")
    assert (done.code, done.err) == (0, "")
    assert "int8" in done.out
    assert_refused(qonnx_("roofline model.onnx --device a801"), folder, listing(folder), "a801")


def test_everything_quantize_writes(qonnx_: Qonnx, folder: Path) -> None:
    done = qonnx_(QUANTIZE + " --save-plan made.json --json run.json")
    assert done.code == 0
    assert (folder / "out.onnx").read_bytes() == (folder / "quantized.onnx").read_bytes()
    assert (folder / "made.json").read_text() == (folder / "plan.json").read_text()
    run = json.loads((folder / "run.json").read_text())
    assert run["output"] == "out.onnx"
    assert run["comparison"]["outputs"][0]["sqnr_db"] > 16
    assert run["comparison"]["outputs"][0]["agreement"] is None
    assert run["plan"] == json.loads((folder / "plan.json").read_text())
    assert set(run["seconds"]) >= {"prepare", "calibrate"}
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []
    done = qonnx_("quantize model.onnx --data calib -o same.onnx --plan made.json")
    assert done.code == 0
    assert [node.op_type for node in ir.load(folder / "same.onnx").graph] == [
        node.op_type for node in ir.load(folder / "out.onnx").graph
    ]


def test_settings_reach_the_plan(qonnx_: Qonnx, folder: Path) -> None:
    recipe = "name: mine\nrules:\n  - match: {name: fc1}\n    skip: true\n"
    (folder / "mine.yaml").write_text(recipe)
    options = "--recipe mine.yaml --set activations.calibrator.kind=minmax --set weights.granularity.kind=per_tensor"
    done = qonnx_(f"{QUANTIZE} --save-plan out.json --target ort-cpu --max-batches 3 {options}")
    assert done.code == 0
    plan = QuantPlan.load("out.json")
    assert (plan.target, plan.recipe) == ("ort-cpu", "mine")
    assert [layer.node for layer in plan.quantized_layers] == ["fc2"]
    assert {tensor.source for tensor in plan.activations} == {"minmax"}
    assert all(len(tensor.scale) == 1 for tensor in plan.weights)
    assert "made for  ort-cpu with recipe mine\n" in done.out
    assert "left in float: 1 of 2 layers\n  fc1 (Gemm): rule 1 of the recipe\n" in done.out
    assert "warning: one batch was held back" in done.out


def test_few_samples_serve_for_both_and_it_says_so(qonnx_: Qonnx, folder: Path) -> None:
    with np.load(folder / "calib" / "0.npz") as whole:
        few = {name: array[:2] for name, array in whole.items()}
    np.savez(folder / "calib" / "0.npz", **few)
    done = qonnx_("quantize model.onnx --data calib/0.npz -o out.onnx")
    assert done.code == 0
    verdict, warning, *rest = done.out.splitlines()
    assert verdict.startswith("out.onnx: check it before use; outputs keep")
    assert warning == "warning: only one batch was given: the comparison uses the batch that calibration saw"
    assert rest[-1] == "next: qonnx compare model.onnx out.onnx --data calib/0.npz --layers"


def test_a_goal_that_is_missed_is_the_first_thing_said(qonnx_: Qonnx, folder: Path) -> None:
    done = qonnx_(QUANTIZE + " --set goal_sqnr_db=99")
    assert done.code == 0
    verdict, warning, *_ = done.out.splitlines()
    assert verdict.startswith("out.onnx: check it before use; outputs keep")
    assert warning.startswith("warning: output y keeps only")
    assert "what the outputs keep when only this layer is quantized\nSQNR dB\n" in done.out


def test_where_nothing_was_quantized_no_layers_are_to_be_compared(qonnx_: Qonnx, folder: Path) -> None:
    (folder / "none.yaml").write_text("rules:\n  - match: {op: '*'}\n    skip: true\n")
    for options in ("--recipe none.yaml", "--recipe none.yaml --set format=weight_only"):
        done = qonnx_(f"{QUANTIZE} {options}")
        assert done.code == 0
        assert "warning: no layer was quantized" in done.out
        assert "next: " not in done.out


def test_reasons_are_said_once_and_long_lists_are_cut_short() -> None:
    layers = [LayerPlan(f"fc{number}", "Gemm", "y", reason="too small") for number in range(3)]
    layers += [LayerPlan(f"conv{number}", "Conv", "y", reason=f"costs {number} dB") for number in range(20)]
    layers += [LayerPlan("last", "Gemm", "y", path="module.last")]
    found = Difference("y", 20.0, 0.99, 0.1, 0.01, math.nan, 8, 0, 0, 0)
    comparison = Comparison((found,), (), (), 1, Optimization.ALL)
    plan = QuantPlan("a800", "int8", (), (), tuple(layers))
    lines = [line.plain for line in result_tables(Result("q.onnx", plan, comparison, 1, 4000, 1000, 0, {}, (), ()))]
    assert (
        lines[0] == "q.onnx: ready; outputs keep 20.0 dB (the error is 10% of the signal), judged on 1 held-back batch"
    )
    start = lines.index("left in float: 23 of 24 layers")
    assert lines[start + 1 : start + 6] == [
        "  too small",
        "    fc0 (Gemm)",
        "    fc1 (Gemm)",
        "    fc2 (Gemm)",
        "  conv0 (Conv): costs 0 dB",
    ]
    assert lines[start + 14 :] == ["  ... and 11 more: --save-plan lists them all"]


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"nonfinite": 3}, "outputs are NaN or infinite where those of the float model are not, on 1 batch"),
        ({"sqnr_db": -math.inf}, "an output that is zero in float is not, on 1 batch"),
        ({"sqnr_db": math.nan, "mismatched_batches": 1}, "nothing could be compared, on 1 batch"),
        ({"sqnr_db": 46.0}, "outputs keep 46.0 dB (the error is 0.5% of the signal), on 1 batch"),
        (
            {"sqnr_db": 46.0, "variation_db": 9.0},
            "outputs keep 46.0 dB (the error is 0.5% of the signal), on 1 batch",
        ),
    ],
)
def test_verdicts(change: dict[str, Any], verdict: str) -> None:
    found = msgspec.structs.replace(Difference("y", 20.0, 0.99, 0.1, 0.01, math.nan, 8, 0, 0, 0), **change)
    lines = comparison_tables(Comparison((found,), (), (), 1, Optimization.ALL))
    assert lines[0].plain == verdict
    told = {"nonfinite", "mismatched_batches", "variation_db"}
    assert ("warning" in lines[1].plain) == bool(told & change.keys())


def test_layers_that_were_not_found_are_named() -> None:
    found = Difference("y", 20.0, 0.99, 0.1, 0.01, math.nan, 8, 0, 0, 0)
    missing = tuple(f"layer{number}" for number in range(14))
    lines = [line.plain for line in comparison_tables(Comparison((found,), (), missing, 1, Optimization.ALL))]
    start = lines.index("14 layers without a counterpart of that name")
    assert lines[start + 1 :] == [*(f"  {name}" for name in missing[:12]), "  ... and 2 more: --json lists them all"]


def test_comparison_of_layers(qonnx_: Qonnx, folder: Path) -> None:
    done = qonnx_(COMPARE + " --layers --json layers.json")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].startswith("outputs keep")
    assert lines[0].endswith("of the signal), 100% of integer outputs are equal, on 4 batches")
    header = lines.index("layers in network order; errors add up on the way") + 1
    assert lines[header].split() == ["SQNR", "dB", "cosine", "largest", "error"]
    assert [line.split(maxsplit=3)[3] for line in lines[header + 1 :]] == ["a (Gemm)", "z (MatMul)"]
    assert len(json.loads((folder / "layers.json").read_text())["layers"]) == 2


def test_a_model_compared_with_itself(qonnx_: Qonnx, folder: Path) -> None:
    done = qonnx_("compare model.onnx model.onnx --data calib")
    assert done.out.startswith("outputs are the same as in float, 100% of integer outputs are equal, on 4 batches\n")


@pytest.mark.rtx
def test_an_engine(qonnx_: Qonnx, folder: Path) -> None:
    done = qonnx_(ENGINE + " --dim batch=1,4,8 --layers")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("out.plan: 2 of 2 convolutions and matrix products run on INT8\n")
    assert "shapes    x 1x32 4x32 8x32\n" in done.out
    assert "\nlayers, those in float first\nreads       writes  copies  layer -> engine layer\n" in done.out
    assert "int8 float  float   0       fc1 (Gemm) -> " in done.out
    assert "\nkernels in order of execution\nreads" in done.out
    assert (folder / "out.plan").stat().st_size > 1000


@pytest.mark.rtx
def test_an_engine_as_json(qonnx_: Qonnx, folder: Path) -> None:
    assert qonnx_(ENGINE + " --float fp16 --level 1 --json engine.json").code == 0
    report = json.loads((folder / "engine.json").read_text())
    assert [(node["node"], node["planned"], node["int8"]) for node in report["nodes"]] == [
        ("fc1", True, True),
        ("fc2", True, True),
    ]
    assert {kind for layer in report["layers"] for kind in layer["outputs"]} >= {"float16", "float"}


def test_a_graph_is_shown(qonnx_: Qonnx, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    netron = types.SimpleNamespace(start=shown.append, wait=lambda: None)
    monkeypatch.setitem(sys.modules, "netron", netron)
    assert qonnx_("view model.onnx").code == 0
    assert shown == ["model.onnx"]


def test_recipes_can_be_started_from(qonnx_: Qonnx, folder: Path) -> None:
    import yaml

    everything = qonnx_("recipes").out
    assert [document["name"] for document in yaml.safe_load_all(everything)] == [recipe.name for recipe in RECIPES]
    for recipe in RECIPES:
        (folder / "mine.yaml").write_text(qonnx_(f"recipes {recipe.name}").out)
        assert load_recipe("mine.yaml") == recipe


def test_what_goes_into_a_pipe_is_neither_coloured_nor_folded(folder: Path) -> None:
    name = "a_module_with_a_long_name." * 6 + "projection"
    model = ir.load(folder / "model.onnx")
    model.graph.node("fc1").name = name
    ir.save(model, folder / "model.onnx")
    done = subprocess_of(QUANTIZE + " --set minimum_sqnr_db=99", folder, COLUMNS="40")
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    assert f"  {name} (Gemm): its input x would keep" in done.out
    assert all(line == line.rstrip() for line in done.out.splitlines())


def test_a_terminal_shows_progress_and_wraps_between_words(folder: Path) -> None:
    """In a terminal of 80 columns, colours and a line of progress; the line is gone at the end."""
    screen = terminal(QUANTIZE + " --set goal_sqnr_db=99", folder)
    assert "calibrat" in screen
    assert "\x1b[1;33mout.onnx: check it before use; outputs keep" in screen
    plain = re.sub(r"\x1b\[[\d;?]*\w", "", screen).replace("\r\n", "\n")
    result = plain[plain.index("out.onnx: check") :]
    assert not [line for line in result.splitlines() if len(line) > 80]
    assert re.search(r"\ngraph {5}99\.25 dB .*\n {10}\S", result)  # sentences are folded in their column
    assert "measure the task" in " ".join(result.split())
    assert re.search(r"\n {10}\d.* without embedding tables, which stay in float\n", result)
    bounds = re.sub(r"\x1b\[[\d;?]*\w", "", terminal("roofline model.onnx", folder)).replace("\r\n", "\n")
    facts = bounds[bounds.index("fp16  ") : bounds.index("layers, slowest first")]
    assert max(map(len, facts.splitlines())) <= 80


def terminal(line: str, cwd: Path) -> str:
    """Everything that a command writes to a terminal of 80 columns."""
    primary, secondary = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "CI"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "qonnx", *line.split()]
    child = subprocess.Popen(command, cwd=cwd, env=environment, stdout=secondary, stderr=secondary, stdin=secondary)
    os.close(secondary)
    received = b""
    with contextlib.suppress(OSError):  # the terminal ends with the process
        while chunk := os.read(primary, 65536):
            received += chunk
    os.close(primary)
    assert child.wait(timeout=60) == 0, received
    return received.decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_stopped_leaves_nothing(folder: Path, number: signal.Signals) -> None:
    stop = f"""
import os, qonnx.pipeline
def observe(*_, **__):
    os.kill(os.getpid(), {number.value})
    import time; time.sleep(60)
qonnx.pipeline.observe = observe
"""
    before = listing(folder)
    done = subprocess_of(QUANTIZE + " --save-plan out.json", folder, stop)
    assert done == Done(130, "", "stopped\n")
    assert listing(folder) == before


SLOW_AND_STOPPED = """
import itertools, os, signal, time
from qonnx import observation
ran = itertools.count()
class Slow(observation.Session):
    def run(self, *arguments, **options):
        if next(ran) == 3 + 2:  # three runs tell whether samples are independent
            time.sleep(0.2)
            os.kill(os.getpid(), signal.{name})
            time.sleep(0.2)
        return super().run(*arguments, **options)
opened = observation.observing_session
def session(*arguments, **options):
    runner = opened(*arguments, **options)
    runner.__class__ = Slow
    return runner
observation.observing_session = session
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_calibration_that_is_stopped_goes_on_later(qonnx_: Qonnx, folder: Path, name: str) -> None:
    before = listing(folder)
    done = subprocess_of(CALIBRATE, folder, SLOW_AND_STOPPED.replace("{name}", name))
    assert listing(folder).keys() - before.keys() == {"out.partial.npz"}, done
    count = Statistics.load("out.partial.npz").batches
    assert count in (3, 4)  # another may have been running
    kept = f"stopped after {count} batches, kept in out.partial.npz: the same command with --resume goes on\n"
    assert done == Done(130, "", kept)
    stopped = listing(folder)
    assert_refused(qonnx_(CALIBRATE), folder, stopped, "out.partial.npz: kept from a run that was stopped; go on with")
    assert qonnx_(CALIBRATE + " --resume") == Done(0, "wrote out.npz: 2 tensors over 4 batches\n", "")
    assert listing(folder).keys() - before.keys() == {"out.npz"}
    resumed = Statistics.load("out.npz")
    assert qonnx_(CALIBRATE).code == 0
    assert_same(resumed, Statistics.load("out.npz"))


def test_an_earlier_result_survives_a_run_that_is_stopped(qonnx_: Qonnx, folder: Path) -> None:
    assert qonnx_(CALIBRATE).code == 0
    before = (folder / "out.npz").read_bytes()
    assert subprocess_of(CALIBRATE, folder, SLOW_AND_STOPPED.replace("{name}", "SIGINT")).code == 130
    assert (folder / "out.npz").read_bytes() == before


def test_parts_of_the_data_are_merged(qonnx_: Qonnx, folder: Path) -> None:
    assert qonnx_(CALIBRATE).code == 0
    for number in range(4):
        (folder / f"part{number // 2}").mkdir(exist_ok=True)
        shutil.copy(folder / "calib" / f"{number}.npz", folder / f"part{number // 2}")
    for part in ("part0", "part1"):
        assert qonnx_(f"calibrate model.onnx --data {part} -o {part}.npz").code == 0
    both = qonnx_("calibrate model.onnx --merge part0.npz --merge part1.npz -o both.npz")
    assert both == Done(0, "wrote both.npz: 2 tensors over 4 batches\n", "")
    assert qonnx_("calibrate model.onnx --merge part0.npz --data part1 -o more.npz").code == 0
    for name in ("both.npz", "more.npz"):
        assert_same(Statistics.load(name), Statistics.load("out.npz"))
    assert qonnx_(QUANTIZE + " --statistics both.npz").code == 0


def test_a_part_that_is_merged_twice_counts_twice_and_it_says_so(qonnx_: Qonnx, folder: Path) -> None:
    assert qonnx_(CALIBRATE).code == 0
    for others in ("--merge out.npz", "--data calib"):
        done = qonnx_(f"calibrate model.onnx --merge out.npz {others} -o both.npz")
        words = "2 of the merged parts were measured on the same data: these count 2 times; merge each part once"
        assert done == Done(0, f"wrote both.npz: 2 tensors over 8 batches\nwarning: {words}\n", "")


def test_statistics_of_another_model_are_refused(qonnx_: Qonnx, folder: Path) -> None:
    assert qonnx_(CALIBRATE).code == 0
    ir.save(model_of(MLP, weights="w b w2 table", scale=0.2, seed=1), folder / "tuned.onnx")
    before = listing(folder)
    for line in (
        "calibrate tuned.onnx --data calib --merge out.npz -o more.npz",
        "quantize tuned.onnx --data calib --statistics out.npz -o q.onnx",
    ):
        assert_refused(qonnx_(line), folder, before, "out.npz: the statistics were measured on another model")


def test_a_command_under_nohup_goes_on_when_the_terminal_is_closed(folder: Path) -> None:
    start = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    end = "import atexit; atexit.register(lambda: print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN))"
    assert subprocess_of("--version", folder, f"{start}\n{end}").out.endswith("\nTrue\n")


# --- help -----------------------------------------------------------------------------------------------------------

COMMANDS = ["export", "calibrate", "quantize", "compare", "engine", "bench", "roofline", "lint", "inspect"]
COMMANDS += ["recipes", "view"]


def test_help_lists_the_commands_in_whole_sentences(qonnx_: Qonnx) -> None:
    done = qonnx_("--help")
    assert done.code == 0
    assert qonnx_("") == qonnx_("-h") == done
    commands = done.out.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in commands] == COMMANDS
    assert all(line.endswith(".") and not line.endswith("...") for line in commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(qonnx_: Qonnx, command: str) -> None:
    done = qonnx_(f"{command} --help")
    assert (done.code, done.err) == (0, "")
    _, _, parameters = done.out.partition("\n\nArguments:\n" if "Arguments:" in done.out else "\n\nOptions:\n")
    for entry in re.split(r"\n  (?=\S)", parameters.replace("\n\nOptions:", "").strip()):
        assert re.search(r"\S  +[A-Z]", entry) or "\n" in entry, entry


def test_help_names_what_there_is(qonnx_: Qonnx) -> None:
    done = qonnx_("quantize --help")
    missing = [target.name for target in TARGETS if not re.search(rf"\b{target.name}\b", done.out)]
    assert missing == []


def test_version(qonnx_: Qonnx) -> None:
    done = qonnx_("--version")
    assert re.fullmatch(r"qonnx \d+\.\d+\.\d+\n", done.out)


def test_help_imports_nothing_heavy(folder: Path) -> None:
    heavy = {"numpy", "onnx_ir", "onnx", "onnxruntime", "torch", "msgspec", "yaml", "netron", "plotly", "rich.text"}
    before = f"import atexit, sys; atexit.register(lambda: print(sorted({heavy} & set(sys.modules))))"
    done = subprocess_of("quantize --help", folder, before)
    assert done.out.splitlines()[-1] == "[]"


def test_inspect_shows_a_graph_and_writes_its_plan(qonnx_: Qonnx, folder: Path) -> None:
    done = qonnx_("inspect quantized.onnx --save-plan read.json")
    assert done.code == 0
    assert "2 of 2 layers are quantized" in done.out
    assert (
        QuantPlan.load(folder / "read.json").quantized_layers == QuantPlan.load(folder / "plan.json").quantized_layers
    )
    report = json.loads(qonnx_("inspect model.onnx --json").out)
    assert [layer["quantized"] for layer in report["layers"]] == [False, False]
    refused = qonnx_("inspect nothing.onnx")
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 1
