"""Turns what the compiler says into one line for people."""

from __future__ import annotations

import re

import msgspec
import onnx_ir as ir

from qonnx.engine.protocol import Refusal
from qonnx.graph import FLOAT_REASON

_CODED = re.compile(r"Error Code \d+: [^(]*\((.*?)\.? In \w+ at ", re.DOTALL)
_SOURCE = re.compile(r"^(?:\[[^\]]*\] |\w+\.[ch]pp:\d+: )")
_NO_PLUGIN = re.compile(
    r"^(?:\w+ )?plugin (?:creator version \S+ was )?not found(?:[,.]| in plugin registry|$)", re.IGNORECASE
)
_QUOTED = re.compile(r'&& "(.*)"')


def refusal_message(refusal: Refusal) -> str:
    """Which node, why, and what to do.

    >>> refusal_message(Refusal("Assertion failed: allZero(z): Zero point must be zero.", "x_Q", "QuantizeLinear"))
    "node 'x_Q' (QuantizeLinear): Zero point must be zero; quantize with target='a800', or leave this tensor in float"
    """
    if not refusal.op:
        return reason(refusal.text)
    quantizes = refusal.op in ("QuantizeLinear", "DequantizeLinear")
    remedy = "quantize with target='a800', or leave this tensor in float" if quantizes else "replace or correct it"
    return f"node {refusal.node!r} ({refusal.op}): {reason(refusal.text)}; {remedy}"


def located(refusal: Refusal, model: ir.Model) -> Refusal:
    """The refusal with the ONNX node that it is about, where it only names it in passing."""
    nodes = {node.name or f"node_of_{node.outputs[0].name}": node for node in model.graph}
    if refusal.op:
        return refusal
    if refusal.node.startswith("#") and refusal.node[1:].isdecimal():  # the number of the node in the file
        numbered = dict(enumerate(nodes.values())).get(int(refusal.node[1:]))
        if numbered is None:
            return msgspec.structs.replace(refusal, node="")
        return msgspec.structs.replace(refusal, node=numbered.name or "", op=numbered.op_type)
    named = [name for name in nodes if re.search(rf"(?<![\w.]){re.escape(name)}(?!\w|\.\w)", refusal.text)]
    if not named:
        return refusal
    name = max(named, key=len)
    return msgspec.structs.replace(refusal, node=name, op=nodes[name].op_type)


def planned_reason(refusal: Refusal, model: ir.Model) -> str:
    """Why the plan left the node in float, in parentheses; "" where it did not."""
    named = (node.metadata_props.get(FLOAT_REASON, "") for node in model.graph if node.name == refusal.node)
    found = next(filter(None, named), "") if refusal.node else ""
    return f" (the plan left it in float: {found})" if found else ""


def reason(text: str) -> str:
    r"""The part of a message that a user can act on, without assertion code and places in the compiler's source.

    >>> reason("getDimensions: Error Code 4: API Usage Error (b: type is Int32. In checkType at /x.cpp:4)\nmore")
    'b: type is Int32'
    >>> reason("Assertion failed: (all || some): Scale coefficients must all be positive")
    'Scale coefficients must all be positive'
    >>> reason('creator && "Plugin not found"')
    'the compiler has no such operator, and no plugin of that name'
    >>> reason("NonZero plugin creator version 1 was not found in plugin registry.")
    'the compiler has no such operator, and no plugin of that name'
    >>> reason("false")
    'TensorRT does not have this operator'
    """
    if coded := _CODED.search(text):
        text = coded[1]
    _, assertion, failed = text.rpartition("Assertion failed: ")
    if assertion:
        text = failed.partition(": ")[2] or failed
    if quoted := _QUOTED.search(text):
        text = quoted[1]
    text = _SOURCE.sub("", text).partition(" Please set kENABLE_")[0]  # that flag is for other hardware
    text = " ".join(text.split()).rstrip(".")
    if _NO_PLUGIN.search(text):  # what is said of every operator that the compiler does not know
        return "the compiler has no such operator, and no plugin of that name"
    return text if text != "false" else "TensorRT does not have this operator"
