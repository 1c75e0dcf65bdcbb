"""Every error a user can cause. Each message is one line: what is wrong, where, and what to do.

QonnxError
├── ModelError       a graph that cannot be read, or is not valid ONNX
├── ExportError      a torch module that cannot be exported, or whose export disagrees with torch
├── DataError        calibration or evaluation data that do not fit the model
├── RecipeError      a recipe or plan that cannot be read, or asks for something contradictory
├── TargetError      a combination that the chosen target cannot run
├── OutputError      a file that cannot be written
├── DependencyError  an optional package that is needed and not installed
└── EngineError      an engine that cannot be built
"""


class QonnxError(Exception):
    """Base of every error that this package raises on purpose. The command line prints it and exits with code 2."""


class ModelError(QonnxError):
    """A model that cannot be read, or is not valid ONNX."""


class ExportError(QonnxError):
    """A torch module that cannot be exported, or whose export disagrees with torch."""


class DataError(QonnxError):
    """Calibration or evaluation data that do not fit the model."""


class RecipeError(QonnxError):
    """A recipe or plan that cannot be read, or that contradicts itself."""


class TargetError(QonnxError):
    """A combination that the chosen target cannot run."""


class OutputError(QonnxError):
    """A file that cannot be written."""


class DependencyError(QonnxError):
    """An optional package that is needed for this call and is not installed."""


class EngineError(QonnxError):
    """An engine that cannot be built from this graph."""
