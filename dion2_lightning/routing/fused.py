"""Which matrices lie side by side in the weight of a linear layer or of experts, and which heads.

A rule says which module's weight it knows, and how that module's ``forward`` takes its output apart. Modules are
recognised by the names of their classes, so that no library has to be installed. What a rule says is checked against
the shape of the weight: where it does not fit, the weight is kept whole, and the reason says so.
"""

import re
from collections.abc import Callable
from typing import Final, NamedTuple

from torch import nn

from dion2_lightning.matrices.splits import WHOLE, misfit
from dion2_lightning.routing.model_tree import ModulePath, unwrap


class Found(NamedTuple):
    """What was found: the text for ``splits``, and a few words for the report, empty where there is nothing to say."""

    splits: str
    reason: str


class Part(NamedTuple):
    """One matrix in a period of the outputs.

    Attributes:
        name: Its name.
        size: How many outputs it has.
        heads: How many attention heads they are; None where they are none.
    """

    name: str
    size: int
    heads: int | None = None


class Parts(NamedTuple):
    """The matrices of a weight.

    Attributes:
        parts: Those of a period, in their order.
        repeats: How many periods the outputs have.
    """

    parts: tuple[Part, ...]
    repeats: int = 1

    def text(self, per_head: bool) -> str:
        """Return the text for ``splits``."""
        pieces = [
            f"{name} {heads}*{size // heads}" if per_head and heads else f"{name} {size}"
            for name, size, heads in self.parts
        ]
        period = " | ".join(pieces)
        return period if self.repeats == 1 else f"{self.repeats} x ({period})"


class Layer:
    """A weight as rules see it.

    Attributes:
        name: Under which name its module has the layer, such as ``"qkv_proj"``.
        module: That module.
        parent: The module that has it; None for a root.
        outputs: How many outputs it has.
        inputs: How many inputs it has.
    """

    def __init__(self, path: ModulePath, shape: tuple[int, int]) -> None:
        """Read a weight of this module path, and of this shape (out, in)."""
        # The layer itself, or what wraps it alone, as Gemma's layers that clip do.
        level = 1 if path.names[-1] == "weight" and len(path.modules) > 1 else 0
        while path.module_name(level) in ("linear", "base_layer") and level + 2 <= len(path.modules):
            level += 1
        self.name = path.module_name(level)
        self.module = path.modules[-1 - level]
        self.parent = path.modules[-2 - level] if level + 2 <= len(path.modules) else None
        self.outputs, self.inputs = shape
        self._config = next((each.config for each in reversed(path.modules) if hasattr(each, "config")), None)

    @property
    def heads(self) -> int | None:
        """How many heads queries have."""
        return self.number("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_v_heads")

    @property
    def kv_heads(self) -> int | None:
        """How many heads keys and values have."""
        return self.number("num_key_value_heads", "num_kv_heads", "n_kv_heads") or self.heads

    @property
    def head_size(self) -> int | None:
        """How many outputs a head has."""
        found = self.number(*_HEAD_SIZE)
        return found or (self.inputs // self.heads if self.heads else None)

    def number(self, *names: str) -> int | None:
        """Return the first of some numbers that the module has, or else the configuration that is nearest to it."""
        for source in (self.module, self._config):
            for name in names:
                try:
                    value = getattr(source, name, None)
                except Exception:  # a configuration whose layers differ in it
                    continue
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

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


# How outputs are taken apart. Each returns the parts, a reason to keep the weight whole, or None where it is one matrix
# or a number is missing.

Taken = Parts | str | None


def _halves(first: str, second: str) -> Callable[[Layer], Taken]:
    return lambda layer: Parts((Part(first, layer.outputs // 2), Part(second, layer.outputs // 2)))


def _side_by_side(layer: Layer) -> Taken:
    """All heads of q, then those of k, then those of v; k and v alone where another layer has q."""
    heads, kv_heads, size = layer.heads, layer.kv_heads, layer.head_size
    third = layer.outputs // 3
    if heads is None or kv_heads in (None, heads) or size is None or layer.outputs == 3 * heads * size:
        return Parts((Part("q", third, heads), Part("k", third, heads), Part("v", third, heads)))
    keys = Part("k", kv_heads * size, kv_heads)
    return Parts((Part("q", heads * size, heads), keys, keys._replace(name="v")))


def _keys_and_values(layer: Layer) -> Taken:
    half = layer.outputs // 2
    return Parts((Part("k", half, layer.kv_heads), Part("v", half, layer.kv_heads)))


def _side_by_side_or_cross(layer: Layer) -> Taken:
    return _keys_and_values(layer) if layer.outputs == 2 * layer.inputs else _side_by_side(layer)


def _by_head(layer: Layer) -> Taken:
    """The first head of q, of k and of v, then the second of each."""
    if layer.heads is None:
        return None
    size = layer.outputs // (3 * layer.heads)
    return Parts(tuple(Part(name, size, 1) for name in "qkv"), layer.heads)


def _falcon(layer: Layer) -> Taken:
    heads, kv_heads, size = layer.heads, layer.kv_heads, layer.head_size
    if heads is None or kv_heads is None or size is None:
        return None
    if getattr(layer.module, "new_decoder_architecture", False):
        group = heads // kv_heads
        return Parts((Part("q", group * size, group), Part("k", size, 1), Part("v", size, 1)), kv_heads)
    if getattr(layer.module, "multi_query", False):
        return Parts((Part("q", heads * size, heads), Part("k", size, 1), Part("v", size, 1)))
    return _by_head(layer)


def _gpt_bigcode(layer: Layer) -> Taken:
    if getattr(layer.module, "is_cross_attention", False):
        return "its class takes one head of k and of v from it, and it has more outputs"
    size = layer.head_size
    if not getattr(layer.module, "multi_query", False) or size is None:
        return _by_head(layer)
    return Parts((Part("q", layer.inputs, layer.heads), Part("k", size, 1), Part("v", size, 1)))


def _codegen(layer: Layer) -> Taken:
    size, heads = layer.outputs // 12, (layer.heads or 0) // 4 or None
    return Parts((Part("q", size, heads), Part("v", size, heads), Part("k", size, heads)), 4)


def _query_and_gate(layer: Layer) -> Taken:
    if layer.heads is None or layer.head_size is None or layer.outputs != 2 * layer.heads * layer.head_size:
        return None
    return Parts((Part("q", layer.head_size, 1), Part("gate", layer.head_size, 1)), layer.heads)


def _latent_and_rotary(layer: Layer) -> Taken:
    rank, rotary = layer.number("kv_lora_rank"), layer.number("qk_rope_head_dim")
    return None if rank is None or rank == layer.outputs else Parts((Part("kv", rank), Part("k_rope", rotary or 0)))


def _from_latent(layer: Layer) -> Taken:
    sizes = layer.numbers("qk_nope_head_dim", "v_head_dim")
    if sizes is None or layer.heads is None:
        return None
    return Parts((Part("k", sizes[0], 1), Part("v", sizes[1], 1)), layer.heads)


def _delta_net(layer: Layer) -> Taken:
    found = layer.numbers("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
    if found is None:
        return None
    keys, values, key_size, value_size = found
    group = values // keys
    if layer.name == "in_proj_qkv":
        queries = Part("q", keys * key_size, keys)
        return Parts((queries, queries._replace(name="k"), Part("v", values * value_size, values)))
    if layer.name == "in_proj_ba":
        return Parts((Part("b", group), Part("a", group)), keys)
    per_key = (Part("q", key_size, 1), Part("k", key_size, 1))
    per_value = (Part("v", group * value_size, group), Part("z", group * value_size, group))
    return Parts((*per_key, *per_value), keys)


def _mamba(layer: Layer) -> Taken:
    inner = layer.number("intermediate_size")
    if layer.outputs == 2 * (inner or 0):
        return _halves("x", "gate")(layer)
    found = layer.numbers("n_groups", "ssm_state_size", "num_heads")
    if inner is None or found is None:
        return "its sizes are not known: pass splits="
    groups, state, heads = found
    # dt is one row a head, too few for a matrix of its own.
    last = Part("C_dt", groups * state + heads)
    return Parts((Part("gate", inner), Part("x", inner), Part("B", groups * state), last))


def _levit(layer: Layer) -> Taken:
    found = layer.numbers("num_attention_heads", "key_dim", "attention_ratio")
    if found is None:
        return None
    heads, size, ratio = found
    names = "qk" if layer.name == "queries_keys_values" else "k"
    return Parts((*(Part(name, size, 1) for name in names), Part("v", ratio * size, 1)), heads)


def _focal(layer: Layer) -> Taken:
    width = layer.inputs
    # The gates, one row a level and one more, are too few for a matrix of their own.
    return Parts((Part("q", width), Part("context_gates", layer.outputs - width)))


def _every_second(first: str, second: str) -> Callable[[Layer], Taken]:
    return lambda layer: Parts((Part(first, 1), Part(second, 1)), layer.outputs // 2)


def _thirds(*names: str) -> Callable[[Layer], Taken]:
    return lambda layer: Parts(tuple(Part(name, layer.outputs // 3) for name in names))


class Rule(NamedTuple):
    """A weight whose matrices are known.

    Attributes:
        module: What the name of the module's class contains; None: every class of transformers that has such a layer.
        name: Pattern of the layer's name in that module.
        take: How the outputs are taken apart.
    """

    module: str | None
    name: str
    take: Callable[[Layer], Taken]


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
    Rule("Phi3|Phi4Multimodal", "qkv_proj", _side_by_side),
    Rule("Mpt|Dbrx|ModernBert", "Wqkv", _side_by_side),
    Rule(None, "c_attn", _side_by_side_or_cross),
    Rule(None, "qkv|qkv_linear|att_proj", _side_by_side),
    Rule("LevitAttention", "(queries_)?keys_values", _levit),
    Rule(None, "to_kv", _keys_and_values),
    Rule("JetMoeAttention", "kv_proj", _keys_and_values),
    Rule("Qwen", "q_proj", _query_and_gate),
    Rule(None, "kv_a_proj_with_mqa", _latent_and_rotary),
    Rule(None, "kv_b_proj", _from_latent),
    # linear attention, state space models, short convolutions
    Rule("GatedDeltaNet", "in_proj_(qkvz|qkv|ba)", _delta_net),
    Rule("ZambaMambaMixer", "in_proj", _every_second("x", "gate")),
    Rule("Mamba|Bamba|FalconH1Mixer", "in_proj", _mamba),
    Rule("Mamba", "x_proj", lambda layer: "dt, B and C have few rows"),
    Rule("Lfm.*ShortConv", "in_proj", _thirds("B", "C", "x")),
    Rule("FocalNetModulation", "projection_in", _focal),
    # gate and up
    Rule("GptOssExperts", "gate_up_proj", _every_second("gate", "up")),
    Rule("Phi4MultimodalAudio", "gate_up_proj", _halves("up", "gate")),
    Rule("Phi3MLP", "gate_up_proj", _halves("gate", "up")),
    Rule(None, "gate_up_proj", _halves("gate", "up")),
    Rule("JetMoeMoE|GraniteMoe.*MLP", "input_linear", _halves("gate", "up")),
    Rule("ModernBert", "Wi", _halves("input", "gate")),
    Rule("Moonshine.*DecoderMLP", "fc1", _halves("up", "gate")),
    Rule("Gemma.*LightConv1d", "linear_start", _halves("up", "gate")),
    Rule("GraniteSpeech5.*ConvolutionModule", "pointwise_lin1", _halves("up", "gate")),
)
"""What is known, the first that fits wins. Each has been read in the source of its class, transformers 5.23."""

_HEAD_SIZE: Final = ("head_dim", "head_size", "attention_head_size")
_OUTPUT_BESIDE: Final = {"qkv": "proj", "c_attn": "c_proj"}
"""Layers that hold q, k and v side by side in timm and in GPT-2's many copies, and what is beside them there."""
_LOOKS_FUSED: Final = re.compile(r"qkv|query_key_value|keys_values|c_attn|gate_up|^in_proj_weight$|^w1[23]$|^Wi$")
_ATTENTION: Final = re.compile(r"Att(entio)?n|GatedDeltaNet")
_QUERY: Final = re.compile(r"(to_|w|linear_)?q(uery|ueries)?(_b)?(_proj(_weight)?|_lin|_attn)?")
_KEY_OR_VALUE: Final = re.compile(r"(to_|w|linear_)?(k|v|key|value)(_proj(_weight)?|_lin)?")
_ATTENTION_OUTPUT: Final = re.compile(r"(to_|w|W|linear_)?o(ut)?(_proj|_lin)?|dense|proj(ection)?|c_proj")


def find_splits(path: ModulePath, shape: tuple[int, int], per_head: bool) -> Found:
    """Find the matrices in the weight of a linear layer, or in each matrix of a stack of experts.

    Args:
        path: Its module path.
        shape: (out, in) of the weight, or of an expert's.
        per_head: Whether each attention head is a matrix.

    Raises:
        ValueError: ``per_head``, and a number of heads does not divide the outputs of q, k or v, or the inputs of what
            follows attention.
    """
    layer = Layer(path, shape)
    for rule in RULES:
        is_known = layer.is_of_transformers() if rule.module is None else layer.is_a(rule.module)
        if re.fullmatch(rule.name, layer.name) and is_known:
            taken = rule.take(layer)
            if taken is not None:
                return _checked(taken, path, layer, per_head, "by its class")
    has_output = hasattr(layer.module, _OUTPUT_BESIDE.get(layer.name, ""))
    if has_output and layer.outputs == 3 * layer.inputs and layer.heads:
        return _checked(_side_by_side(layer), path, layer, per_head, "by its name and shape")
    if per_head and (found := _heads(path, layer)) is not None:
        return found
    return Found(WHOLE, "fused projections kept whole: pass splits=" if _LOOKS_FUSED.search(layer.name) else "")


def _checked(taken: Taken, path: ModulePath, layer: Layer, per_head: bool, source: str) -> Found:
    if not isinstance(taken, Parts):
        return Found(WHOLE, f"kept whole: {taken}")
    text = taken.text(per_head=False)
    is_empty = taken.repeats < 1 or any(part.size < 1 for part in taken.parts)
    if is_empty or misfit(text, (layer.outputs, layer.inputs)) is not None:
        return Found(WHOLE, f"fused projections kept whole, as {text} does not fit: pass splits=")
    if per_head:
        for name, size, heads in taken.parts:
            if heads is not None:
                _check_heads(path, f"{size} outputs of {name}", size, heads)
        text = taken.text(per_head)
    return Found(text, f"{text} {source}")


def _heads(path: ModulePath, layer: Layer) -> Found | None:
    """The heads of q, k or v in a weight of their own, or of what follows attention; None for another weight."""
    attention = _attention(layer)
    if attention is None:
        return None
    layer.module = attention
    if _QUERY.fullmatch(layer.name):
        heads, size, axis = layer.heads, layer.outputs, "outputs"
    elif _KEY_OR_VALUE.fullmatch(layer.name):
        heads, size, axis = layer.kv_heads, layer.outputs, "outputs"
    elif _ATTENTION_OUTPUT.fullmatch(layer.name):
        heads, size, axis = layer.heads, layer.inputs, "inputs"
    else:
        return None
    # What the module itself says of its heads' size tells also how many they are, under whatever name.
    head_size = next((getattr(attention, name) for name in _HEAD_SIZE if hasattr(attention, name)), None)
    if isinstance(head_size, int) and head_size > 0 and size % head_size == 0:
        heads = size // head_size
    if heads is None:
        return Found(WHOLE, "kept whole: no number of heads is known")
    if heads == 1:
        return None
    _check_heads(path, f"{size} {axis}", size, heads)
    text = f"head {heads}*{size // heads}" + " along inputs" * (axis == "inputs")
    return Found(text, text)


def _attention(layer: Layer) -> nn.Module | None:
    """The attention whose q, k, v or output a layer is; None where it is of another kind."""
    # BERT and others keep the output in a module of its own beside that with q, k and v.
    has_output_only = type(layer.module).__name__.endswith("Output") and layer.parent is not None
    beside = [unwrap(child) for child in layer.parent.children()] if has_output_only and layer.parent else []
    return next((each for each in (layer.module, *beside) if _is_attention(each)), None)


def _is_attention(module: nn.Module) -> bool:
    names = [*dict(module.named_children()), *dict(module.named_parameters(recurse=False))]
    return bool(_ATTENTION.search(type(module).__name__)) and any(
        _QUERY.fullmatch(name) or _LOOKS_FUSED.search(name) or name == "in_proj" for name in names
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
