"""What a parameter is (one function a rule), and how its matrices are stored.

Rules look at the module that owns a parameter, then at its shape; never at a fixed list of layer names alone.
"""

import re
from collections.abc import Callable
from enum import StrEnum
from typing import Final, NamedTuple

from torch import nn

from dion2_lightning.routing.model_tree import ModelTree, ModulePath, is_transformers_model, unwrap


class Role(StrEnum):
    """What a parameter is."""

    MATRIX = "matrix"  # the weight of a linear layer, or an attention projection
    EXPERTS = "experts"  # a stack of matrices, one for each expert
    LORA_A = "lora A"  # the factor of a LoRA adapter from the layer's input to the rank
    LORA_B = "lora B"  # the factor from the rank to the layer's output
    LORA_OTHER = "lora other"  # of a LoRA adapter too: a factor of an embedding or a convolution, a magnitude
    EMBEDDING = "embedding"  # vectors to look up, of tokens or positions; also where a head is tied to it
    HEAD = "head"  # an output embedding, or a layer from features to labels
    ROUTER = "router"  # what assigns tokens to experts
    CONVOLUTION = "convolution"  # the kernel of a convolution
    VECTOR = "vector"  # a bias, a norm, a scalar, a single row or column
    OTHER = "other"  # what no rule knows
    FROZEN = "frozen"  # whatever it is, it is not trained


class Verdict(NamedTuple):
    """What a rule says: what a parameter is, and why, in a few words for the report."""

    role: Role
    reason: str


OUTSIDE_BACKBONE: Final = "head: outside transformers model"
"""Beginning of the reason for a head that was recognised by its place outside the transformers model."""

_ROUTER_CLASS = re.compile(r"Router|Top(K|k|\d)\w*Gat|Mo[Ee](V\d+)?Gate$")
_HIDDEN_SIZE_NAMES = ("hidden_size", "hidden_dim", "d_model", "embed_dim", "embedding_dim", "model_dim", "dim")
_FROM_HIDDEN = re.compile(r"gate|up|^w1$|^w3$|^v1$|^wi")
_TO_HIDDEN = re.compile(r"down|^w2$|^wo$")
_FUSED_PROJECTION = re.compile(r"qkv|query_key_value|c_attn|gate_up")
_ATTENTION_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def classify(parameter: nn.Parameter, tree: ModelTree) -> Verdict:
    """Say what a parameter of a model is, by the first rule that knows it."""
    path = tree.paths[parameter][0]
    for rule in RULES:
        if (verdict := rule(parameter, path, tree)) is not None:
            return verdict
    return Verdict(Role.OTHER, "not a linear module's weight; opt in with an override")


def storage_of(parameter: nn.Parameter, path: ModulePath) -> tuple[bool, bool]:
    """Whether a parameter's matrices are stored as (in, out), and whether its leading axis counts them."""
    if _is_expert_stack(parameter, path):
        return bool(_experts_stored_in_out(path.owner)), True
    return _is_linear_weight(parameter, path) and _is_transformers_conv1d(path.owner), False


def is_bias(path: ModulePath) -> bool:
    """Whether a parameter is a bias, of whatever shape."""
    return path.names[-1] == "bias" or path.names[-1].endswith("_bias")


# The rules. Each returns a verdict, or None to leave the parameter to the next one.


def _frozen(parameter: nn.Parameter, path: ModulePath, tree: ModelTree) -> Verdict | None:
    return None if parameter.requires_grad else Verdict(Role.FROZEN, "requires no gradient")


def _not_a_matrix(parameter: nn.Parameter, path: ModulePath, tree: ModelTree) -> Verdict | None:
    if is_bias(path):
        return Verdict(Role.VECTOR, "bias")
    if parameter.ndim < 2:
        return Verdict(Role.VECTOR, "vector" if parameter.ndim else "scalar")
    if parameter.ndim == 2 and min(parameter.shape) < 2:
        return Verdict(Role.VECTOR, "not a matrix: a single row or column")
    if not parameter.is_floating_point():
        return Verdict(Role.OTHER, "not a real matrix")
    return None


def _lora_factor(parameter: nn.Parameter, path: ModulePath, tree: ModelTree) -> Verdict | None:
    attribute = _attribute_of_lora_layer(path)
    if attribute is None:
        return None
    if "embedding" in attribute:
        return Verdict(Role.LORA_OTHER, "LoRA factor of an embedding")
    roles = {"lora_A": Role.LORA_A, "lora_B": Role.LORA_B} if parameter.ndim == 2 else {}
    return Verdict(roles.get(attribute, Role.LORA_OTHER), "LoRA factor: its shorter axis is the rank")


def _embedding(parameter: nn.Parameter, path: ModulePath, tree: ModelTree) -> Verdict | None:
    if parameter not in tree.embeddings:
        return None
    kind, tied_to = tree.embeddings[parameter]
    role = Role.HEAD if kind == "output embedding" else Role.EMBEDDING
    return Verdict(role, f"{kind}, tied to `{tied_to}`" if tied_to else kind)


def _head(parameter: nn.Parameter, path: ModulePath, tree: ModelTree) -> Verdict | None:
    model = path.transformers_model
    if model is None:
        return None if tree.backbone is None else Verdict(Role.HEAD, f"{OUTSIDE_BACKBONE} `{tree.backbone}`")
    base = getattr(model, "base_model", None)
    base = unwrap(base) if isinstance(base, nn.Module) else model
    if base is model:
        return Verdict(Role.HEAD, "head: one row a label") if _is_label_layer(parameter, path, model) else None
    if base in path.modules:
        return None
    return Verdict(Role.HEAD, f"head: outside base model `{getattr(model, 'base_model_prefix', '')}`")


def _router(parameter: nn.Parameter, path: ModulePath, tree: ModelTree) -> Verdict | None:
    if _is_router_by_name(path) or _is_router_by_structure(parameter, path):
        return Verdict(Role.ROUTER, "router: few rows, selection would starve experts")
    return None


def _expert_stack(parameter: nn.Parameter, path: ModulePath, tree: ModelTree) -> Verdict | None:
    if not _is_expert_stack(parameter, path) or min(parameter.shape[1:]) < 2:
        return None
    stored = {True: "stored (in, out)", False: "stored (out, in)", None: "taken as (out, in)"}
    order = stored[_experts_stored_in_out(path.owner)]
    return Verdict(Role.EXPERTS, f"stack of {parameter.shape[0]} experts, {order}")


def _attention_projection(parameter: nn.Parameter, path: ModulePath, tree: ModelTree) -> Verdict | None:
    if not isinstance(path.owner, nn.MultiheadAttention) or path.names[-1] not in _ATTENTION_PROJECTIONS:
        return None
    fused = ", fused projections kept whole" if path.names[-1] == "in_proj_weight" else ""
    return Verdict(Role.MATRIX, f"attention projection{fused}")


def _linear(parameter: nn.Parameter, path: ModulePath, tree: ModelTree) -> Verdict | None:
    if not _is_linear_weight(parameter, path):
        return None
    stored = ", stored (in, out)" if _is_transformers_conv1d(path.owner) else ""
    fused = ", fused projections kept whole" if _FUSED_PROJECTION.search(path.module_name(1)) else ""
    return Verdict(Role.MATRIX, f"linear{stored}{fused}")


def _convolution(parameter: nn.Parameter, path: ModulePath, tree: ModelTree) -> Verdict | None:
    return Verdict(Role.CONVOLUTION, "convolution") if _is_convolution(path.owner) else None


RULES: Final[tuple[Callable[[nn.Parameter, ModulePath, ModelTree], Verdict | None], ...]] = (
    _frozen,
    _not_a_matrix,
    _lora_factor,  # before embeddings and heads: factors of an adapted head are LoRA factors
    _embedding,
    _head,
    _router,
    _expert_stack,
    _attention_projection,
    _linear,
    _convolution,
)


# What the rules look for


def _attribute_of_lora_layer(path: ModulePath) -> str | None:
    """The attribute of a peft LoRA layer that holds the parameter, e.g. ``lora_A``."""
    for module, name in zip(path.modules, path.names, strict=True):
        if "lora_A" in getattr(type(module), "adapter_layer_names", ()) and name.startswith("lora_"):
            return name
    return None


def _is_linear_weight(parameter: nn.Parameter, path: ModulePath) -> bool:
    if path.names[-1] != "weight" or parameter.ndim != 2:
        return False
    owner = path.owner
    return isinstance(owner, nn.Linear) or type(owner).__name__.endswith("Linear") or _is_transformers_conv1d(owner)


def _is_transformers_conv1d(module: nn.Module) -> bool:
    mro = type(module).__mro__
    return any(each.__name__ == "Conv1D" and each.__module__ == "transformers.pytorch_utils" for each in mro)


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _is_label_layer(parameter: nn.Parameter, path: ModulePath, model: nn.Module) -> bool:
    # CLIPForImageClassification and others keep their body in several modules, so that none of them is the base model.
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    return path.modules[-2:-1] == (model,) and _is_linear_weight(parameter, path) and parameter.shape[0] == labels


def _is_router_by_name(path: ModulePath) -> bool:
    # The root and whole transformers models may have "Router" in their names for other reasons.
    modules = (module for module in path.modules[1:] if not is_transformers_model(module))
    return "router" in path.module_name(1).lower() or any(_ROUTER_CLASS.search(type(m).__name__) for m in modules)


def _is_router_by_structure(parameter: nn.Parameter, path: ModulePath) -> bool:
    """Whether a linear weight has as many rows as there are experts next to it, or next to the gate that it is in."""
    if not _is_linear_weight(parameter, path):
        return False
    blocks = [*path.modules[-2:-1]]
    if re.search("gat|rout", path.module_name(2).lower()):
        blocks += path.modules[-3:-2]
    return any(parameter.shape[0] in _expert_counts(block) for block in blocks)


def _expert_counts(block: nn.Module) -> set[int]:
    counts = set()
    for name, child in block.named_children():
        experts = unwrap(child)
        if not _names_experts(name, experts) or "shared" in name:
            continue
        if isinstance(experts, nn.ModuleList | nn.ModuleDict):
            counts.add(len(experts))
        counts.update(stack.shape[0] for stack in experts.parameters(recurse=False) if stack.ndim == 3)
    return counts


def _names_experts(name: str, module: nn.Module) -> bool:
    return "expert" in name.lower() or "expert" in type(module).__name__.lower()


def _is_expert_stack(parameter: nn.Parameter, path: ModulePath) -> bool:
    if parameter.ndim != 3 or _is_convolution(path.owner):
        return False
    return _names_experts(path.module_name(1), path.owner)


def _experts_stored_in_out(experts: nn.Module) -> bool | None:
    """Whether a module stores its experts as (E, in, out), None if nothing tells."""
    declared = getattr(experts, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    sizes = (getattr(experts, name, None) for name in _HIDDEN_SIZE_NAMES)
    hidden = next((size for size in sizes if isinstance(size, int)), None)
    for name, stack in experts.named_parameters(recurse=False):
        if stack.ndim != 3 or (stack.shape[1] == hidden) == (stack.shape[2] == hidden):
            continue  # a square matrix does not tell; the module has another that does
        if _TO_HIDDEN.search(name):
            return stack.shape[2] == hidden
        if _FROM_HIDDEN.search(name):
            return stack.shape[1] == hidden
    return None
