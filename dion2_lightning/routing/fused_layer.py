"""A weight as the rules see it, and the ways in which its outputs may be taken apart."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from torch import nn

from dion2_lightning.routing.model_tree import ModulePath, number_of

HEADS: Final = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_v_heads")
KV_HEADS: Final = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "n_kv_head",
    "num_query_groups",
    "n_query_groups",
)
HEAD_SIZE: Final = ("head_dim", "attention_head_size", "head_size")  # the last is that of all heads in LXMERT


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
        return self.number(*HEADS)

    @property
    def kv_heads(self) -> int | None:
        """How many heads keys and values have; those of a configuration may belong to another attention."""
        has_heads = self.own_number(*HEADS) is not None
        return (self.own_number if has_heads else self.number)(*KV_HEADS) or self.heads

    @property
    def head_size(self) -> int | None:
        """How many outputs a head has."""
        found = self.number(*HEAD_SIZE)
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


PiecesOrReason = Pieces | str | None
"""The pieces, a reason to keep the weight whole, or None where it is one matrix or a number is missing."""


def equal_parts(*names: str) -> Callable[[Layer], PiecesOrReason]:
    """Return what takes outputs apart into parts of one size, one after another."""
    return lambda layer: Pieces(tuple(Piece(name, layer.outputs // len(names)) for name in names))


def side_by_side(layer: Layer) -> PiecesOrReason:
    """All heads of q, then those of k, then those of v, of which there may be fewer."""
    heads, kv_heads, size = layer.heads, layer.kv_heads, layer.head_size
    third = layer.outputs // 3
    if heads is None or kv_heads in (None, heads) or size is None or layer.outputs == 3 * heads * size:
        return Pieces((Piece("q", third, heads), Piece("k", third, heads), Piece("v", third, heads)))
    keys = Piece("k", kv_heads * size, kv_heads)
    return Pieces((Piece("q", heads * size, heads), keys, keys._replace(name="v")))


def keys_and_values(layer: Layer) -> PiecesOrReason:
    """All heads of k, then those of v."""
    half = layer.outputs // 2
    return Pieces((Piece("k", half, layer.kv_heads), Piece("v", half, layer.kv_heads)))


def by_head(layer: Layer) -> PiecesOrReason:
    """The first head of q, of k and of v, then the second of each."""
    if layer.heads is None:
        return None
    size = layer.outputs // (3 * layer.heads)
    return Pieces(tuple(Piece(name, size, 1) for name in "qkv"), layer.heads)
