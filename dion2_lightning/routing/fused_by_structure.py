"""Fused weights of models outside transformers: told by the layer's name, and by the sizes of what comes after it.

So they are found in timm, diffusers, vit-pytorch, litgpt, and in models of one's own that are like these. Where the
sizes do not fit, nothing is split.
"""

import re
from typing import Final

from torch import nn

from dion2_lightning.routing.fused_layer import KV_HEADS, Layer, Piece, Pieces, PiecesOrReason, by_head, keys_and_values
from dion2_lightning.routing.model_tree import ModulePath, unwrap

_ALL_THREE: Final = re.compile(r"(to_|[wW])?qkv|c_attn")
_KEYS_AND_VALUES: Final = re.compile(r"(to_|[wW])?kv")
_QUERIES_AND_KEYS: Final = re.compile(r"(to_|[wW])?qk")
_QUERIES: Final = re.compile(r"(to_|[wW])?q(_proj)?")
_VALUES: Final = re.compile(r"(to_|[wW])?v(_proj)?")
_OUTPUT: Final = re.compile(r"(to_|[wW])?o(ut)?(_proj|put_proj)?|(c_)?proj|project|merge")
_GATED: Final = re.compile(r"GLU$|^Glu|^GatedLinearUnit$")
"""Classes in which one half of what comes in gates the other: GLU, GEGLU, SwiGLU, ReGLU, GluMlp, ..."""

LONG: Final = 8
"""Modules of a sequence that may be one layer with what belongs to it."""


def find_by_structure(path: ModulePath, layer: Layer) -> tuple[Pieces, str] | None:
    """Return the pieces of a weight outside transformers, and how they were found; None where it is one matrix."""
    if layer.is_of_transformers():
        return None
    is_kernel = isinstance(path.owner, nn.modules.conv._ConvNd)
    pieces = None if is_kernel else _of_attention(_without_sequence(layer))
    if isinstance(pieces, Pieces):
        return pieces, "by its name and shape"
    if layer.outputs % 2 == 0 and _is_gated(layer, getattr(path.owner, path.names[-1])):
        half = layer.outputs // 2
        return Pieces((Piece("up", half), Piece("gate", half))), "as one half gates the other"
    return None


def _without_sequence(layer: Layer) -> Layer:
    """Return a layer that is the only one of a short sequence, as behind a norm, as the layer that the sequence is."""
    is_short = isinstance(layer.module, nn.Sequential) and len(layer.module) <= LONG
    if not is_short or layer.parent is None or len(_weights_in(layer.module)) != 1:
        return layer
    name = next(name for name, child in layer.parent.named_children() if unwrap(child) is layer.module)
    return Layer(name, layer.parent, None, layer.config, layer.outputs, layer.inputs)


def _of_attention(layer: Layer) -> PiecesOrReason:
    """The parts of q, k and v, given how much the layer after the attention takes: as much as v has."""
    if not any(each.fullmatch(layer.name) for each in (_ALL_THREE, _KEYS_AND_VALUES, _QUERIES_AND_KEYS)):
        return None
    children = dict(layer.module.named_children())
    taken = next((_inputs_of(child) for name, child in children.items() if _OUTPUT.fullmatch(name)), None)
    if taken is None:
        return None
    if _ALL_THREE.fullmatch(layer.name):
        return _of_all_three(layer, taken)
    if layer.outputs != 2 * taken:
        return None
    if _KEYS_AND_VALUES.fullmatch(layer.name) and any(map(_QUERIES.fullmatch, children)):
        return keys_and_values(layer)
    if _QUERIES_AND_KEYS.fullmatch(layer.name) and any(map(_VALUES.fullmatch, children)):
        return Pieces((Piece("q", taken, layer.heads), Piece("k", taken, layer.heads)))
    return None


def _of_all_three(layer: Layer, taken: int) -> PiecesOrReason:
    """Side by side, or by head where the module says so; where k and v have fewer heads, q has what is taken."""
    if layer.heads and (key_size := layer.own_number("key_dim")):
        values = layer.outputs // layer.heads - 2 * key_size
        return Pieces((Piece("q", key_size, 1), Piece("k", key_size, 1), Piece("v", values, 1)), layer.heads)
    kv_heads = layer.number(*KV_HEADS)
    if layer.heads and kv_heads and layer.outputs * layer.heads == taken * (layer.heads + 2 * kv_heads):
        key = Piece("k", (layer.outputs - taken) // 2, kv_heads)
        return Pieces((Piece("q", taken, layer.heads), key, key._replace(name="v")))
    # Of heads whose mean goes on, the output takes as much as one has.
    if layer.outputs == 3 * taken or (layer.heads and layer.outputs == 3 * layer.inputs == 3 * layer.heads * taken):
        if getattr(layer.module, "head_first", False):
            return by_head(layer)
        third = Piece("q", layer.outputs // 3, layer.heads)
        return Pieces((third, third._replace(name="k"), third._replace(name="v")))
    return None


def _is_gated(layer: Layer, weight: nn.Parameter) -> bool:
    """Whether one half of a layer's outputs gates the other half; which of them does is not known."""
    if isinstance(layer.module, nn.Sequential):
        return _is_before_gate(layer, layer.module, is_kernel=weight.ndim > 2)
    if not _GATED.search(type(layer.module).__name__):
        return False
    weights = _weights_in(layer.module)
    if len(weights) == 1:  # one that is called a gate, or has as many outputs as inputs, may make the gate alone
        return layer.outputs != layer.inputs and "gate" not in layer.name
    after_it = weights[1 + next(place for place, each in enumerate(weights) if each is weight) :]
    # Two of one shape are each a half. Where there are three, so are two that take the same inputs.
    others = [
        each for each in after_it if each.shape != weight.shape and (len(weights) == 2 or each.shape[1] != layer.inputs)
    ]
    return bool(others) and 2 * others[0].shape[1] == layer.outputs


def _is_before_gate(layer: Layer, sequence: nn.Sequential, *, is_kernel: bool) -> bool:
    """Whether what follows a layer in a sequence takes its outputs apart into halves."""
    names = list(sequence._modules)
    if layer.name not in names:  # a parameter of the sequence itself
        return False
    place = names.index(layer.name) + 1
    gate = sequence._modules[names[place]] if place < len(names) else None
    if gate is None or not _GATED.search(type(gate).__name__) or _weights_in(gate):
        return False
    if getattr(gate, "dim", None) not in ((None, 1) if is_kernel else (None, -1)):  # halves of something else
        return False
    following = (_inputs_of(each) for each in map(sequence._modules.get, names[place + 1 :]) if each is not None)
    taken = next((size for size in following if size is not None), None)
    return taken is None or 2 * taken == layer.outputs


def _weights_in(module: nn.Module) -> list[nn.Parameter]:
    """The weights of a module that are matrices or kernels."""
    return [each for each in module.parameters() if each.ndim > 1]


def _inputs_of(module: nn.Module) -> int | None:
    """How many inputs the first linear layer, or convolution, of a module takes; None without one."""
    for each in module.modules():
        for name in ("in_features", "in_channels", "nx"):
            if isinstance(size := getattr(each, name, None), int):
                return size
    return None
