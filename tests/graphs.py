"""Small graphs from textual ONNX, with seeded random weights."""

import numpy as np
import onnx_ir as ir


def model_of(text: str, *, weights: str = "", opset: int = 21, seed: int = 0, scale: float = 1.0) -> ir.Model:
    """Parses `name (inputs) => (outputs) { nodes }`; the inputs named in `weights` become initializers.

    Args:
        text: the graph in ONNX's textual form.
        weights: names of inputs, separated by spaces; those that the graph does not have are ignored.
        opset: of the default domain.
        seed: of the normally distributed weights.
        scale: their standard deviation.
    """
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}, "com.example" : 1]>\n' + text)
    rng = np.random.default_rng(seed)
    for value in list(model.graph.inputs):
        if value.name in weights.split() and value.shape is not None and value.dtype is not None:
            data = scale * rng.standard_normal(value.shape.numpy())
            value.const_value = ir.Tensor(data.astype(value.dtype.numpy()), dtype=value.dtype, name=value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
    return model
