"""torch modules, factories and Hugging Face directories in, checked ONNX files out."""

from qonnx.exporter.export import OPSETS, export, export_from, load_factory, load_huggingface

__all__ = ["OPSETS", "export", "export_from", "load_factory", "load_huggingface"]
