from __future__ import annotations

import importlib
import inspect
import logging
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from qonnx.errors import DependencyError, ExportError, OutputError
from qonnx.exporter import OPSETS, check, export, export_from, inputs, load_factory, load_huggingface
from qonnx.exporter.export import _root_cause
from qonnx.graph import module_path


class Call(nn.Module):
    """A function of two arguments beside a Linear, to try what `forward` may do."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Any, y: Any = None) -> Any:
        return self.function(self.linear, x, y)


class Block(nn.Module):
    """Two norms with equal weights, Linear in 3-D and 2-D, attention, a tied embedding, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.pool = nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.first(self.embedding(ids))
        query, key, value = self.qkv(x)[:, None].chunk(3, dim=-1)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, mask[:, None, None, :])
        x = self.rms(self.second(x + self.dropout(attended[:, 0])))
        return {"logits": self.head(x), "pooled": self.pool(x[:, 0])}


def block_inputs() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    return {"mask": mask, "ids": torch.arange(10).reshape(2, 5)}  # not in the order of forward's parameters


BLOCK_SHAPES = {"ids": {0: "batch", 1: "sequence"}, "mask": {0: "batch", 1: "sequence"}}


def run(path: Path, **feeds: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: np.asarray(value) for name, value in feeds.items()}))


def floats(values: list[Any]) -> Any:
    return np.array(values, np.float32)


def shape(value: ir.Value) -> list[int | str | None]:
    assert value.shape is not None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


@pytest.fixture(scope="module")
def block() -> Block:
    torch.manual_seed(0)
    return Block()


@pytest.fixture(scope="module")
def exported(block: Block, tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    path = tmp_path_factory.mktemp("block") / "block.onnx"
    assert export(block.eval(), block_inputs(), path, dynamic_shapes=BLOCK_SHAPES) == path
    return ir.load(path)


def test_dimensions_and_ends_carry_the_callers_names(exported: ir.Model) -> None:
    assert {str(value.name): shape(value) for value in (*exported.graph.inputs, *exported.graph.outputs)} == {
        "ids": ["batch", "sequence"],
        "mask": ["batch", "sequence"],
        "logits": ["batch", "sequence", 50],
        "pooled": ["batch", 3],
    }


def test_equal_parameters_stay_apart_and_carry_their_names(exported: ir.Model, block: Block) -> None:
    weights = exported.graph.initializers
    assert {"first.weight", "first.bias", "second.weight", "second.bias", "rms.weight", "qkv.weight"} <= set(weights)
    readers = {node.inputs[1].name for node in exported.graph if node.op_type == "LayerNormalization"}  # type: ignore[union-attr]
    assert readers == {"first.weight", "second.weight"}
    folded = weights["qkv.weight"].const_value
    assert folded is not None
    np.testing.assert_array_equal(folded.numpy(), block.qkv.weight.detach().numpy().T)
    assert "qkv.weight" in weights["qkv.weight"].metadata_props["pkg.onnxscript.optimizer.folded_from"]
    assert {"head.weight", "head.weight_folded"} <= set(weights)  # tied, small: the exporter folds a transposed copy
    small = [value.const_value for name, value in weights.items() if name.startswith("val_")]
    contents = [(str(tensor.dtype), tensor.shape, tensor.tobytes()) for tensor in small if tensor is not None]
    assert len(set(map(str, contents))) == len(contents)  # nameless constants are kept once


def test_nodes_and_values_are_named_after_modules(exported: ir.Model) -> None:
    names = [str(node.name) for node in exported.graph]
    assert len(set(names)) == len(names)
    assert {"embedding/Gather", "first/LayerNormalization", "qkv/MatMul", "qkv/Add", "pool/Gemm", "Softmax"} <= set(
        names
    )
    for node in exported.graph:
        assert module_path(node) == (str(node.name).rpartition("/")[0])
        assert not any("trace" in key or "fx_node" in key for key in node.metadata_props)
        for index, value in enumerate(node.outputs):
            assert value.name in {f"{node.name}_output_{index}", "logits", "pooled"}


def test_the_file_says_what_was_asked(exported: ir.Model) -> None:
    assert exported.ir_version == 10
    assert dict(exported.opset_imports) == {"": 21}
    assert not exported.functions


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset(opset: int, tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.rms, self.linear = nn.LayerNorm(4), nn.RMSNorm(4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.gelu(self.linear(self.rms(self.norm(x))))
            return nn.functional.scaled_dot_product_attention(x, x, x)

    path = export(Small().eval(), (torch.randn(1, 2, 3, 4),), tmp_path / "m.onnx", opset=opset)
    proto = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.parametrize("opset", [0, 17, 26, 99])
def test_other_opsets_are_refused(opset: int, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"opset {opset} cannot be exported: choose one from 18 to 25"):
        export(nn.Linear(2, 2), (torch.ones(1, 2),), tmp_path / "m.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("x", "operators"), [(torch.ones(2, 4), ["Gemm"]), (torch.ones(2, 3, 4), ["MatMul", "Add"])], ids=["2-D", "3-D"]
)
def test_linear(x: torch.Tensor, operators: list[str], tmp_path: Path) -> None:
    model = ir.load(export(nn.Linear(4, 3).eval(), (x,), tmp_path / "m.onnx"))
    assert [node.op_type for node in model.graph] == operators
    assert set(model.graph.initializers) == {"weight", "bias"}


def test_a_folded_batch_norm_belongs_to_its_convolution(tmp_path: Path) -> None:
    norm = nn.BatchNorm2d(4)
    nn.init.normal_(norm.bias)
    body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm, nn.ReLU())
    model = ir.load(
        export(body.eval(), (torch.randn(2, 3, 8, 8),), tmp_path / "m.onnx", dynamic_shapes={"input": {0: "n"}})
    )
    assert [node.name for node in model.graph] == ["0/Conv", "2/Relu"]
    assert set(model.graph.initializers) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_type(dtype: torch.dtype, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).eval().to(dtype)
    path = export(module, (torch.randn(2, 3, 8).to(dtype),), tmp_path / "m.onnx", dynamic_shapes={"input": {1: "rows"}})
    types = {value.dtype for value in ir.load(path).graph.initializers.values()}
    assert types == {ir.DataType.FLOAT16 if dtype is torch.float16 else ir.DataType.BFLOAT16}


def test_nested_inputs_and_other_arguments(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    module = Call(lambda linear, x, y: (linear(x["a"]) + x["b"][0] * y, x["a"].shape[0])).eval()
    path = export(
        module,
        ({"a": x, "b": [x + 1]}, 3),
        tmp_path / "m.onnx",
        dynamic_shapes={"x": {"a": {0: "rows"}, "b": [{-2: "rows"}]}},
        input_names=["a", "b"],
        output_names=["sum", "count"],
    )
    graph = ir.load(path).graph
    assert [(value.name, shape(value)) for value in graph.inputs] == [("a", ["rows", 4]), ("b", ["rows", 4])]
    total, count = run(path, a=np.ones((5, 4), np.float32), b=np.ones((5, 4), np.float32))
    assert (total.shape, int(count)) == ((5, 4), 5)


def test_an_input_returned_and_an_output_returned_twice(tmp_path: Path) -> None:
    module = Call(lambda linear, x, y: {"x": x, "linear.weight": [(h := linear(x)), h]}).eval()
    path = export(module, {"x": torch.ones(2, 4)}, tmp_path / "m.onnx")
    assert [value.name for value in ir.load(path).graph.outputs] == ["x_out", "linear.weight_0", "linear.weight_1"]
    first, second, third = run(path, x=np.ones((2, 4), np.float32))
    np.testing.assert_array_equal(first, 1)
    np.testing.assert_array_equal(second, third)


def test_the_file_does_not_follow_the_module(tmp_path: Path) -> None:
    module = nn.Linear(600, 600).eval()  # above the size from which weights go to their own file
    path = export(module, (torch.ones(1, 600),), tmp_path / "m.onnx")
    data = tmp_path / "m.onnx.data"
    assert data.stat().st_size >= 600 * 600 * 4
    assert path.stat().st_size < 10_000
    before = path.read_bytes(), data.read_bytes()
    with torch.no_grad():
        module.weight.fill_(7)
    assert (path.read_bytes(), data.read_bytes()) == before
    weight = ir.load(path).graph.initializers["weight"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    assert weight.location == "m.onnx.data"
    assert not np.any(weight.numpy() == 7)
    # a smaller model in the same place is one file, and leaves no weights of the old one behind
    export(nn.Linear(4, 4).eval(), (torch.ones(1, 4),), path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_the_same_module_gives_the_same_bytes(block: Block, tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "m.onnx", tmp_path / "b" / "m.onnx"]
    for path in paths:
        path.parent.mkdir()
        export(block.eval(), block_inputs(), path, dynamic_shapes=BLOCK_SHAPES, verify=False)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_training_mode_is_put_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    module.train()
    module[2].eval()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    with caplog.at_level(logging.WARNING, logger="qonnx.exporter.export"):
        path = export(module, (torch.ones(3, 4),), tmp_path / "m.onnx")
    assert "training mode" in caplog.text
    assert [part.training for part in module.modules()] == [True, True, True, False]
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert "Dropout" not in {node.op_type for node in ir.load(path).graph}


def test_nothing_reaches_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def noisy(linear: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        print("forward was here")
        return linear(x) if x.sum() > 0 else x

    with pytest.raises(ExportError):
        export(Call(noisy).eval(), (torch.ones(2, 4),), tmp_path / "m.onnx")
    export(nn.Linear(4, 4).eval(), (torch.ones(2, 4),), tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")


X = torch.linspace(-1, 1, 96).reshape(4, 6, 4)

FAILURES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any] | None, str]] = {
    "a branch on a size": (
        lambda linear, x, y: linear(x) if x.shape[0] > 4 else x,
        (X,),
        {"x": {0: "batch"}},
        r"output 'output' of the exported graph differs from torch by \S+ where \S+ is allowed, on x \[9, 6, 4\]; ",
    ),
    "a branch on a value": (
        lambda linear, x, y: linear(x) if x.sum() > 0 else x,
        (X,),
        None,
        r"Call cannot be exported: forward branches on the values of a tensor \(test_export.py:\d+\); compute both",
    ),
    "an operator ONNX lacks": (
        lambda linear, x, y: torch.linalg.eigh(x[:, :4])[1],
        (X,),
        None,
        "ONNX has no counterpart of aten._linalg_eigh; rewrite",
    ),
    "a shape that torch only refuses while it exports": (
        lambda linear, x, y: linear(x).view((4, 6, 4) if not torch.compiler.is_exporting() else (5, 6, 4)),
        (X,),
        None,
        r"shape '\[5, 6, 4\]' is invalid for input of size 96 \(test_export.py:\d+\); torch.export.export",
    ),
    "complex numbers": (
        lambda linear, x, y: torch.view_as_real((torch.view_as_complex(x.reshape(4, 6, 2, 2)) * 1j).unsqueeze(2)),
        (X,),
        None,
        "torch's exporter cannot translate aten.unsqueeze of complex numbers; compute with real and imaginary parts",
    ),
    "a case the exporter lacks": (
        lambda linear, x, y: nn.functional.scaled_dot_product_attention(x, x, x),
        (X,),
        None,
        "aten.scaled_dot_product_attention.default: only 4D query, key, and value are supported; ",
    ),
    "random numbers": (
        lambda linear, x, y: linear(x) + torch.rand(4),
        (X,),
        None,
        r"differs from torch by .* on x \[4, 6, 4\]; forward may draw random numbers",
    ),
    "a size the module fixes": (
        lambda linear, x, y: linear(x) + torch.ones(4, 1, 1),
        (X,),
        {"x": {0: "batch"}},
        "axis 0 of input 'x' cannot be dynamic: forward works for size 4 only; leave 'batch' out",
    ),
    "a size torch refuses": (
        lambda linear, x, y: linear(x).view(4, 6, 2, 2),
        (X,),
        {"x": {0: "batch", 1: "rows"}},
        r"Call runs with dimension 'batch' = 4 only \(.*invalid for input of size 216\); leave 'batch' out",
    ),
    "two names of one size": (
        lambda linear, x, y: linear(x) + y,
        (X, X),
        {"x": {0: "batch"}, "y": {0: "other"}},
        "axis 0 of input 'y' always has the size of 'batch': call it that instead of 'other'",
    ),
    "one name of two sizes": (
        lambda linear, x, y: x,
        (X,),
        {"x": {0: "n", 1: "n"}},
        r"dimension 'n' is 4 elsewhere and 6 in x \(axis 1\)",
    ),
    "inputs that do not fit": (
        lambda linear, x, y: linear(x) @ y,
        (X, X[0]),
        None,
        "Call does not run in torch on its example inputs: RuntimeError: mat1 and mat2",
    ),
    "too many inputs": (lambda linear, x, y: x, (X, X, X), None, "args do not fit Call.forward: too many positional"),
    "an unknown input": (lambda linear, x, y: x, (X,), {"z": {0: "b"}}, "names 'z', which is no argument of Call; "),
    "an unknown axis": (lambda linear, x, y: x, (X,), {"x": {3: "b"}}, "x has 3 axes, and no axis 3"),
    "a bad name": (lambda linear, x, y: x, (X,), {"x": {0: "a b"}}, "'a b' cannot name a dimension"),
    "no mapping": (lambda linear, x, y: x, (X,), {"x": ["b"]}, r"give a mapping such as \{0: 'batch'\}"),
    "no tensor": (lambda linear, x, y: x, (X, 3), {"y": {0: "b"}}, "y is a int, not a tensor"),
    "an empty dimension": (lambda linear, x, y: x, (X[:0],), {"x": {0: "b"}}, "'b' of x has size 0"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_line_and_leaves_no_file(case: str, tmp_path: Path) -> None:
    function, args, dynamic_shapes, message = FAILURES[case]
    path = tmp_path / "m.onnx"
    path.write_text("what was here before")
    with pytest.raises(ExportError, match=message) as error:
        export(Call(function).eval(), args, path, dynamic_shapes=dynamic_shapes)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_text() == "what was here before"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_names": ["a", "b"]}, "input_names=.*: give 1 different names, one for each of"),
        ({"output_names": [""]}, r"output_names=\[''\]: give 1 different names"),
        ({"output_names": "y"}, "output_names='y'"),
    ],
)
def test_names_must_fit(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export(nn.Identity(), (X,), tmp_path / "m.onnx", **options)


def test_what_is_not_a_module_or_not_a_call_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"a function is not a torch\.nn\.Module"):
        export(run, (X,), tmp_path / "m.onnx")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="args is a Tensor; give a tuple"):
        export(nn.Identity(), X, tmp_path / "m.onnx")  # type: ignore[arg-type]


def test_an_invalid_graph_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, full_check: bool) -> None:
        raise onnx.checker.ValidationError("No Op registered for Gelu\nwith more lines")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match=r"not valid at opset 21: No Op registered for Gelu$"):
        export(nn.Identity(), (X,), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_the_declared_opset_is_checked(exported: ir.Model, tmp_path: Path) -> None:
    ir.save(exported, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="asked for opset 22, the exporter wrote 21"):
        check.check_file(tmp_path / "m.onnx", 22)


@pytest.mark.parametrize("path", ["missing/m.onnx", "."])
def test_a_path_that_cannot_be_written(path: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        export(nn.Identity(), (X,), tmp_path / path)


@pytest.mark.parametrize(
    ("expected", "result", "problem"),
    [
        (floats([1, np.nan, -np.inf]), floats([1, np.nan, -np.inf]), None),
        (floats([1, np.nan]), floats([1, 2]), "other places"),
        (floats([1, np.inf]), floats([1, -np.inf]), "other places"),
        (floats([1, -3.4e38]), floats([1.5, -3.4e38]), "differs from torch by 0.5 where 0.00101"),
        (floats([1]).astype(np.float16), floats([1]), "has type float32"),
        (floats([1]), floats([[1]]), r"has shape \[1, 1\]"),
        (np.arange(2000), np.arange(2000) + (np.arange(2000) == 7), None),
        (np.arange(4), np.array([0, 1, 2, 4]), "in 1 elements"),
        (floats([]), floats([]), None),
    ],
)
def test_disagreement(expected: Any, result: Any, problem: str | None) -> None:
    found = check.disagreement(expected, result, 1e-3)
    if problem is None:
        assert found is None
    else:
        with pytest.raises(AssertionError, match=problem):
            raise AssertionError(found)


def test_dynamic_shapes_may_come_in_the_order_of_the_arguments() -> None:
    module, args = Call(lambda linear, x, y: x), (torch.zeros(2, 3), torch.zeros(3))
    by_name = inputs.bind(module, args, {"x": {0: "n", 1: "m"}, "y": {0: "m"}})
    assert inputs.bind(module, args, ({0: "n", 1: "m"}, {0: "m"})).axes == by_name.axes
    assert inputs.bind(module, args, [{0: "n"}]).axes == inputs.bind(module, args, {"x": {0: "n"}}).axes


@pytest.mark.parametrize("shapes", [({0: "n"}, {0: "m"}), "batch"])
def test_dynamic_shapes_of_other_arguments_are_refused(shapes: Any) -> None:
    module = Call(lambda linear, x: x)
    with pytest.raises(ExportError, match=r"that does not fit 1 argument: give the names of axes by argument"):
        inputs.bind(module, (torch.zeros(2, 3),), shapes)


def test_other_sizes_keep_elements_valid() -> None:
    module = Call(lambda linear, x, y: x)
    bound = inputs.bind(module, (torch.arange(6).reshape(2, 3),), {"x": {0: "n", 1: "m"}})
    assert bound.sizes() == {"n": 2, "m": 3}
    (resized,) = bound.resized({"m": 5, "n": 1}).tensors()
    assert resized.tolist() == [[0, 1, 2, 0, 1]]


# Factories


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of its own name per test, in the current directory: imported modules stay imported."""
    file = tmp_path / f"factories_{tmp_path.name.replace('-', '_')}.py"
    file.write_text(
        textwrap.dedent("""
            import torch
            LIMIT = 3

            def two():
                return torch.nn.Linear(4, 4).eval(), (torch.ones(2, 4),)

            def three():
                return torch.nn.Linear(4, 4).eval(), {"input": torch.ones(2, 4)}, {"input": {0: "rows"}}

            def wrong():
                return torch.nn.Linear(4, 4)

            def broken():
                raise KeyError("weights.pt")

            def leaving():
                raise SystemExit(2)
        """)
    )
    monkeypatch.chdir(tmp_path)
    return file


def test_a_factory_is_exported(package: Path) -> None:
    path = export_from(f"{package.stem}:three", package.parent / "m.onnx")
    assert [(value.name, shape(value)) for value in ir.load(path).graph.inputs] == [("input", ["rows", 4])]
    module, args, dynamic_shapes = load_factory(f"{package.stem}:two")
    assert isinstance(module, nn.Linear)
    assert (len(args), dynamic_shapes) == (1, None)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("wrong", r"must return \(module, args\) or"),
        ("broken", "failed: KeyError: 'weights.pt'"),
        ("leaving", "failed: SystemExit: 2"),
        ("LIMIT", "has no function 'LIMIT'"),
        ("absent", "has no function 'absent'"),
        ("", "is not PACKAGE.MODULE:FACTORY"),
    ],
)
def test_a_factory_that_cannot_be_used(package: Path, attribute: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        load_factory(f"{package.stem}:{attribute}")


def test_a_source_that_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'model\.pt' is neither a directory nor PACKAGE.MODULE:FACTORY"):
        export_from("model.pt", tmp_path / "m.onnx")
    with pytest.raises(
        ExportError, match=r"no_such_module cannot be imported: ModuleNotFoundError.*run from the folder"
    ):
        export_from("no_such_module:build", tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="not a Hugging Face model directory"):
        export_from(str(tmp_path), tmp_path / "m.onnx")


# Hugging Face directories


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers: Any = importlib.import_module("transformers")

    directory = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=3,
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(directory)
    return directory


def test_a_mixture_of_experts_is_exported(tmp_path: Path) -> None:
    transformers: Any = importlib.import_module("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2, vocab_size=20)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    model = ir.load(export_from(str(tmp_path / "experts"), tmp_path / "model.onnx"))
    assert [value.name for value in model.graph.outputs] == ["logits"]


def test_a_hugging_face_directory_is_exported(bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = export_from(str(bert), tmp_path / "bert.onnx")
    assert capfd.readouterr() == ("", "")
    graph = ir.load(path).graph
    assert [(value.name, shape(value)) for value in graph.inputs] == [
        (name, ["batch", "sequence"]) for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    assert [(value.name, shape(value)) for value in graph.outputs] == [("logits", ["batch", 3])]
    assert "bert.encoder.layer.0.attention.self.query.weight" in graph.initializers
    assert "bert.encoder.layer.1.intermediate.dense/MatMul" in {node.name for node in graph}
    assert [node.op_type for node in graph].count("Softmax") == 2


def test_example_inputs_follow_the_configuration(tmp_path: Path) -> None:
    transformers: Any = importlib.import_module("transformers")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.ViTConfig(**small, image_size=[8, 16], patch_size=8)
    transformers.ViTModel(config).save_pretrained(tmp_path / "image")
    _, args, dynamic_shapes = load_huggingface(tmp_path / "image")
    assert isinstance(args, dict)
    assert {name: tuple(value.shape) for name, value in args.items()} == {"pixel_values": (2, 3, 8, 16)}
    assert dynamic_shapes == {"pixel_values": {0: "batch"}}

    config = transformers.VideoMAEConfig(**small, image_size=16, patch_size=8, num_frames=4)
    transformers.VideoMAEModel(config).save_pretrained(tmp_path / "video")
    _, args, _ = load_huggingface(tmp_path / "video")
    assert isinstance(args, dict)
    assert args["pixel_values"].shape == (2, 4, 3, 16, 16)

    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    tokens = dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"], 1)
    config = transformers.WhisperConfig(
        **sizes, **heads, **tokens, vocab_size=20, num_mel_bins=4, max_source_positions=6
    )
    transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "speech")
    _, args, dynamic_shapes = load_huggingface(tmp_path / "speech")
    assert isinstance(args, dict)
    assert {name: tuple(value.shape) for name, value in args.items()} == {
        "input_features": (2, 4, 12),
        "decoder_input_ids": (2, 8),
    }
    assert isinstance(dynamic_shapes, dict)
    assert dynamic_shapes["input_features"] == {0: "batch"}

    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "text")
    module, args, dynamic_shapes = load_huggingface(tmp_path / "text")
    assert isinstance(args, dict)
    assert {name: tuple(value.shape) for name, value in args.items()} == {
        "input_ids": (2, 16),
        "attention_mask": (2, 16),
        "decoder_input_ids": (2, 8),
    }
    assert isinstance(dynamic_shapes, dict)
    assert dynamic_shapes["decoder_input_ids"] == {0: "batch", 1: "decoder_sequence"}
    assert args["attention_mask"].sum() == 28  # one row is padded, so that a mask that is ignored shows
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert not module.training


def test_missing_weights_are_not_made_up(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(bert / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((bert / "config.json").read_bytes())
    with pytest.raises(
        ExportError, match=r"1 weights of BertForSequenceClassification are missing, classifier\.weight"
    ):
        load_huggingface(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"model_type": "nothing-known"}', '{"architectures": ["Nothing"]}'])
def test_a_damaged_directory(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ExportError) as error:
        load_huggingface(tmp_path)
    assert "\n" not in str(error.value)


# What is not installed


@pytest.mark.parametrize(
    ("absent", "call", "remedy"),
    [
        ("torch", lambda path: export(nn.Identity(), (X,), path), r"'qonnx-pipeline\[torch\]'"),
        ("torch", lambda path: load_factory("a:b"), r"'qonnx-pipeline\[torch\]'"),
        ("transformers", load_huggingface, r"'qonnx-pipeline\[hf\]'"),
    ],
)
def test_absent_packages(
    absent: str, call: Callable[[Path], Any], remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(DependencyError, match=remedy):
        call(tmp_path / "m.onnx")


def test_absent_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="or export with verify=False"):
        export(nn.Identity(), (X,), tmp_path / "m.onnx")


def test_export_has_the_documented_signature() -> None:
    parameters = inspect.signature(export).parameters
    assert parameters["opset"].default == 21
    assert list(parameters)[:3] == ["module", "args", "path"]


@pytest.mark.parametrize("dynamic_shapes", [{"x": {0: "batch"}}, None])
def test_attention_with_a_position_bias(tmp_path: Path, dynamic_shapes: dict[str, Any] | None) -> None:
    """Torch stops at the view behind such attention, and where sizes are fixed remembers the wrong strides."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.table = nn.Embedding(9, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, length, _ = x.shape
            query, key, value = self.qkv(x).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
            steps = torch.arange(length)
            bias = self.table(steps[None] - steps[:, None] + 4).permute(2, 0, 1)[None]
            attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
            return attended.transpose(1, 2).contiguous().view(batch, length, 8)

    path = export(Biased(), (torch.randn(2, 5, 8),), tmp_path / "model.onnx", dynamic_shapes=dynamic_shapes)
    assert "MatMul" in {node.op_type for node in onnx.load(path).graph.node}


def test_the_line_that_stopped_torch_is_told() -> None:
    for place in ("(led/modeling.py:193 in forward)", '  File "/usr/lib/led/modeling.py", line 193, in forward'):
        cause = f"Could not guard on data-dependent expression Eq(u0, 1) (unhinted: Eq(u0, 1)).\n\nCaused by: {place}"
        assert _root_cause(RuntimeError(cause)).startswith(
            "forward branches on the values of a tensor (modeling.py:193); "
        )


def test_an_operator_of_transformers_has_a_switch() -> None:
    error = RuntimeError("No ONNX function found for <OpOverload(op='transformers.grouped_mm_fallback', overload='')>")
    assert _root_cause(error).endswith("call module.set_experts_implementation('batched_mm') before")


@pytest.mark.parametrize("dynamic_shapes", [{"x": {0: "batch"}}, None])
def test_a_check_of_a_tensors_values_is_left_out(tmp_path: Path, dynamic_shapes: dict[str, Any] | None) -> None:
    """The exporter drops assertions, and stopped at the condition of this one."""

    def checked(linear: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        torch._check_tensor_all(y.sum() == x.shape[1])  # type: ignore[no-untyped-call]
        return linear(x)  # type: ignore[no-any-return]

    args = (torch.randn(2, 4), torch.tensor([1, 3]))
    path = export(Call(checked).eval(), args, tmp_path / "m.onnx", dynamic_shapes=dynamic_shapes)
    assert {node.op_type for node in onnx.load(path).graph.node} == {"Gemm"}
