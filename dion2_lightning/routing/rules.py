"""What a parameter is, and how its matrices are stored.

Rules look at the module that owns a parameter, then at its shape; never at a fixed list of layer names alone.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any, Final, NamedTuple

from torch import nn

from dion2_lightning.routing.model_tree import ModelTree, ModulePath, is_transformers_model, number_of, unwrap


class Role(StrEnum):
    """What a parameter is."""

    MATRIX = "matrix"  # the weight of a linear layer, or an attention projection
    EXPERTS = "experts"  # a stack of matrices, one for each expert
    LORA_A = "lora A"  # the factor of a LoRA adapter from the layer's input to the rank
    LORA_B = "lora B"  # the factor from the rank to the layer's output
    LORA_OTHER = "lora other"  # of a LoRA adapter too: a factor of an embedding or of groups, a magnitude
    EMBEDDING = "embedding"  # of tokens, positions or patches; also where a head is tied to it
    HEAD = "head"  # an output embedding, or a layer from features to labels
    ROUTER = "router"  # what assigns tokens to experts
    CONVOLUTION = "convolution"  # the kernel of a convolution, or of each group of it, that is a matrix
    CONVOLUTION_OTHER = "convolution other"  # a kernel that holds no matrix, or what one is computed from
    VECTOR = "vector"  # a bias, a norm, a scalar, a single row or column
    OTHER = "other"  # what no rule knows
    FROZEN = "frozen"  # whatever it is, it is not trained


MATRIX_ROLES: Final = frozenset({Role.MATRIX, Role.EXPERTS, Role.CONVOLUTION})
"""The roles that are trained as matrices. All others are trained with the rest."""


class Verdict(NamedTuple):
    """What a rule says: what a parameter is, and why, in a few words for the report."""

    role: Role
    reason: str


OUTSIDE_BACKBONE: Final = "head: outside transformers model"
"""Beginning of the reason for a head that was recognised by its place outside the transformers model."""

MAX_LAYERS_OF_HEAD: Final = 4
"""What has more weights beside a base model is a network of its own, as ViTMAE's decoder, or a U-Net beside its text
encoder."""

FEW_SLICES: Final = 16
"""A quarter of fewer slices is at most three: too few to choose from."""

_ROUTER_CLASS = re.compile(r"Router|Top(K|k|\d)\w*Gat|Mo[Ee](V\d+)?Gate$")
_HIDDEN_SIZE_NAMES = ("hidden_size", "d_model", "embed_dim", "embedding_dim", "model_dim", "dim", "hidden_dim")
_FROM_HIDDEN = re.compile(r"gate|up|^w1$|^w3$|^v1$|^wi|c_fc|^fc1")
_TO_HIDDEN = re.compile(r"down|^w2$|^wo$|c_proj|^fc2")
_CALLED_GATE = re.compile(r"(^|_)(gates?|gating|routers?)(_|$)")
_EXPERT_COUNT = re.compile(r"(^|_)n(um)?_(\w+_)?experts$")
_EMBEDDING_MODULES = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm)
_CONVOLUTION = nn.modules.conv._ConvNd
_TRANSPOSED_CONVOLUTION = nn.modules.conv._ConvTransposeNd
_PATCH_EMBEDDING = re.compile("patch_?embed", re.IGNORECASE)
_PIXEL_CHANNELS = 4  # red, green, blue, and a fourth
_SEVERAL = (nn.ModuleList, nn.ModuleDict)
_CALLED_HEAD = re.compile(r"(^|_)(heads?|classifiers?)$")
_HEAD_NAME = re.compile(r"(^|_)(heads?|class_embed|class_predictor)$")
_OUTPUT_COUNT = re.compile(r"(?<!type_)vocab_size|num_embeddings$|^num_classes$")
_COMPUTED_FROM = ("weight_g", "weight_v", "weight_orig")  # by torch's older weight_norm, spectral_norm and pruning
_ATTENTION_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def classify(tree: ModelTree) -> dict[nn.Parameter, Verdict]:
    """Say what each parameter of a model is, by the first rule that knows it."""
    embeddings = _find_embeddings(tree)
    classifiers = _modules_from(tree.root, "get_classifier", _is_of_timm)
    networks = _networks_beside(tree)
    return {
        parameter: _untrained_or_vector(parameter, path)
        or _lora_factor(parameter, path)  # before embeddings and heads: factors of an adapted head are LoRA factors
        or embeddings.get(parameter)
        or _head(parameter, path, tree.backbone, classifiers, networks)
        or _router(parameter, path)
        or _expert_stack(parameter, path)
        or _convolution(parameter, path)
        or _weight_of_layer(parameter, path)
        or Verdict(Role.OTHER, "not a linear module's weight; opt in with an override")
        for parameter, (path, *_) in tree.paths.items()
    }


def storage_of(parameter: nn.Parameter, path: ModulePath) -> dict[str, Any]:
    """Return how a parameter's matrices are stored: the entries of its group, as far as they are not the defaults."""
    if _is_expert_stack(parameter, path):
        return {"transposed": bool(_expert_is_stored_in_out(parameter, path)), "batched": True}
    if count := _experts_below_each_other(parameter, path):
        transposed = bool(_TO_HIDDEN.search(path.names[-1]))
        return {"transposed": transposed, "splits": _stack("expert", count, parameter.shape[0], transposed)}
    if (convolution := _convolution_of(path)) is not None:
        transposed, groups = isinstance(convolution, _TRANSPOSED_CONVOLUTION), convolution.groups
        splits = {"splits": _stack("group", groups, parameter.shape[0], transposed)} if groups > 1 else {}
        return {"convolution": True, "transposed": transposed, **splits}
    if groups_of_linear := _groups_of_linear(parameter, path):
        return {"transposed": False, "splits": _stack("group", groups_of_linear, parameter.shape[0], False)}
    return {"transposed": _is_linear_weight(parameter, path) and _is_transformers_conv1d(path.owner)}


def has_two_axes(parameter: nn.Parameter) -> bool:
    """Whether a parameter has two axes of several entries: (1, d) and (d, 1, 1) have one, and are vectors."""
    return sum(size > 1 for size in parameter.shape) > 1


def why_groups_hold_no_matrix(parameter: nn.Parameter, path: ModulePath) -> str | None:
    """Say why no group of a convolution is a matrix, and what would be one; None where they are, or it has none."""
    convolution = _convolution_of(path)
    if convolution is None or convolution.groups == 1:
        return None
    rows, columns = _matrix_of_group(parameter, convolution)
    if min(rows, columns) > 1:
        return None
    return (
        f"is the kernel of a convolution with groups={convolution.groups}, each a vector of {max(rows, columns)} "
        f"entries, which is no matrix; leave it to 'adamw', or pass splits='whole' to take all groups as one matrix "
        f"({parameter.shape[0]}, {columns})"
    )


def lora_rank_of(role: Role, parameter: nn.Parameter, path: ModulePath) -> int | None:
    """Return the rank of a LoRA factor that is a matrix; None for any other parameter."""
    axis = {Role.LORA_A: 0, Role.LORA_B: 1}.get(role)
    if axis is None or (layer := _lora_layer(path)) is None:
        return None
    # A factor for a stack of experts holds those of all of them.
    return parameter.shape[axis] // getattr(path.modules[layer], "num_experts", 1)


def what_it_lies_beside(path: ModulePath, backbone: str | None) -> str | None:
    """Say what a parameter lies beside: a transformers model, or in one its base model; None where it is in that."""
    if _place_beside(path) is None:
        return None
    return "the base model" if path.transformers_model is not None else f"`{backbone}`"


def is_bias(path: ModulePath) -> bool:
    """Whether a parameter is a bias, of whatever shape."""
    return path.names[-1] == "bias" or path.names[-1].endswith("_bias")


# The rules. Each returns a verdict, or None to leave the parameter to the next one.


def _untrained_or_vector(parameter: nn.Parameter, path: ModulePath) -> Verdict | None:
    if not parameter.requires_grad:
        return Verdict(Role.FROZEN, "requires no gradient")
    if is_bias(path):
        return Verdict(Role.VECTOR, "bias")
    if parameter.ndim < 2:
        return Verdict(Role.VECTOR, "vector" if parameter.ndim else "scalar")
    if not has_two_axes(parameter):
        return Verdict(Role.VECTOR, "not a matrix: a single row or column")
    if isinstance(path.owner, _NORMS) and path.names[-1] == "weight":
        return Verdict(Role.VECTOR, "norm over several axes")
    return None if parameter.is_floating_point() else Verdict(Role.OTHER, "not a real matrix")


def _lora_factor(parameter: nn.Parameter, path: ModulePath) -> Verdict | None:
    layer = _lora_layer(path)
    if layer is None:
        return None
    name = path.names[layer]
    if "embedding" in name or isinstance(path.owner, _EMBEDDING_MODULES):
        return Verdict(Role.LORA_OTHER, "LoRA factor of an embedding")
    convolution = _convolution_of(path)
    is_matrix = parameter.ndim == 2 or (
        convolution is not None and convolution.groups == 1 and min(_matrix_of_group(parameter, convolution)) > 1
    )
    roles = {"lora_a": Role.LORA_A, "lora_b": Role.LORA_B} if is_matrix else {}
    return Verdict(roles.get(name.lower(), Role.LORA_OTHER), "LoRA factor: its shorter axis is the rank")


def _lora_layer(path: ModulePath) -> int | None:
    """Where in a path a LoRA layer is whose attribute, such as lora_A, holds the parameter."""
    for index, (module, name) in enumerate(zip(path.modules, path.names, strict=True)):
        if "lora_A" in getattr(type(module), "adapter_layer_names", ()) and name.startswith("lora_"):
            return index  # of peft
        if name in ("lora_A", "lora_B", "lora_a", "lora_b") and _has_both_factors(module, name[:-1]):
            return index
    return None


def _has_both_factors(module: nn.Module, prefix: str) -> bool:
    """Whether a module has two factors of one rank, as layers or parameters, as in torchtune and in loralib."""
    letters = "AB" if hasattr(module, f"{prefix}A") else "ab"
    factors: list[Any] = [getattr(module, prefix + letter, None) for letter in letters]
    first, second = (tuple[int, ...](getattr(getattr(each, "weight", each), "shape", ())) for each in factors)
    return len(first) == len(second) == 2 and bool(first[0] == second[1])


def _head(
    parameter: nn.Parameter,
    path: ModulePath,
    backbone: str | None,
    classifiers: set[nn.Module],
    networks: set[nn.Module],
) -> Verdict | None:
    if any(isinstance(module, nn.AdaptiveLogSoftmaxWithLoss) for module in path.modules):
        return Verdict(Role.HEAD, "head: adaptive softmax")
    if not classifiers.isdisjoint(path.modules):
        return Verdict(Role.HEAD, "head: the model's classifier")
    model = path.transformers_model
    is_beside = _place_beside(path) is not None and (networks.isdisjoint(path.modules) or _is_called_head(path))
    if model is None:
        return Verdict(Role.HEAD, f"{OUTSIDE_BACKBONE} `{backbone}`") if backbone is not None and is_beside else None
    if is_beside:
        return Verdict(Role.HEAD, f"head: outside base model `{getattr(model, 'base_model_prefix', '')}`")
    if _base_model(model) is model:
        # CLIPForImageClassification and others keep their body in several modules: none of them is the base model.
        labels = getattr(getattr(model, "config", None), "num_labels", None)
        is_label_layer = _is_linear_weight(parameter, path) and path.modules[-2:-1] == (model,)
        if is_label_layer and parameter.shape[0] == labels:
            return Verdict(Role.HEAD, "head: one row a label")
    if _has_a_row_for_each_output(parameter, path, model):
        return Verdict(Role.HEAD, "head: by its name, one row for each token or label")
    return None


def _base_model(model: nn.Module) -> nn.Module:
    """The body of a transformers model, or the model itself where it has none."""
    base = getattr(model, "base_model", None)
    return unwrap(base) if isinstance(base, nn.Module) else model


def _place_beside(path: ModulePath) -> int | None:
    """Where in a path the modules begin that lie beside a base model, or beside all transformers models; else None."""
    model = path.transformers_model
    if model is None:
        return 1
    base = _base_model(model)
    if base is model or any(module is base for module in path.modules):
        return None
    return next(place for place, module in enumerate(path.modules, 1) if module is model)


def _is_called_head(path: ModulePath) -> bool:
    return any(_CALLED_HEAD.search(name) for name in path.names[(_place_beside(path) or 1) - 1 : -1])


def _networks_beside(tree: ModelTree) -> set[nn.Module]:
    """The modules beside base models, and beside transformers models, that are networks: they have more than a head.

    In a list or dict of modules each is judged by itself: it may hold a head for each task. So are a layer that peft
    saves and its copies, which have the layer's weights once more.
    """
    holders = {
        module
        for path in (path for paths in tree.paths.values() for path in paths)
        if path.transformers_model is not None
        for module in itertools.takewhile(lambda module: not is_transformers_model(module), path.modules)
    }
    layers = Counter[nn.Module]()
    for parameter, (path, *_) in tree.paths.items():
        place = _place_beside(path)
        if place is None or not has_two_axes(parameter) or _is_called_head(path) or _lora_layer(path) is not None:
            continue
        inside = (each for each in path.modules[place:] if each not in holders and not isinstance(each, _SEVERAL))
        parts = (each for each in inside if "modules_to_save" not in each._modules)
        layers.update(itertools.islice(parts, 1))
    return {module for module, count in layers.items() if count > MAX_LAYERS_OF_HEAD}


def _router(parameter: nn.Parameter, path: ModulePath) -> Verdict | None:
    # The root, whole transformers models and blocks that hold experts may have such names for other reasons.
    named = (module for module in path.modules[1:] if _ROUTER_CLASS.search(type(module).__name__))
    if (
        "router" in path.module_name(1).lower()
        or any(not is_transformers_model(module) and not _expert_counts(module) for module in named)
        or _has_a_row_for_each_expert(parameter, path)
    ):
        return Verdict(Role.ROUTER, "router: few rows, selection would starve experts")
    return None


def _expert_stack(parameter: nn.Parameter, path: ModulePath) -> Verdict | None:
    if count := _experts_below_each_other(parameter, path):
        order = "stored (in, out)" if _TO_HIDDEN.search(path.names[-1]) else "stored (out, in)"
        return Verdict(Role.EXPERTS, f"stack of {count} experts in two dimensions, {order}")
    if not _is_expert_stack(parameter, path) or min(parameter.shape[1:]) < 2:
        return None
    stored = {True: "stored (in, out)", False: "stored (out, in)", None: "taken as (out, in)"}
    order = stored[_expert_is_stored_in_out(parameter, path)]
    return Verdict(Role.EXPERTS, f"stack of {parameter.shape[0]} experts, {order}")


def _convolution(parameter: nn.Parameter, path: ModulePath) -> Verdict | None:
    convolution = _convolution_of(path)
    if convolution is None:
        # What weight_norm and others compute a kernel from: torch's parametrizations, and the older weight_g, weight_v.
        owner = path.modules[-3] if path.module_name(2) == "parametrizations" else path.owner
        reason = "part of a convolution, whose kernel is computed from it, as by weight_norm"
        return Verdict(Role.CONVOLUTION_OTHER, reason) if isinstance(owner, _CONVOLUTION) else None
    if _is_patch_embedding(convolution, path):
        return Verdict(Role.EMBEDDING, "patch embedding")
    is_transposed = isinstance(convolution, _TRANSPOSED_CONVOLUTION)
    kind = "transposed convolution" if is_transposed else "convolution"
    groups, (rows, columns) = convolution.groups, _matrix_of_group(parameter, convolution)
    if groups > 1 and convolution.in_channels == groups:
        return Verdict(Role.CONVOLUTION_OTHER, f"depthwise {kind}")
    if min(rows, columns) == 1:
        return Verdict(Role.CONVOLUTION_OTHER, f"{kind}: not a matrix, a single row or column")
    if groups > 1:
        if min(rows, columns) < FEW_SLICES:
            small = f"with groups of {rows} x {columns}, one side under {FEW_SLICES}"
            return Verdict(Role.CONVOLUTION_OTHER, f"{kind} {small}")
        kind = f"{kind} of {groups} groups, each a matrix"
    return Verdict(Role.CONVOLUTION, f"{kind}, stored (in, out)" if is_transposed else kind)


def _weight_of_layer(parameter: nn.Parameter, path: ModulePath) -> Verdict | None:
    name = path.names[-1]
    if isinstance(path.owner, nn.MultiheadAttention) and name in _ATTENTION_PROJECTIONS:
        return Verdict(Role.MATRIX, "attention projection")
    if _is_linear_weight(parameter, path):
        kind = "linear, stored (in, out)" if _is_transformers_conv1d(path.owner) else "linear"
        if groups := _groups_of_linear(parameter, path):
            kind = f"linear of {groups} groups, each a matrix"
        return Verdict(Role.MATRIX, kind)
    owner = path.modules[-3] if path.module_name(2) == "parametrizations" else path.owner
    if isinstance(owner, nn.Linear) and (owner is not path.owner or name in _COMPUTED_FROM):
        reason = "part of a linear layer, whose weight is computed from it, as by weight_norm"
        return Verdict(Role.OTHER, reason)
    return None


# Embeddings


def _find_embeddings(tree: ModelTree) -> dict[nn.Parameter, Verdict]:
    """The parameters that are embeddings, output embeddings or tied to one."""
    inputs = _modules_from(tree.root, "get_input_embeddings", is_transformers_model)
    outputs = _modules_from(tree.root, "get_output_embeddings", is_transformers_model)
    found: dict[nn.Parameter, Verdict] = {}
    tied_to: dict[nn.Parameter, str] = {}
    first_in: dict[tuple[int, ...], nn.Parameter] = {}
    for parameter, paths in tree.paths.items():
        if any(not inputs.isdisjoint(path.modules) and _convolution_of(path) is None for path in paths):
            found[parameter] = Verdict(Role.EMBEDDING, "input embedding")
        elif any(isinstance(path.owner, _EMBEDDING_MODULES) for path in paths):
            found[parameter] = Verdict(Role.EMBEDDING, "embedding")
        elif any(not outputs.isdisjoint(path.modules) for path in paths):
            found[parameter] = Verdict(Role.HEAD, "output embedding")
        else:
            continue
        # The first other name under which its owner is not an embedding module: that of a tied head.
        tied_to[parameter] = next(
            (path.name for path in paths[1:] if not isinstance(path.owner, _EMBEDDING_MODULES)), ""
        )
        first_in.setdefault(_memory(parameter), parameter)

    # Parameters that are other objects than an embedding but share its memory are tied to it as well.
    for parameter in tree.paths:
        first = first_in.get(_memory(parameter), parameter)
        if first is not parameter:
            found.setdefault(parameter, Verdict(Role.HEAD, "output embedding"))
            tied_to[parameter] = tree.paths[first][0].name
    return {
        parameter: Verdict(role, f"{reason}, tied to `{tied_to[parameter]}`" if tied_to[parameter] else reason)
        for parameter, (role, reason) in found.items()
    }


def _modules_from(root: nn.Module, method: str, has_it: Callable[[nn.Module], bool]) -> set[nn.Module]:
    """What a method of every model in the tree that has it returns, where it returns a module, or several."""
    found: set[nn.Module] = set()
    for model in filter(has_it, root.modules()):
        try:
            returned = getattr(model, method)()
        except (NotImplementedError, AttributeError):
            # It has none. Most models without text raise the first error; some look in a part that is optional.
            continue
        several = returned if isinstance(returned, tuple | list) else [returned]
        found.update(unwrap(each) for each in several if isinstance(each, nn.Module) and each is not model)
    return found


def _is_of_timm(module: nn.Module) -> bool:
    """Whether a module is a model of timm, which says what its head is."""
    is_model = callable(getattr(type(module), "get_classifier", None))
    return is_model and any(each.__module__.split(".")[0] == "timm" for each in type(module).__mro__)


def _memory(parameter: nn.Parameter) -> tuple[int, ...]:
    """Identify the memory of a parameter; ``data_ptr()`` would be 0 on the meta device and for DTensors."""
    try:
        local: Any = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        return local.untyped_storage()._cdata, local.storage_offset(), local.numel()
    except NotImplementedError:
        return (id(parameter),)  # a sparse tensor has no storage that another could share


# What the other rules look for


def _is_linear_weight(parameter: nn.Parameter, path: ModulePath) -> bool:
    if path.names[-1] != "weight" or parameter.ndim != 2:
        return False
    owner = path.owner
    return isinstance(owner, nn.Linear) or type(owner).__name__.endswith("Linear") or _is_transformers_conv1d(owner)


def _groups_of_linear(parameter: nn.Parameter, path: ModulePath) -> int | None:
    """How many groups, each with inputs of its own, have their rows below each other, as DeepSeek-V4's; or None."""
    is_grouped = _is_linear_weight(parameter, path) and type(path.owner).__name__.endswith("GroupedLinear")
    groups = number_of(path.owner, "n_groups", "num_groups") if is_grouped else None
    return groups if groups and parameter.shape[0] % groups == 0 and parameter.shape[0] > groups > 1 else None


def _has_a_row_for_each_output(parameter: nn.Parameter, path: ModulePath, model: nn.Module) -> bool:
    """Whether a layer's name says that it is a head, and it has as many rows as there are tokens or labels.

    Detectors have one more, for nothing, and some recognizers of speech a few, for durations.
    """
    if not _HEAD_NAME.search(path.layer_name):
        return False
    is_layer = _is_linear_weight(parameter, path) or _convolution_of(path) is not None
    configs = [getattr(each, "config", None) for each in (*path.modules, model)]
    counts = {count for config in configs if config is not None for count in _output_counts(config)}
    more = {count: FEW_SLICES if count >= FEW_SLICES else 2 for count in counts}
    return is_layer and any(parameter.shape[0] - count in range(more[count]) for count in counts)


def _output_counts(config: Any) -> Iterator[int]:
    """The numbers of tokens and labels in a configuration, and in those that it holds."""
    for name, value in getattr(config, "__dict__", {}).items():
        if hasattr(value, "to_dict"):
            yield from _output_counts(value)
        elif _OUTPUT_COUNT.search(name) and (count := number_of(config, name)):
            yield count
    if labels := number_of(config, "num_labels"):  # computed from a table of their names
        yield labels


def _convolution_of(path: ModulePath) -> nn.modules.conv._ConvNd | None:
    """The convolution whose kernel a parameter is, None for any other parameter."""
    return path.owner if isinstance(path.owner, _CONVOLUTION) and path.names[-1] == "weight" else None


def _matrix_of_group(parameter: nn.Parameter, convolution: nn.modules.conv._ConvNd) -> tuple[int, int]:
    """Rows and columns, as stored, of the matrix that each group of a convolution is."""
    return parameter.shape[0] // convolution.groups, math.prod(parameter.shape[1:])


def _stack(name: str, count: int, size: int, along_inputs: bool) -> str:
    """The splits of matrices below each other, as stored."""
    return f"{name} {count}*{size // count}{' along inputs' * along_inputs}"


def _is_patch_embedding(convolution: nn.modules.conv._ConvNd, path: ModulePath) -> bool:
    """Whether a convolution makes vectors of patches of the input: told by its stride, or by its name."""
    if isinstance(convolution, _TRANSPOSED_CONVOLUTION) or set(convolution.kernel_size) == {1}:
        return False
    names = [path.module_name(1), *(type(module).__name__ for module in path.modules[-2:-1])]
    is_named = any(_PATCH_EMBEDDING.search(name) for name in names)
    is_of_pixels = convolution.in_channels <= _PIXEL_CHANNELS
    takes_patches = is_of_pixels and convolution.stride == convolution.kernel_size
    if not is_named and not takes_patches:
        return False
    # Later stages are patch embeddings by name too, and a model of two parts has one for the pixels of each.
    model = [path.modules[0], *filter(is_transformers_model, path.modules)][-1]
    parts = [model]
    if takes_patches and path.transformers_model is None and min(convolution.kernel_size) > 2:
        parts += _part_of_several(path)
    firsts = [next(each for each in part.modules() if isinstance(each, _CONVOLUTION)) for part in parts]
    return any(first is convolution for first in firsts) or (is_named and is_of_pixels)


def _part_of_several(path: ModulePath) -> list[nn.Module]:
    """The first module on a path that has others beside it, unless it is the layer itself."""
    for module, part in itertools.pairwise(path.modules[:-1]):
        if len(list(module.children())) > 1:
            return [part]
    return []


def _is_transformers_conv1d(module: nn.Module) -> bool:
    mro = type(module).__mro__
    return any(each.__name__ == "Conv1D" and each.__module__ == "transformers.pytorch_utils" for each in mro)


def _has_a_row_for_each_expert(parameter: nn.Parameter, path: ModulePath) -> bool:
    """Whether a linear weight has as many rows as there are experts next to it, or next to the gate that it is in."""
    outer = len(path.names) - 3  # of the module that its own is in
    gates = [
        place
        for place, name in enumerate(path.names[:-2])
        if _CALLED_GATE.search(name.lower()) or (place == outer and re.search("gat|rout", name.lower()))
    ]
    blocks = path.modules[gates[-1] : -1] if gates else path.modules[-2:-1]
    return _is_linear_weight(parameter, path) and any(parameter.shape[0] in _expert_counts(each) for each in blocks)


def _expert_counts(block: nn.Module) -> set[int]:
    counts: set[int] = set()
    for name, child in block.named_children():
        experts = unwrap(child)
        if not _names_experts(name, experts) or "shared" in name or _CALLED_GATE.search(name.lower()):
            continue
        lists = [experts, *(inner for its_name, inner in experts.named_children() if "expert" in its_name.lower())]
        counts.update(len(each) for each in lists if isinstance(each, nn.ModuleList | nn.ModuleDict))
        counts.update(stack.shape[0] for stack in experts.parameters(recurse=False) if stack.ndim == 3)
    return counts


def _names_experts(name: str, module: nn.Module) -> bool:
    return "expert" in name.lower() or "expert" in type(module).__name__.lower()


def _is_expert_stack(parameter: nn.Parameter, path: ModulePath) -> bool:
    is_stack = parameter.ndim == 3 and parameter.shape[0] > 1 and not isinstance(path.owner, _CONVOLUTION)
    return is_stack and _names_experts(path.module_name(1), path.owner)


def _experts_below_each_other(parameter: nn.Parameter, path: ModulePath) -> int | None:
    """How many experts have their rows below each other in a matrix (experts x intermediate, hidden), as DBRX's."""
    experts, registered = path.owner, path.module_name(1)
    if not _names_experts(registered, experts) or "shared" in registered:
        return None
    shapes = {
        name: each.shape
        for name, each in experts.named_parameters(recurse=False)
        if each.ndim == 2 and (_FROM_HIDDEN.search(name) or _TO_HIDDEN.search(name))
    }
    # In a single expert those from the hidden size and those to it lie across each other.
    if path.names[-1] not in shapes or len(set(shapes.values())) > 1:
        return None
    rows, columns = parameter.shape
    sizes = {name: size for name, size in vars(experts).items() if isinstance(size, int)}
    if columns not in [sizes.get(name) for name in _HIDDEN_SIZE_NAMES]:
        return None
    counts = [size for name, size in sizes.items() if _EXPERT_COUNT.search(name)]
    return next((count for count in counts if any(count * size == rows for size in sizes.values() if size > 1)), None)


def _expert_is_stored_in_out(parameter: nn.Parameter, path: ModulePath) -> bool | None:
    """Whether each expert of a stack is stored (in, out), None if nothing tells."""
    experts = path.owner
    declared = getattr(experts, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    if type(experts).__name__ == "AriaGroupedExpertsGemm":  # before transformers 5.23
        return True
    hidden = _hidden_size(parameter, path)
    # Its own shape tells most: other stacks of the module may lie otherwise. A square matrix does not tell.
    for name, stack in [(path.names[-1], parameter), *experts.named_parameters(recurse=False)]:
        if stack.ndim != 3 or (stack.shape[1] == hidden) == (stack.shape[2] == hidden):
            continue
        if _TO_HIDDEN.search(name):
            return stack.shape[2] == hidden
        if _FROM_HIDDEN.search(name):
            return stack.shape[1] == hidden
    return None


def _hidden_size(parameter: nn.Parameter, path: ModulePath) -> int | None:
    """The size that experts begin and end with: what the router beside them takes, or what their module says."""
    for block in path.modules[-3:-1]:
        for name, child in block.named_children():
            if not re.search("gat|rout", name.lower()):
                continue
            shapes = (each.shape for each in child.parameters() if each.ndim == 2)
            if (size := next((columns for rows, columns in shapes if rows == parameter.shape[0]), None)) is not None:
                return size
    own = (getattr(path.owner, name, None) for name in _HIDDEN_SIZE_NAMES)
    return next((size for size in own if isinstance(size, int)), None)
