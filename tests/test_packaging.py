import tomllib
from pathlib import Path

TREE = Path(__file__).parent.parent


def test_an_install_holds_every_package() -> None:
    """`pip install .` copies what is listed and nothing else; an editable install would hide what is missing."""
    listed = tomllib.loads((TREE / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(TREE) for path in (TREE / "qonnx").rglob("__init__.py")}
    linked = {Path("qonnx/passes"), Path("qonnx/calibrators")}  # links to the top, which rglob may not follow
    assert set(listed) == {".".join(folder.parts) for folder in folders | linked}
