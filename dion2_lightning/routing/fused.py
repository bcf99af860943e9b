"""Which matrices lie side by side in the weight of a linear layer, of experts or of a convolution, and which heads.

A rule says which module's weight it knows, and how that module's ``forward`` takes its output apart. Modules are
recognised by the names of their classes, so that no library has to be installed. What a rule says is checked against
the shape of the weight: where it does not fit, the weight is kept whole, and the reason says so.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Final, NamedTuple

from torch import nn

from dion2_lightning.matrices.splits import WHOLE, misfit
from dion2_lightning.routing.fused_by_structure import find_by_structure
from dion2_lightning.routing.fused_layer import (
    HEAD_SIZE,
    HEADS,
    Layer,
    Piece,
    Pieces,
    PiecesOrReason,
    by_head,
    equal_parts,
    keys_and_values,
    side_by_side,
)
from dion2_lightning.routing.model_tree import ModulePath, number_of, unwrap
from dion2_lightning.routing.rules import FEW_SLICES


class SplitsFound(NamedTuple):
    """What was found: the text for ``splits``, and a few words for the report, empty where there is nothing to say."""

    splits: str
    reason: str


# How outputs are taken apart. Each returns the pieces, a reason to keep the weight whole, or None where it is one
# matrix or a number is missing.


def _side_by_side_or_cross(layer: Layer) -> PiecesOrReason:
    return keys_and_values(layer) if layer.outputs == 2 * layer.inputs else side_by_side(layer)


def _falcon(layer: Layer) -> PiecesOrReason:
    heads, kv_heads, size = layer.heads, layer.kv_heads, layer.head_size
    if heads is None or kv_heads is None or size is None:
        return None
    if getattr(layer.module, "new_decoder_architecture", False):
        group = heads // kv_heads
        return Pieces((Piece("q", group * size, group), Piece("k", size, 1), Piece("v", size, 1)), kv_heads)
    if getattr(layer.module, "multi_query", False):
        return Pieces((Piece("q", heads * size, heads), Piece("k", size, 1), Piece("v", size, 1)))
    return by_head(layer)


def _gpt_bigcode(layer: Layer) -> PiecesOrReason:
    if getattr(layer.module, "is_cross_attention", False):
        return "its class takes one head of k and of v from it, and it has more outputs"
    size = layer.head_size
    if not getattr(layer.module, "multi_query", False) or size is None:
        return by_head(layer)
    return Pieces((Piece("q", layer.inputs, layer.heads), Piece("k", size, 1), Piece("v", size, 1)))


def _codegen(layer: Layer) -> PiecesOrReason:
    size, heads = layer.outputs // 12, (layer.heads or 0) // 4 or None
    return Pieces((Piece("q", size, heads), Piece("v", size, heads), Piece("k", size, heads)), 4)


def _query_and_gate(layer: Layer) -> PiecesOrReason:
    if layer.heads is None or layer.head_size is None or layer.outputs != 2 * layer.heads * layer.head_size:
        return None
    return Pieces((Piece("q", layer.head_size, 1), Piece("gate", layer.head_size, 1)), layer.heads)


def _query_and_gate_of_values(layer: Layer) -> PiecesOrReason:
    sizes = layer.numbers("qk_head_dim", "v_head_dim")
    if sizes is None or layer.heads is None:
        return None
    return Pieces((Piece("q", sizes[0], 1), Piece("gate", sizes[1], 1)), layer.heads)


def _latent_and_rotary(layer: Layer) -> PiecesOrReason:
    rank, rotary = layer.number("kv_lora_rank"), layer.number("qk_rope_head_dim")
    return None if rank is None or rank == layer.outputs else Pieces((Piece("kv", rank), Piece("k_rope", rotary or 0)))


def _from_latent(layer: Layer) -> PiecesOrReason:
    sizes = layer.numbers("qk_nope_head_dim", "v_head_dim")
    if sizes is None or layer.heads is None:
        return None
    return Pieces((Piece("k", sizes[0], 1), Piece("v", sizes[1], 1)), layer.heads)


def _points(layer: Layer) -> PiecesOrReason:
    """Of each axis, x, y and z, all heads, each k and then v."""
    sizes = layer.numbers("num_qk_points", "num_v_points")
    if sizes is None or layer.heads is None:
        return None
    return Pieces((Piece("k", sizes[0]), Piece("v", sizes[1])), 3 * layer.heads)


def _keys_and_values_by_head(layer: Layer) -> PiecesOrReason:
    if layer.heads is None:
        return None
    size = layer.outputs // (2 * layer.heads)
    return Pieces((Piece("k", size, 1), Piece("v", size, 1)), layer.heads)


def _delta_net(layer: Layer) -> PiecesOrReason:
    found = layer.numbers("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
    if found is None:
        return None
    keys, values, key_size, value_size = found
    group = values // keys
    if layer.name == "in_proj_qkv":
        queries = Piece("q", keys * key_size, keys)
        return Pieces((queries, queries._replace(name="k"), Piece("v", values * value_size, values)))
    if layer.name == "in_proj_ba":
        return _of_enough_rows(Piece("b", group), Piece("a", group), repeats=keys)
    per_key = (Piece("q", key_size, 1), Piece("k", key_size, 1))
    per_value = (Piece("v", group * value_size, group), Piece("z", group * value_size, group))
    return Pieces((*per_key, *per_value), keys)


def _xlstm(layer: Layer) -> PiecesOrReason:
    sizes = layer.numbers("qk_dim", "v_dim")
    if sizes is None:
        return None
    queries, values = Piece("q", sizes[0], layer.heads), Piece("v", sizes[1], layer.heads)
    return Pieces((queries, queries._replace(name="k"), values, values._replace(name="o")))


def _mamba(layer: Layer) -> PiecesOrReason:
    inner, part = layer.number("intermediate_size", "d_inner"), layer.own_number("d_ssm")
    beside = inner - part if inner and part else 0  # in mamba_ssm these go through an MLP
    inner = part or inner
    if layer.outputs == 2 * (inner or 0):
        return equal_parts("x", "gate")(layer)
    groups, heads = layer.number("n_groups", "ngroups"), layer.number("num_heads", "nheads")
    state = layer.number(*_STATE_SIZE)
    if inner is None or groups is None or heads is None or state is None:
        return "its sizes are not known: pass splits="
    return _of_enough_rows(
        *((Piece("mlp_gate", beside), Piece("mlp_up", beside)) if beside > 0 else ()),
        Piece("gate", inner),
        Piece("x", inner),
        Piece("B", groups * state),
        Piece("C", groups * state),
        Piece("dt", heads),
    )


def _mamba_x(layer: Layer) -> PiecesOrReason:
    rank, state = layer.number("time_step_rank", "dt_rank"), layer.number(*_STATE_SIZE)
    if rank is None or state is None:
        return "its sizes are not known: pass splits="
    return _of_enough_rows(Piece("dt", rank), Piece("B", state), Piece("C", state))


def _levit(layer: Layer) -> PiecesOrReason:
    found = layer.numbers("num_attention_heads", "key_dim", "attention_ratio")
    if found is None:
        return None
    heads, size, ratio = found
    names = "qk" if layer.name == "queries_keys_values" else "k"
    return Pieces((*(Piece(name, size, 1) for name in names), Piece("v", ratio * size, 1)), heads)


def _focal(layer: Layer) -> PiecesOrReason:
    width = layer.inputs
    return _of_enough_rows(Piece("q", width), Piece("context", width), Piece("gates", layer.outputs - 2 * width))


def _before_depthwise(layer: Layer) -> PiecesOrReason:
    is_gated = 2 * getattr(getattr(layer.module, "depthwise_conv", None), "in_channels", 0) == layer.outputs
    return equal_parts("up", "gate")(layer) if is_gated else None


def _mobile_vit(layer: Layer) -> PiecesOrReason:
    width = layer.outputs // 2
    return _of_enough_rows(Piece("q", layer.outputs - 2 * width), Piece("k", width), Piece("v", width))


def _every_second(first: str, second: str) -> Callable[[Layer], PiecesOrReason]:
    return lambda layer: Pieces((Piece(first, 1), Piece(second, 1)), layer.outputs // 2)


def _of_enough_rows(*pieces: Piece, repeats: int = 1) -> PiecesOrReason:
    """Take what has too few rows for a matrix of its own together with what is beside it, the smaller of two."""
    kept = list(pieces)
    while len(kept) > 1:
        pairs = [kept[place : place + 2] for place in range(len(kept) - 1)]
        small = [pair for pair in pairs if min(part.size for part in pair) * repeats < FEW_SLICES]
        if not small:
            return Pieces(tuple(kept), repeats)
        first, second = min(small, key=lambda pair: pair[0].size + pair[1].size)
        place = kept.index(first)
        kept[place : place + 2] = [Piece(f"{first.name}_{second.name}", first.size + second.size)]
    return f"too few rows for {Pieces(pieces, repeats).splits(per_head=False)}"


class Rule(NamedTuple):
    """A weight whose matrices are known.

    Attributes:
        module: What the name of the module's class contains; None: every class of transformers that has such a layer.
        name: Pattern of the layer's name in that module.
        pieces_of: How the outputs are taken apart.
    """

    module: str | None
    name: str
    pieces_of: Callable[[Layer], PiecesOrReason]


_MODULATED: Final = ("attn_shift", "attn_scale", "attn_gate", "mlp_shift", "mlp_scale", "mlp_gate")

RULES: Final = (
    # attention
    Rule("^MultiheadAttention$", "in_proj_weight", side_by_side),
    Rule("GPTNeoX|Bloom|Persimmon", "query_key_value", by_head),
    Rule("Falcon", "query_key_value", _falcon),
    Rule("CodeGen", "qkv_proj", _codegen),
    Rule("MiniMaxLightning", "qkv_proj", by_head),
    Rule("GPTBigCode", "c_attn", _gpt_bigcode),
    Rule("^DisentangledSelfAttention$", "in_proj", by_head),
    Rule("EsmFoldSelfAttention", "proj", by_head),
    Rule("EsmFoldInvariantPointAttention", "linear_kv", _keys_and_values_by_head),
    Rule("EsmFoldInvariantPointAttention", "linear_kv_points", _points),
    Rule("EsmFoldInvariantPointAttention", "linear_out", lambda _: "its inputs are of several kinds, each by head"),
    Rule("EsmFoldSequenceToPair", "proj", equal_parts("q", "k")),
    Rule(r"PPDocLayoutV\dGlobalPointer", "dense", equal_parts("q", "k")),
    Rule("MobileViTV2LinearSelfAttention", "qkv_proj", _mobile_vit),
    Rule("Phi3|Phi4Multimodal", "qkv_proj", side_by_side),
    Rule("Mpt|Dbrx|ModernBert", "Wqkv", side_by_side),
    Rule(None, "c_attn", _side_by_side_or_cross),
    Rule(None, "qkv|qkv_linear|att_proj", side_by_side),
    Rule("LevitAttention", "(queries_)?keys_values", _levit),
    Rule(None, "to_kv", keys_and_values),
    Rule("JetMoeAttention", "kv_proj", keys_and_values),
    Rule("Qwen", "q_proj", _query_and_gate),
    Rule("AXK2", "q_gate_proj", _query_and_gate_of_values),
    Rule(None, "kv_a_proj_with_mqa", _latent_and_rotary),
    Rule(None, "kv_b_proj", _from_latent),
    Rule("DeepseekV4(CSACompressor|Indexer)", "(kv|gate)_proj", equal_parts("a", "b")),
    Rule(
        "EsmFold2TriangleMultiplicativeUpdate", "proj_bundle", equal_parts("left", "right", "left_gate", "right_gate")
    ),
    Rule("EsmFold2OuterProductMean", "input_proj", equal_parts("left", "right")),
    # linear attention, state space models, short convolutions
    Rule("GatedDeltaNet", "in_proj_(qkvz|qkv|ba)", _delta_net),
    Rule("ZambaMambaMixer", "in_proj", _every_second("x", "gate")),
    Rule("Mamba|Bamba|FalconH1Mixer", "in_proj", _mamba),
    Rule("Mamba", "x_proj", _mamba_x),
    Rule("Lfm.*ShortConv", "in_proj", equal_parts("B", "C", "x")),
    Rule("FocalNetModulation", "projection_in", _focal),
    Rule("xLSTMLayer", "qkv_opreact", _xlstm),
    # gate and up
    Rule("GptOssExperts", "gate_up_proj", _every_second("gate", "up")),
    Rule("Phi4MultimodalAudio", "gate_up_proj", equal_parts("up", "gate")),
    Rule("Phi3MLP", "gate_up_proj", equal_parts("gate", "up")),
    Rule(None, "gate_up_proj", equal_parts("gate", "up")),
    Rule("JetMoeMoE|GraniteMoe.*MLP", "input_linear", equal_parts("gate", "up")),
    Rule("ModernBert", "Wi", equal_parts("input", "gate")),
    Rule("Moonshine.*DecoderMLP", "fc1", equal_parts("up", "gate")),
    Rule("Gemma.*LightConv1d", "linear_start", equal_parts("up", "gate")),
    Rule("GraniteSpeech5.*ConvolutionModule", "pointwise_lin1", equal_parts("up", "gate")),
    Rule("GatingMLP", "fc1", equal_parts("gate", "up")),
    Rule("ClvpGatedLinearUnit", "proj", equal_parts("up", "gate")),
    Rule("(AyaVision|Cohere2Vision)MultiModalProjector", "linear_1", equal_parts("up", "gate")),
    Rule("xLSTMFeedForward", "proj_up_gate_z", equal_parts("gate", "up")),
    Rule("(DFine|Deimv2)Gate", "gate", equal_parts("gate1", "gate2")),
    # convolutions whose outputs are one half of them, gated by the other
    Rule("ConvolutionModule", "pointwise_conv1", _before_depthwise),
    Rule("Granite.*ConvModule", "up_conv", equal_parts("up", "gate")),
    Rule("Phi4MultimodalAudioGluPointWiseConv", "ext_pw_conv_1d", equal_parts("up", "gate")),
    Rule("(Wav2Vec2|Wav2Vec2Conformer|WavLM|Data2VecAudio)AdapterLayer", "conv", equal_parts("up", "gate")),
    Rule("(Seamless.*|Wav2Vec2Bert)AdapterLayer", "(residual|self_attn)_conv", equal_parts("up", "gate")),
    # what a condition shifts, scales and gates
    Rule("^(CogView4|GlmImage)AdaLayerNormZero$", "linear", equal_parts(*(f"part{place}" for place in range(12)))),
    Rule("AdaLayerNormZero$", "linear", equal_parts(*_MODULATED)),
    Rule("EsmFold2AtomLayer", "adaln_linear", equal_parts(*_MODULATED)),
    Rule("^AdaLayerNormZeroSingle$", "linear", equal_parts("shift", "scale", "gate")),
    Rule("^SD35AdaLayerNormZeroX$", "linear", equal_parts(*_MODULATED, "attn2_shift", "attn2_scale", "attn2_gate")),
    Rule(
        "^CogVideoXLayerNormZero$",
        "linear",
        equal_parts("shift", "scale", "gate", "text_shift", "text_scale", "text_gate"),
    ),
    Rule("^LuminaRMSNormZero$", "linear", equal_parts("attn_scale", "attn_gate", "mlp_scale", "mlp_gate")),
    Rule("^AdaLayerNormContinuous$", "linear", equal_parts("scale", "shift")),
    Rule("^AdaLayerNormSingle$", "linear", equal_parts(*_MODULATED)),
    Rule("AdaLayerNormZero_Final", "linear", equal_parts("scale", "shift")),
    Rule("VibeVoiceDiffusionHeadAdaLayerNorm", "linear", equal_parts("shift", "scale", "gate")),
    Rule("VibeVoiceDiffusionHeadFinalLayer", "linear_1", equal_parts("shift", "scale")),
)
"""What is known, the first that fits wins. Each has been read in the source of its class: transformers 5.23, and for
adaptive norms diffusers 0.42."""

_STATE_SIZE: Final = ("ssm_state_size", "d_state")
_LOOKS_FUSED: Final = re.compile(r"qkv|query_key_value|keys_values|c_attn|gate_up|^in_proj_weight$|^w1[23]$|^Wi$")
_FUSED_TOO: Final = ("in_proj", "att_proj", "q_gate_proj")
"""Layers of an attention that hold q, although their names do not say that they are fused."""
_ATTENTION: Final = re.compile(r"Att(entio)?n|GatedDeltaNet")
_TO_HEADS: Final = "(to_|[wW]|c_|linear_|project_)?"
_QUERY: Final = re.compile(_TO_HEADS + r"q(uery|ueries)?(_b)?(_proj(_weight)?|_lin|_attn|_global)?")
_KEY: Final = re.compile(_TO_HEADS + r"k(ey)?(_proj(_weight)?|_lin|_global)?")
_VALUE: Final = re.compile(_TO_HEADS + r"v(alue)?(_proj(_weight)?|_lin|_global)?")
_ATTENTION_OUTPUT: Final = re.compile(
    r"(to_|[wW]|linear_)?o(ut)?(_proj|_lin)?|(attention_)?out(put)?|dense|proj(ection)?|c_proj"
)


def find_splits(path: ModulePath, shape: tuple[int, int], per_head: bool) -> SplitsFound:
    """Find the matrices in the weight of a linear layer, in each matrix of a stack of experts, or in a kernel.

    Args:
        path: Its module path.
        shape: (out, in) of the weight, or of an expert's; of a kernel (out, in x taps).
        per_head: Whether each attention head is a matrix.

    Raises:
        ValueError: ``per_head``, and a number of heads does not divide the outputs of q, k or v, or the inputs of what
            follows attention.
    """
    layer, itself = Layer.read(path, shape), Layer.read(path, shape, wrapped=False)
    is_kernel = isinstance(path.owner, nn.modules.conv._ConvNd)  # only classes tell what lies side by side in one
    for rule, each in itertools.product(RULES, (itself, layer)):
        is_known = each.is_a(rule.module) if rule.module else each.is_of_transformers() and not is_kernel
        if re.fullmatch(rule.name, each.name) and is_known:
            pieces = rule.pieces_of(each)
            if pieces is not None:
                return _checked(pieces, path, each, per_head, "by its class")
    for each in (itself, layer):
        if (by_structure := find_by_structure(path, each)) is not None:
            return _checked(by_structure[0], path, each, per_head, by_structure[1])
    if per_head and not is_kernel and (found := _separate_heads(path, layer)) is not None:
        return found
    return SplitsFound(WHOLE, "fused projections kept whole: pass splits=" if _LOOKS_FUSED.search(layer.name) else "")


def _checked(pieces: Pieces | str, path: ModulePath, layer: Layer, per_head: bool, source: str) -> SplitsFound:
    if isinstance(pieces, str):
        return SplitsFound(WHOLE, f"kept whole: {pieces}")
    text = pieces.splits(per_head=False)
    is_empty = pieces.repeats < 1 or any(part.size < 1 for part in pieces.pieces)
    if is_empty or misfit(text, (layer.outputs, layer.inputs)) is not None:
        return SplitsFound(WHOLE, f"fused projections kept whole, as {text} does not fit: pass splits=")
    if per_head:
        for name, size, heads in pieces.pieces:
            if heads is not None:
                _check_heads(path, f"{size} outputs of {name}", size, heads)
        text = pieces.splits(per_head)
    return SplitsFound(text, f"{text} {source}")


def _separate_heads(path: ModulePath, layer: Layer) -> SplitsFound | None:
    """The heads of q, k or v in a weight of their own, or of what follows attention; None for another weight."""
    attention = _attention(layer)
    if attention is None:
        return None
    layer = replace(layer, module=attention)
    heads: int | str | None
    is_output = False
    if _QUERY.fullmatch(layer.name):
        heads, size = _heads_of_query(layer, layer.outputs), layer.outputs
    elif _KEY.fullmatch(layer.name):
        heads, size = _heads_of_key(layer), layer.outputs
    elif _VALUE.fullmatch(layer.name):
        heads, size = _heads_of_value(layer), layer.outputs
    elif _ATTENTION_OUTPUT.fullmatch(layer.name):
        heads, size, is_output = _heads_of_output(layer), layer.inputs, True
    else:
        return None
    if heads is None or isinstance(heads, str):
        return SplitsFound(WHOLE, f"kept whole: {heads or 'no number of heads is known'}")
    if heads == 1:
        return None
    _check_heads(path, f"{size} {'inputs' if is_output else 'outputs'}", size, heads)
    text = f"head {heads}*{size // heads}" + " along inputs" * is_output
    return SplitsFound(text, text)


# How many heads a layer of an attention has; or why it is kept whole; None where nothing tells. Sizes tell more than
# numbers: layers of a model differ in theirs, and a configuration has those of one kind only.


def _heads_of_query(layer: Layer, queries: int) -> int | None:
    size = layer.own_number(*HEAD_SIZE)
    return queries // size if size and queries % size == 0 else layer.number("num_k_heads", *HEADS)


def _heads_of_key(layer: Layer) -> int | str | None:
    """Heads of k are as large as those of q."""
    queries, keys = _outputs_of(layer.module, _QUERY), _outputs_of(layer.module, _KEY)
    heads = queries and _heads_of_query(layer, queries)
    if not queries or not keys or not heads or queries % heads:
        return layer.own_number("num_k_heads") or layer.kv_heads
    size = queries // heads
    return f"heads of q have {size} outputs, and k {keys}" if keys % size else keys // size


def _heads_of_value(layer: Layer) -> int | str | None:
    """There are as many heads of v as of k, unless the module says otherwise."""
    return layer.own_number("num_v_heads") or _heads_of_key(layer)


def _heads_of_output(layer: Layer) -> int | None:
    """Heads of the output are as large as those of v."""
    heads, values = _heads_of_value(layer), _outputs_of(layer.module, _VALUE)
    size = layer.own_number("v_head_dim", *HEAD_SIZE)
    if isinstance(heads, int) and values and values % heads == 0:
        size = values // heads
    return layer.inputs // size if size and layer.inputs % size == 0 else layer.heads


def _outputs_of(attention: nn.Module, pattern: re.Pattern[str]) -> int | None:
    """How many outputs the layer of such a name has in an attention; None where it has none."""
    for name, parameter in attention.named_parameters(recurse=False):
        if pattern.fullmatch(name):
            return parameter.shape[0]
    for name, child in attention.named_children():
        if pattern.fullmatch(name):
            layer = unwrap(child)
            layers = (layer, dict(layer.named_children()).get("linear"))
            return next((found for each in layers if (found := number_of(each, "out_features", "nf"))), None)
    return None


def _attention(layer: Layer) -> nn.Module | None:
    """The attention whose q, k, v or output a layer is; None where it is of another kind."""
    # BERT and others keep the output in a module of its own beside that with q, k and v.
    has_output_only = type(layer.module).__name__.endswith("Output") and layer.parent is not None
    beside = [*layer.parent.children()] if has_output_only and layer.parent else []
    # LED and others have q, k and v in a module of their own inside of that with the output.
    children = layer.module.children() if _ATTENTION.search(type(layer.module).__name__) else ()
    inside = [child for child in children if not any(map(_ATTENTION_OUTPUT.fullmatch, dict(child.named_children())))]
    return next((each for each in map(unwrap, (layer.module, *beside, *inside)) if _is_attention(each)), None)


def _is_attention(module: nn.Module) -> bool:
    names = [*dict(module.named_children()), *dict(module.named_parameters(recurse=False))]
    return bool(_ATTENTION.search(type(module).__name__)) and any(
        _QUERY.fullmatch(name) or _LOOKS_FUSED.search(name) or name in _FUSED_TOO for name in names
    )


def _check_heads(path: ModulePath, found: str, size: int, heads: int) -> None:
    if size % heads == 0 and size > heads:
        return
    fitting = [count for count in range(1, size // 2 + 1) if size % count == 0]
    near = sorted(sorted(fitting, key=lambda count: abs(count - heads))[:2])
    raise ValueError(
        f"per_head=True cannot cut {path.name!r} of shape {tuple(getattr(path.owner, path.names[-1]).shape)}: it has "
        f"{found}, and {heads} heads; {' or '.join(map(str, near))} would fit. To keep it whole, pass "
        f"splits={{{path.name!r}: 'whole'}}"
    )
