"""The command line, a file for each group of commands."""

from qonnx.cli.app import main

__all__ = ["main"]
