"""Writes the fused operators of ONNX Runtime, as its optimizers make them, in operators of ONNX.

    BiasGelu(x, b)                       Gelu(x + b)
    SkipLayerNormalization(x, s, g, b)   LayerNormalization(x + s, g, b)
    Attention(x, w, b, mask)             MatMul, Split, Reshape, Transpose, MatMul, Softmax, MatMul ...

TensorRT has hardly any of them, and the products inside cannot be quantized. Where ONNX Runtime runs the result, it
fuses again what it can.

Only when

* the opset is 20 or above, for Gelu and LayerNormalization;
* the node has no inputs or attributes that change its meaning beyond what is written out here: a past, packed or rotary
  inputs, quantization, results for training. Other nodes are left alone.

Source: ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import onnx.parser
import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass, InlinePass

from qonnx.graph import rank

EXPANDED_OPSET = 20

_MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class ExpandFused(ir.passes.InPlacePass):
    """See the module docstring. Functions must be inlined before."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Expands all such nodes of the main graph and its subgraphs."""
        if model.opset_imports.get("", 0) < EXPANDED_OPSET:
            return ir.passes.PassResult(model, False)
        added = []
        for number, node in enumerate(fused_nodes(model)):
            function = _function(node, f"qonnx_{number}", model.opset_imports[""])
            node.domain, node.overload = function.domain, function.overload
            model.functions[function.identifier()] = function
            added.append(function.identifier())
        if added:
            InlinePass(criteria=lambda function: function.identifier() in added)(model)
            IdentityEliminationPass()(model)
        for identifier in added:
            model.functions.pop(identifier, None)
        return ir.passes.PassResult(model, bool(added))


def fused_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes that can be expanded, in graph order."""
    return [node for node in ir.traversal.RecursiveGraphIterator(model.graph) if _body(node) is not None]


def _function(node: ir.Node, overload: str, opset: int) -> ir.Function:
    """What the node computes, for this node alone: names of nodes inside extend its name."""
    inputs = ", ".join(f"x{index}" for index in range(len(node.inputs)))
    outputs = ", ".join(f"y{index}" for index in range(len(node.outputs)))
    header = f'<domain: "{_MICROSOFT}", opset_import: ["" : {opset}], overload: "{overload}">'
    text = f"{header} {node.op_type} ({inputs}) => ({outputs}) {{ {_body(node)} }}"
    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    for inner in function:
        inner.name = f"{node.name}/{inner.name or inner.op_type}"
        inner.metadata_props.update(node.metadata_props)
        inner.metadata_props["qonnx.pass"] = "ExpandFused"
        for index, value in enumerate(inner.outputs):
            if value.name and not value.name.startswith("y"):
                value.name = f"{inner.name}_output_{index}"
    return function


def _body(node: ir.Node) -> str | None:
    """What the node computes as text, of x0, x1 ... and y0, y1 ...; None where it is left alone."""
    if node.domain == _MICROSOFT or node.op_type == "SimplifiedLayerNormalization":
        write = _BODIES.get(node.op_type)
        return None if write is None else write(node)
    return None


def _given(node: ir.Node, index: int) -> bool:
    return index < len(node.inputs) and node.inputs[index] is not None


def _unread(node: ir.Node, *indices: int) -> bool:
    """Whether nobody reads these outputs."""
    outputs = [node.outputs[index] for index in indices if index < len(node.outputs)]
    return not any(output.name and (output.uses() or output.is_graph_output()) for output in outputs)


def _sum(node: ir.Node, result: str, *indices: int) -> str:
    """The sum of those inputs that are given, at least one of them."""
    total, *others = (f"x{index}" for index in indices if _given(node, index))
    lines = []
    for number, other in enumerate(others):
        lines.append(f"[Add_{number}] s{number} = Add({total}, {other})")
        total = f"s{number}"
    return " ".join([*lines, f"{result} = Identity({total}) "])


def _bias_gelu(node: ir.Node) -> str:
    return "s = Add(x0, x1) y0 = Gelu(s)"


def _gelu(node: ir.Node) -> str:
    return "y0 = Gelu(x0)"


def _fast_gelu(node: ir.Node) -> str:
    return _sum(node, "s", 0, 1) + 'y0 = Gelu<approximate = "tanh">(s)'


def _quick_gelu(node: ir.Node) -> str:
    alpha = node.attributes.get_float("alpha", 1.702)
    return f"{_number('a', alpha)} m = Mul(x0, a) g = Sigmoid(m) y0 = Mul(x0, g)"


def _number(name: str, value: float) -> str:
    """A constant of the type of x0."""
    return f"{name}32 = Constant<value = float {{{value!r}}}>() {name} = CastLike({name}32, x0)"


def _integers(name: str, *values: int) -> str:
    return f"{name} = Constant<value_ints = [{', '.join(map(str, values))}]>()"


def _activation(node: ir.Node) -> str | None:
    """From r to y0."""
    name = node.attributes.get_string("activation", "") or ""
    parameters = node.attributes.get_floats("activation_params", None) or []
    match name:
        case "":
            return "y0 = Identity(r)"
        case "Relu" | "Sigmoid" | "Tanh":
            return f"y0 = {name}(r)"
        case "LeakyRelu":
            alpha = parameters[0] if parameters else node.attributes.get_float("activation_alpha", 0.01)
            return f"y0 = LeakyRelu<alpha = {alpha!r}>(r)"
        case "HardSigmoid" if len(parameters) == 2:
            return f"y0 = HardSigmoid<alpha = {parameters[0]!r}, beta = {parameters[1]!r}>(r)"
        case "Clip" if len(parameters) == 2:
            return f"{_number('lo', parameters[0])} {_number('hi', parameters[1])} y0 = Clip(r, lo, hi)"
    return None


def _attributes(node: ir.Node, *names: str) -> str:
    found = []
    for name in names:
        attribute = node.attributes.get(name)
        if attribute is None:
            continue
        match attribute.type:
            case ir.AttributeType.STRING:
                found.append(f'{name} = "{attribute.as_string()}"')
            case ir.AttributeType.INTS:
                found.append(f"{name} = [{', '.join(map(str, attribute.as_ints()))}]")
            case ir.AttributeType.FLOAT:
                found.append(f"{name} = {attribute.as_float()!r}")
            case _:
                found.append(f"{name} = {attribute.value}")
    return f"<{', '.join(found)}>" if found else ""


def _fused_conv(node: ir.Node) -> str | None:
    activation = _activation(node)
    inputs = ", ".join(f"x{index}" for index in range(3) if _given(node, index))
    conv = _attributes(node, "auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    skip = "r = Add(c, x3)" if _given(node, 3) else "r = Identity(c)"
    return None if activation is None else f"c = Conv{conv}({inputs}) {skip} {activation}"


def _fused_gemm(node: ir.Node) -> str | None:
    activation = _activation(node)
    inputs = ", ".join(f"x{index}" for index in range(3) if _given(node, index))
    gemm = _attributes(node, "alpha", "beta", "transA", "transB")
    return None if activation is None else f"r = Gemm{gemm}({inputs}) {activation}"


def _fused_matmul(node: ir.Node) -> str | None:
    body, operands = "", []
    if any(node.attributes.get_int(name, 0) for name in ("transBatchA", "transBatchB")):
        return None
    for index, name in enumerate(("transA", "transB")):
        operand = f"x{index}"
        if node.attributes.get_int(name, 0):
            size = rank(node.inputs[index])
            if size is None:
                return None
            if size > 1:  # vectors have nothing to transpose
                order = [*range(size - 2), size - 1, size - 2]
                body += f"t{index} = Transpose<perm = [{', '.join(map(str, order))}]>({operand}) "
                operand = f"t{index}"
        operands.append(operand)
    alpha = node.attributes.get_float("alpha", 1.0)
    if alpha == 1:
        return f"{body} y0 = MatMul({', '.join(operands)})"
    return f"{body} r = MatMul({', '.join(operands)}) {_number('a', alpha)} y0 = Mul(r, a)"


def _skip_layer_norm(node: ir.Node) -> str | None:
    """Results: the norm, mean and inverse deviation of training, the sum."""
    if not _unread(node, 1, 2):
        return None
    inputs = "s, x2, x3" if _given(node, 3) else "s, x2"
    norm = f"y0 = LayerNormalization{_epsilon(node)}({inputs})"
    return f"{_sum(node, 's', 0, 1, 4)} {norm} {_more_outputs(node)}"


def _skip_rms_norm(node: ir.Node) -> str | None:
    return f"{_sum(node, 's', 0, 1, 3)} {_rms(node, 's', 'x2')} {_more_outputs(node)}" if _unread(node, 1, 2) else None


def _rms_norm(node: ir.Node) -> str | None:
    """At the last axis, as all models have it."""
    if node.attributes.get_int("axis", -1) != -1 or not _unread(node, 1):
        return None
    return f"{_rms(node, 'x0', 'x1')} {_more_outputs(node, '')}"


def _rms(node: ir.Node, x: str, gain: str) -> str:
    """The types of what is added and divided are those of x."""
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return (
        f"{_number('e', epsilon)} {_integers('last', -1)} q = Mul({x}, {x}) m = ReduceMean<keepdims = 1>(q, last) "
        f"v = Add(m, e) d = Sqrt(v) n = Div({x}, d) y0 = Mul(n, {gain})"
    )


def _epsilon(node: ir.Node) -> str:
    return f"<axis = -1, epsilon = {node.attributes.get_float('epsilon', 1e-5)!r}>"


def _more_outputs(node: ir.Node, total: str = "s") -> str:
    """Outputs that nobody reads must be something."""
    count = len(node.outputs)
    lines = [f"y{index} = Identity({total if index == 3 and total else 'y0'})" for index in range(1, count)]
    return " ".join(lines)


def _embed(node: ir.Node) -> str | None:
    """Results: the norm, how many tokens are no padding, the sum."""
    if node.attributes.get_int("mask_index_type", 1) != 1:
        return None
    body = (
        f"{_integers('one', 1)} {_integers('zero', 0)} z = Squeeze(zero) u = Squeeze(one) "
        "length = Shape<start = 1>(x0) n = Squeeze(length) w = Gather(x2, x0) "
    )
    body += "at = Identity(x8) " if _given(node, 8) else "at = Range(z, n, u) "
    body += "p = Gather(x3, at) wp = Add(w, p) "
    body += "g = Gather(x4, x1) s = Add(wp, g) " if _given(node, 4) and _given(node, 1) else "s = Identity(wp) "
    inputs = "s, x5, x6" if _given(node, 6) else "s, x5"
    body += f"y0 = LayerNormalization{_epsilon(node)}({inputs}) "
    if len(node.outputs) > 1:
        if _given(node, 7):
            body += "k = ReduceSum<keepdims = 0>(x7, one) y1 = Cast<to = 6>(k) "
        else:
            body += "b = Shape<end = 1>(x0) k = ConstantOfShape<value = int32[1] {0}>(b) y1 = Identity(k) "
    return body + ("y2 = Identity(s)" if len(node.outputs) > 2 else "")


def _attention(node: ir.Node) -> str | None:
    """The projection of all heads, and the attention."""
    weight = node.inputs[1]
    if any(_given(node, index) for index in (4, 6)) or not _unread(node, 1) or weight is None or weight.shape is None:
        return None
    if any(node.attributes.get_int(name, 0) for name in ("do_rotary", "past_present_share_buffer")):
        return None
    width = weight.shape[1]
    parts = node.attributes.get_ints("qkv_hidden_sizes", None) or ([width // 3] * 3 if isinstance(width, int) else [])
    if len(parts) != 3:
        return None
    bias = "p = Add(xw, x2)" if _given(node, 2) else "p = Identity(xw)"
    projection = f"xw = MatMul(x0, x1) {bias} {_integers('parts', *parts)} q, k, v = Split<axis = -1>(p, parts) "
    rest = _heads(node, list(parts), mask=3, bias=5)
    return None if rest is None else projection + rest + _more_outputs(node)


def _multi_head_attention(node: ir.Node) -> str | None:
    """The attention; queries, keys and values are projected already."""
    if any(_given(node, index) for index in range(6, len(node.inputs))) or not all(_given(node, n) for n in (1, 2)):
        return None
    if not _unread(node, 1, 2, 3) or any(rank(node.inputs[index]) != 3 for index in range(3)):
        return None
    widths = [node.inputs[index].shape[-1] for index in range(3)]  # type: ignore[union-attr, index]
    parts = [width for width in widths if isinstance(width, int)]
    if len(parts) != 3:
        return None
    body = "q = Identity(x0) k = Identity(x1) v = Identity(x2) "
    if _given(node, 3):
        body = f"{_integers('parts', *parts)} bq, bk, bv = Split<axis = 0>(x3, parts) "
        body += "q = Add(x0, bq) k = Add(x1, bk) v = Add(x2, bv) "
    rest = _heads(node, parts, mask=4, bias=5)
    return None if rest is None else body + rest + _more_outputs(node)


def _heads(node: ir.Node, parts: list[int], *, mask: int, bias: int) -> str | None:
    """From q, k and v [batch, tokens, width] to y0."""
    heads = node.attributes.get_int("num_heads", 0)
    if not heads or any(part % heads for part in parts):
        return None
    scale = node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(parts[0] // heads)
    body = (
        f"{_integers('split', 0, 0, heads, -1)} {_integers('whole', 0, 0, parts[2])} "
        "q4 = Reshape(q, split) k4 = Reshape(k, split) v4 = Reshape(v, split) "
        "qh = Transpose<perm = [0, 2, 1, 3]>(q4) kh = Transpose<perm = [0, 2, 3, 1]>(k4) "
        f"vh = Transpose<perm = [0, 2, 1, 3]>(v4) [MatMul_QK] qk = MatMul(qh, kh) {_number('scale', scale)} "
        "r0 = Mul(qk, scale) "
    )
    filler = node.attributes.get_float("mask_filter_value", -10000.0)
    body += f"{_number('hidden', filler)} {_number('open', 0.0)} {_integers('zero', 0)} {_integers('one', 1)} "
    body += "z = Squeeze(zero) u = Squeeze(one) "
    last = "r0"
    if _given(node, mask):
        hides = _hidden_keys(node.inputs[mask], f"x{mask}")
        if hides is None:
            return None
        body += f"{hides} m = Where(seen, open, hidden) r1 = Add({last}, m) "
        last = "r1"
    if node.attributes.get_int("unidirectional", 0):
        body += (
            "length = Shape<start = 1, end = 2>(k) t = Squeeze(length) at = Range(z, t, u) row = Unsqueeze(at, one) "
            f"past = LessOrEqual(at, row) c = Where(past, open, hidden) r2 = Add({last}, c) "
        )
        last = "r2"
    if _given(node, bias):
        body += f"r3 = Add({last}, x{bias}) "
        last = "r3"
    return body + (
        f"a = Softmax<axis = -1>({last}) [MatMul_V] av = MatMul(a, vh) at2 = Transpose<perm = [0, 2, 1, 3]>(av) "
        "y0 = Reshape(at2, whole) "
    )


def _hidden_keys(mask: ir.Value | None, name: str) -> str | None:
    """Makes `seen` [batch, 1, 1, tokens] of a mask that holds 1 for tokens to see, or how many there are to see."""
    producer = None if mask is None else mask.producer()
    dimensions = 1 if producer is not None and producer.op_type == "EmbedLayerNormalization" else rank(mask)
    if dimensions == 2:
        return f"{_integers('heads', 1, 2)} m4 = Unsqueeze({name}, heads) seen = Cast<to = 9>(m4)"
    if dimensions == 1:
        return (
            f"{_integers('others', 1, 2, 3)} m4 = Unsqueeze({name}, others) m64 = Cast<to = 7>(m4) "
            "keys = Shape<start = 1, end = 2>(k) n = Squeeze(keys) key = Range(z, n, u) seen = Less(key, m64)"
        )
    return None


_BODIES: dict[str, Callable[[ir.Node], str | None]] = {
    "Attention": _attention,
    "BiasGelu": _bias_gelu,
    "EmbedLayerNormalization": _embed,
    "FastGelu": _fast_gelu,
    "FusedConv": _fused_conv,
    "FusedGemm": _fused_gemm,
    "FusedMatMul": _fused_matmul,
    "Gelu": _gelu,
    "MultiHeadAttention": _multi_head_attention,
    "QuickGelu": _quick_gelu,
    "SimplifiedLayerNormalization": _rms_norm,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
}

FUSED_OPERATORS = frozenset(_BODIES)
