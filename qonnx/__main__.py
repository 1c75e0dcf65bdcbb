"""`python -m qonnx` is the `qonnx` command."""

from qonnx.cli import main

if __name__ == "__main__":
    main()
