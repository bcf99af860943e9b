"""Which matrices lie side by side in the weight of a linear layer, of experts or of a convolution, and which heads.

A rule says which module's weight it knows, and how that module's ``forward`` takes its output apart. Modules are
recognised by the names of their classes, so that no library has to be installed. What a rule says is checked against
the shape of the weight: where it does not fit, the weight is kept whole, and the reason says so.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from torch import nn

from dion2_lightning.matrices.splits import WHOLE, misfit
from dion2_lightning.routing.model_tree import ModulePath, number_of, unwrap
from dion2_lightning.routing.rules import FEW_SLICES


class SplitsFound(NamedTuple):
    """What was found: the text for ``splits``, and a few words for the report, empty where there is nothing to say."""

    splits: str
    reason: str


class Piece(NamedTuple):
    """One matrix in a period of the outputs.

    Attributes:
        name: Its name.
        size: How many outputs it has.
        heads: How many attention heads they are; None where they are none.
    """

    name: str
    size: int
    heads: int | None = None


class Pieces(NamedTuple):
    """The matrices of a weight.

    Attributes:
        pieces: Those of a period, in their order.
        repeats: How many periods the outputs have.
    """

    pieces: tuple[Piece, ...]
    repeats: int = 1

    def splits(self, per_head: bool) -> str:
        """Return the text for ``splits``, each head a matrix or not."""
        texts = [
            f"{name} {heads}*{size // heads}" if per_head and heads else f"{name} {size}"
            for name, size, heads in self.pieces
        ]
        period = " | ".join(texts)
        return period if self.repeats == 1 else f"{self.repeats} x ({period})"


@dataclass(frozen=True)
class Layer:
    """A weight as rules see it.

    Attributes:
        name: Under which name its module has the layer, such as ``"qkv_proj"``.
        module: That module.
        parent: The module that has it; None for a root.
        config: The configuration that is nearest to it; None where there is none.
        outputs: How many outputs it has.
        inputs: How many inputs it has.
    """

    name: str
    module: nn.Module
    parent: nn.Module | None
    config: Any
    outputs: int
    inputs: int

    @classmethod
    def read(cls, path: ModulePath, shape: tuple[int, int], *, wrapped: bool = True) -> "Layer":
        """Read a weight of this module path, and of this shape (out, in).

        ``wrapped`` says whether a layer called ``linear`` or ``convolution`` is taken for what wraps it, as Gemma's
        layers that clip do. Peft's adapters always are.
        """
        level = 1 if path.names[-1] == "weight" and len(path.modules) > 1 else 0
        while level + 2 <= len(path.modules):
            if path.module_name(level) in (("linear", "convolution", "base_layer") if wrapped else ("base_layer",)):
                level += 1
            elif path.module_name(level + 1) == "modules_to_save":
                level += 2
            else:
                break
        parent = path.modules[-2 - level] if level + 2 <= len(path.modules) else None
        config = next((each.config for each in reversed(path.modules) if hasattr(each, "config")), None)
        return cls(path.module_name(level), path.modules[-1 - level], parent, config, *shape)

    @property
    def heads(self) -> int | None:
        """How many heads queries have."""
        return self.number(*_HEADS)

    @property
    def kv_heads(self) -> int | None:
        """How many heads keys and values have; those of a configuration may belong to another attention."""
        has_heads = self.own_number(*_HEADS) is not None
        return (self.own_number if has_heads else self.number)(*_KV_HEADS) or self.heads

    @property
    def head_size(self) -> int | None:
        """How many outputs a head has."""
        found = self.number(*_HEAD_SIZE)
        return found or (self.inputs // self.heads if self.heads else None)

    def number(self, *names: str) -> int | None:
        """Return the first of some numbers that the module has, or else the configuration that is nearest to it."""
        return self.own_number(*names) or number_of(self.config, *names)

    def own_number(self, *names: str) -> int | None:
        """Return the first of some numbers that the module has."""
        return number_of(self.module, *names)

    def numbers(self, *names: str) -> list[int] | None:
        """Return all of some numbers; None where one is missing."""
        found = [self.number(name) for name in names]
        return None if None in found else [each for each in found if each is not None]

    def is_a(self, pattern: str) -> bool:
        """Whether the name of the module's class, or of a class that it inherits from, contains a pattern."""
        return any(re.search(pattern, each.__name__) for each in type(self.module).__mro__)

    def is_of_transformers(self) -> bool:
        """Whether the module's class, or one that it inherits from, is of a model in transformers."""
        return any(each.__module__.startswith("transformers.models.") for each in type(self.module).__mro__)


# How outputs are taken apart. Each returns the pieces, a reason to keep the weight whole, or None where it is one
# matrix or a number is missing.

PiecesOrReason = Pieces | str | None


def _equal_parts(*names: str) -> Callable[[Layer], PiecesOrReason]:
    return lambda layer: Pieces(tuple(Piece(name, layer.outputs // len(names)) for name in names))


def _side_by_side(layer: Layer) -> PiecesOrReason:
    """All heads of q, then those of k, then those of v; k and v alone where another layer has q."""
    heads, kv_heads, size = layer.heads, layer.kv_heads, layer.head_size
    third = layer.outputs // 3
    if heads is None or kv_heads in (None, heads) or size is None or layer.outputs == 3 * heads * size:
        return Pieces((Piece("q", third, heads), Piece("k", third, heads), Piece("v", third, heads)))
    keys = Piece("k", kv_heads * size, kv_heads)
    return Pieces((Piece("q", heads * size, heads), keys, keys._replace(name="v")))


def _keys_and_values(layer: Layer) -> PiecesOrReason:
    half = layer.outputs // 2
    return Pieces((Piece("k", half, layer.kv_heads), Piece("v", half, layer.kv_heads)))


def _side_by_side_or_cross(layer: Layer) -> PiecesOrReason:
    return _keys_and_values(layer) if layer.outputs == 2 * layer.inputs else _side_by_side(layer)


def _by_head(layer: Layer) -> PiecesOrReason:
    """The first head of q, of k and of v, then the second of each."""
    if layer.heads is None:
        return None
    size = layer.outputs // (3 * layer.heads)
    return Pieces(tuple(Piece(name, size, 1) for name in "qkv"), layer.heads)


def _by_name(layer: Layer) -> PiecesOrReason:
    """Side by side, as in timm's attention and in copies of GPT-2, unless the module says that it is by head."""
    if layer.heads is None:
        return None
    if key_size := layer.own_number("key_dim"):
        values = layer.outputs // layer.heads - 2 * key_size
        return Pieces((Piece("q", key_size, 1), Piece("k", key_size, 1), Piece("v", values, 1)), layer.heads)
    if layer.outputs != 3 * layer.inputs:
        return None
    return _by_head(layer) if getattr(layer.module, "head_first", False) else _side_by_side(layer)


def _falcon(layer: Layer) -> PiecesOrReason:
    heads, kv_heads, size = layer.heads, layer.kv_heads, layer.head_size
    if heads is None or kv_heads is None or size is None:
        return None
    if getattr(layer.module, "new_decoder_architecture", False):
        group = heads // kv_heads
        return Pieces((Piece("q", group * size, group), Piece("k", size, 1), Piece("v", size, 1)), kv_heads)
    if getattr(layer.module, "multi_query", False):
        return Pieces((Piece("q", heads * size, heads), Piece("k", size, 1), Piece("v", size, 1)))
    return _by_head(layer)


def _gpt_bigcode(layer: Layer) -> PiecesOrReason:
    if getattr(layer.module, "is_cross_attention", False):
        return "its class takes one head of k and of v from it, and it has more outputs"
    size = layer.head_size
    if not getattr(layer.module, "multi_query", False) or size is None:
        return _by_head(layer)
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
        return _equal_parts("x", "gate")(layer)
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
    return _equal_parts("up", "gate")(layer) if is_gated else None


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
    Rule("^MultiheadAttention$", "in_proj_weight", _side_by_side),
    Rule("GPTNeoX|Bloom|Persimmon", "query_key_value", _by_head),
    Rule("Falcon", "query_key_value", _falcon),
    Rule("CodeGen", "qkv_proj", _codegen),
    Rule("MiniMaxLightning", "qkv_proj", _by_head),
    Rule("GPTBigCode", "c_attn", _gpt_bigcode),
    Rule("^DisentangledSelfAttention$", "in_proj", _by_head),
    Rule("EsmFoldSelfAttention", "proj", _by_head),
    Rule("EsmFoldSequenceToPair", "proj", _equal_parts("q", "k")),
    Rule(r"PPDocLayoutV\dGlobalPointer", "dense", _equal_parts("q", "k")),
    Rule("MobileViTV2LinearSelfAttention", "qkv_proj", _mobile_vit),
    Rule("Phi3|Phi4Multimodal", "qkv_proj", _side_by_side),
    Rule("Mpt|Dbrx|ModernBert", "Wqkv", _side_by_side),
    Rule(None, "c_attn", _side_by_side_or_cross),
    Rule(None, "qkv|qkv_linear|att_proj", _side_by_side),
    Rule("LevitAttention", "(queries_)?keys_values", _levit),
    Rule(None, "to_kv", _keys_and_values),
    Rule("JetMoeAttention", "kv_proj", _keys_and_values),
    Rule("Qwen", "q_proj", _query_and_gate),
    Rule("AXK2", "q_gate_proj", _query_and_gate_of_values),
    Rule(None, "kv_a_proj_with_mqa", _latent_and_rotary),
    Rule(None, "kv_b_proj", _from_latent),
    Rule("DeepseekV4(CSACompressor|Indexer)", "(kv|gate)_proj", _equal_parts("a", "b")),
    Rule(
        "EsmFold2TriangleMultiplicativeUpdate", "proj_bundle", _equal_parts("left", "right", "left_gate", "right_gate")
    ),
    Rule("EsmFold2OuterProductMean", "input_proj", _equal_parts("left", "right")),
    # linear attention, state space models, short convolutions
    Rule("GatedDeltaNet", "in_proj_(qkvz|qkv|ba)", _delta_net),
    Rule("ZambaMambaMixer", "in_proj", _every_second("x", "gate")),
    Rule("Mamba|Bamba|FalconH1Mixer", "in_proj", _mamba),
    Rule("Mamba", "x_proj", _mamba_x),
    Rule("Lfm.*ShortConv", "in_proj", _equal_parts("B", "C", "x")),
    Rule("FocalNetModulation", "projection_in", _focal),
    Rule("xLSTMLayer", "qkv_opreact", _xlstm),
    # gate and up
    Rule("GptOssExperts", "gate_up_proj", _every_second("gate", "up")),
    Rule("Phi4MultimodalAudio", "gate_up_proj", _equal_parts("up", "gate")),
    Rule("Phi3MLP", "gate_up_proj", _equal_parts("gate", "up")),
    Rule(None, "gate_up_proj", _equal_parts("gate", "up")),
    Rule("JetMoeMoE|GraniteMoe.*MLP", "input_linear", _equal_parts("gate", "up")),
    Rule("ModernBert", "Wi", _equal_parts("input", "gate")),
    Rule("Moonshine.*DecoderMLP", "fc1", _equal_parts("up", "gate")),
    Rule("Gemma.*LightConv1d", "linear_start", _equal_parts("up", "gate")),
    Rule("GraniteSpeech5.*ConvolutionModule", "pointwise_lin1", _equal_parts("up", "gate")),
    Rule("GatingMLP", "fc1", _equal_parts("gate", "up")),
    Rule("ClvpGatedLinearUnit", "proj", _equal_parts("up", "gate")),
    Rule("(AyaVision|Cohere2Vision)MultiModalProjector", "linear_1", _equal_parts("up", "gate")),
    Rule("xLSTMFeedForward", "proj_up_gate_z", _equal_parts("gate", "up")),
    Rule("(DFine|Deimv2)Gate", "gate", _equal_parts("gate1", "gate2")),
    # convolutions whose outputs are one half of them, gated by the other
    Rule("ConvolutionModule", "pointwise_conv1", _before_depthwise),
    Rule("Granite.*ConvModule", "up_conv", _equal_parts("up", "gate")),
    Rule("Phi4MultimodalAudioGluPointWiseConv", "ext_pw_conv_1d", _equal_parts("up", "gate")),
    Rule("(Wav2Vec2|Wav2Vec2Conformer|WavLM|Data2VecAudio)AdapterLayer", "conv", _equal_parts("up", "gate")),
    Rule("(Seamless.*|Wav2Vec2Bert)AdapterLayer", "(residual|self_attn)_conv", _equal_parts("up", "gate")),
    # what a condition shifts, scales and gates
    Rule("AdaLayerNormZero$", "linear", _equal_parts(*_MODULATED)),
    Rule("EsmFold2AtomLayer", "adaln_linear", _equal_parts(*_MODULATED)),
    Rule("AdaLayerNormZero_Final", "linear", _equal_parts("scale", "shift")),
    Rule("VibeVoiceDiffusionHeadAdaLayerNorm", "linear", _equal_parts("shift", "scale", "gate")),
    Rule("VibeVoiceDiffusionHeadFinalLayer", "linear_1", _equal_parts("shift", "scale")),
)
"""What is known, the first that fits wins. Each has been read in the source of its class, transformers 5.23."""

_HEADS: Final = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_v_heads")
_KV_HEADS: Final = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "n_kv_head",
    "num_query_groups",
    "n_query_groups",
)
_HEAD_SIZE: Final = ("head_dim", "attention_head_size", "head_size")  # the last is that of all heads in LXMERT
_STATE_SIZE: Final = ("ssm_state_size", "d_state")
_OUTPUT_BESIDE: Final = {"qkv": "proj", "c_attn": "c_proj"}
"""Layers that hold q, k and v in timm and in GPT-2's many copies, and what is beside them there."""
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
    has_output = not is_kernel and hasattr(layer.module, _OUTPUT_BESIDE.get(layer.name, ""))
    if has_output and (pieces := _by_name(layer)) is not None:
        return _checked(pieces, path, layer, per_head, "by its name and shape")
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
    size = layer.own_number(*_HEAD_SIZE)
    return queries // size if size and queries % size == 0 else layer.number("num_k_heads", *_HEADS)


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
    size = layer.own_number("v_head_dim", *_HEAD_SIZE)
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
