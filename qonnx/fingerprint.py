"""Tells whether two graphs are the same model, without reading all of their weights."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir

from qonnx.graph import all_graphs, array

# Elements of a weight that are looked at: training changes nearly all of them.
_SAMPLED = 256


def fingerprint(model: ir.Model) -> str:
    """32 hexadecimal digits that are the same for the same operators, connections, names and weights.

    Where the weights are stored makes no difference. Of a large weight, 256 elements at equal distances are read, so
    that a mapped file stays on disk.
    """
    state = hashlib.blake2b(digest_size=16)
    for graph in all_graphs(model):
        for node in graph:
            names = [value.name or "" if value is not None else "" for value in (*node.inputs, *node.outputs)]
            state.update("\0".join(["node", node.domain, node.op_type, *names, "\n"]).encode())
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    _add(state, attribute.name, attribute.as_tensor())
        for name, value in sorted(graph.initializers.items()) if isinstance(graph, ir.Graph) else ():
            if value.const_value is not None:
                _add(state, name, value.const_value)
    return state.hexdigest()


def _add(state: hashlib.blake2b, name: str, tensor: ir.TensorProtocol) -> None:
    state.update(f"tensor\0{name}\0{tensor.dtype.name}\0{tensor.shape}\n".encode())
    flat = np.asarray(array(tensor, name)).reshape(-1)
    few = flat[:: max(1, flat.size // _SAMPLED)]
    state.update("\0".join(map(str, few)).encode() if few.dtype == object else few.tobytes())
