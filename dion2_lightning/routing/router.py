"""Which parameter goes to which algorithm, as which matrices, and why.

Dion2 updates matrices that act as linear operators; embeddings, heads, norms, biases and the rest go to AdamW.
Parameters are told apart by the modules that own them, then by shape, then by the user's patterns. Libraries built on
torch are recognised by what their classes look like, so that none of them has to be installed.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# Names under which a wrapper registers the module that it wraps: torch.compile, activation checkpointing, FSDP1,
# Fabric.
_WRAPPED_NAMES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
_DATA_PARALLEL_CLASSES = ("DistributedDataParallel", "DataParallel")

_ALGORITHMS = ("dion2", "adamw")
_LORA_FACTORS: dict[str, tuple[str, ...]] = {"adamw": (), "B": ("lora_B",), "both": ("lora_A", "lora_B")}

_ROUTER_CLASS = re.compile(r"Router|Top(K|k|\d)\w*Gat|Mo[Ee](V\d+)?Gate$")
_HIDDEN_SIZE_NAMES = ("hidden_size", "hidden_dim", "d_model", "embed_dim", "embedding_dim", "model_dim", "dim")
_FROM_HIDDEN = re.compile(r"gate|up|^w1$|^w3$|^v1$|^wi")
_TO_HIDDEN = re.compile(r"down|^w2$|^wo$")

_FUSED_PROJECTION = re.compile(r"qkv|query_key_value|c_attn|gate_up")
_ATTENTION_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Decision:
    """Where one parameter goes, and why.

    Attributes:
        name: Name in the model, without the prefixes of wrappers. A tied parameter goes by the first of its names.
        shape: Shape of the whole parameter, also where it is sharded.
        algorithm: ``"dion2"``, ``"adamw"`` or, for a parameter that is left out, ``"frozen"``.
        reason: A few words for the report.
        group: Name of its parameter group, None where frozen.
        transposed: Whether a matrix is stored as (in, out).
        batched: Whether the leading axis counts matrices.
        parameter: The parameter itself.
    """

    name: str
    shape: tuple[int, ...]
    algorithm: str
    reason: str
    group: str | None
    transposed: bool
    batched: bool
    parameter: nn.Parameter = field(repr=False, compare=False)


@dataclass(frozen=True)
class Routing:
    """The decisions for every parameter of a model.

    Attributes:
        decisions: One for each parameter, in the order of ``model.named_parameters()``.
        groups: The entries of each parameter group but its parameters, by name, in the order of the groups.
        notes: What a user should know about how the model was read.
    """

    decisions: tuple[Decision, ...]
    groups: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...] = ()

    def param_groups(self, only: Iterable[Tensor] | None = None) -> list[dict[str, Any]]:
        """The parameter groups for the optimizer.

        Args:
            only: Parameters to keep; groups that hold none of them are left out (default: None, all parameters).

        Returns:
            One new dictionary a group, those of Dion2 first: ``params`` as (name, parameter) pairs in model order, a
            unique ``name``, ``algorithm``, ``batched`` and ``transposed`` where they are true, a zero ``weight_decay``
            where the parameters must not decay, and the options of an override.
        """
        kept = None if only is None else {id(parameter) for parameter in only}
        params: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in self.groups}
        for each in self.decisions:
            if each.group is not None and (kept is None or id(each.parameter) in kept):
                params[each.group].append((each.name, each.parameter))
        return [{"params": params[name], "name": name, **self.groups[name]} for name in self.groups if params[name]]

    def report(self) -> str:
        """The decisions as a table, with layer numbers collapsed to ``*``, then totals and notes.

        Returns:
            Lines of text without a final newline.
        """
        sections = [_decision_table(self.decisions), _total_table(self.decisions)]
        sections += [f"Note: {note}" for note in self.notes]
        return "\n\n".join(sections)


def route_parameters(
    model: nn.Module,
    *,
    overrides: Mapping[str, str | Mapping[str, Any]] | None = None,
    lora: str = "adamw",
) -> Routing:
    """Decide for every parameter of a model whether Dion2 or AdamW trains it.

    Weights of linear modules, attention projections and stacks of experts go to Dion2. Embeddings, output embeddings,
    heads, routers, convolutions, biases, norms and all other parameters go to AdamW. In a transformers model the head
    is what lies outside its ``base_model``; in a plain module no head is guessed.

    Args:
        model: The model, wrapped or not, on any device. It may hold DTensor parameters.
        overrides: What to do with the parameters whose full name, without the prefixes of wrappers, matches a pattern
            (``fnmatch``, case-sensitive): ``"dion2"``, ``"adamw"``, or a mapping of group options such as ``lr`` or
            ``weight_decay``, with ``algorithm``, ``transposed`` and ``batched`` to correct the routing itself. The
            first matching pattern wins, and a tied parameter is matched by any of its names. Every pattern must match
            a trainable parameter that no earlier one has taken (default: None).
        lora: Which LoRA factors go to Dion2: ``"adamw"`` for none, ``"B"``, or ``"both"``. Factors of embeddings and
            magnitude vectors always go to AdamW (default: ``"adamw"``).

    Returns:
        The decisions, from which come the parameter groups and a report.

    Raises:
        ValueError: If an argument is invalid, a pattern is without effect, an override sends to Dion2 what holds no
            matrix, nothing is trainable, or the parameters are uninitialized or flattened by FSDP1 or DeepSpeed ZeRO.
        TypeError: If an override is neither a string nor a mapping.
    """
    check_lora(lora)
    parsed = [_parse_override(pattern, value) for pattern, value in (overrides or {}).items()]
    _refuse_unusable_parameters(model)

    context = _read_model(model, lora)
    override_of = _assign_overrides(parsed, context.places)
    groups: dict[str, _Group] = {}
    decisions = []
    for parameter in context.places:
        decision, group = _decide(parameter, context, override_of.get(parameter))
        decisions.append(decision)
        if group is not None:
            groups.setdefault(group.name, group)
    _check_coverage(model, decisions)

    ordered = sorted(groups.values(), key=lambda group: group.rank(parsed))
    return Routing(tuple(decisions), {group.name: group.entries() for group in ordered}, _notes(context, decisions))


def check_lora(lora: object) -> None:
    """Check an argument ``lora``.

    Raises:
        ValueError: It is none of those that are known.
    """
    if lora not in _LORA_FACTORS:
        raise ValueError(f"lora must be one of {', '.join(map(repr, _LORA_FACTORS))}, got {lora!r}")


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters by their names without the prefixes of wrappers, tied ones under each of theirs."""
    return {place.name: parameter for parameter, place in _walk(_unwrap_root(model), (), ())}


# Reading the model


@dataclass(frozen=True)
class _Place:
    """Where a parameter hangs in the model. A tied parameter has several places.

    Attributes:
        names: Attribute names from the root, e.g. ``("model", "embed_tokens", "weight")``.
        path: The modules they pass, from the root to the owner: ``names[i]`` is an attribute of ``path[i]``.
    """

    names: tuple[str, ...]
    path: tuple[nn.Module, ...]

    @property
    def name(self) -> str:
        return ".".join(self.names)

    @property
    def owner(self) -> nn.Module:
        return self.path[-1]

    def attribute(self, level: int) -> str:
        """Name under which the owner (level 1), its parent (level 2), ... is registered; empty for the root."""
        return self.names[-1 - level] if level < len(self.names) else ""


@dataclass(frozen=True)
class _Context:
    """What the rules know about the whole model.

    Attributes:
        places: The places of every parameter, parameters in model order.
        embeddings: What kind of embedding a parameter is, where it is one.
        backbone: Name of the first outermost transformers model (empty for the root), None if there is none.
        lora: Which LoRA factors go to Dion2.
    """

    places: dict[nn.Parameter, list[_Place]]
    embeddings: dict[nn.Parameter, str]
    backbone: str | None
    lora: str


def _read_model(model: nn.Module, lora: str) -> _Context:
    root = _unwrap_root(model)
    places: dict[nn.Parameter, list[_Place]] = {}
    for parameter, place in _walk(root, (), ()):
        places.setdefault(parameter, []).append(place)
    backbones = (_backbone_name(place) for occurrences in places.values() for place in occurrences)
    backbone = next((name for name in backbones if name is not None), None)
    return _Context(places, _find_embeddings(root, places), backbone, lora)


def _walk(
    module: nn.Module, names: tuple[str, ...], path: tuple[nn.Module, ...]
) -> Iterator[tuple[nn.Parameter, _Place]]:
    """All parameters with their places, in the order of ``named_parameters()``, tied ones as often as they occur."""
    path = (*path, module)
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield parameter, _Place((*names, name), path)
    for name, child in module.named_children():
        child = _unwrap(child)
        if child not in path:
            yield from _walk(child, (*names, name), path)


def _unwrap(module: nn.Module) -> nn.Module:
    children = dict(module.named_children())
    wrapped = next((children[name] for name in _WRAPPED_NAMES if name in children), None)
    return module if wrapped is None else _unwrap(wrapped)


def _unwrap_root(model: nn.Module) -> nn.Module:
    model = _unwrap(model)
    if _has_class_name(model, _DATA_PARALLEL_CLASSES):
        return _unwrap_root(model.get_submodule("module"))
    return model


def _has_class_name(module: nn.Module, names: tuple[str, ...]) -> bool:
    return any(each.__name__ in names for each in type(module).__mro__)


def _is_transformers_model(module: nn.Module) -> bool:
    # On the class: PeftModel and others forward the attributes of an instance to the model that they wrap.
    return all(hasattr(type(module), name) for name in ("base_model_prefix", "get_input_embeddings"))


def _outermost_transformers_model(place: _Place) -> nn.Module | None:
    return next((module for module in place.path if _is_transformers_model(module)), None)


def _backbone_name(place: _Place) -> str | None:
    model = _outermost_transformers_model(place)
    return None if model is None else ".".join(place.names[: place.path.index(model)])


def _find_embeddings(root: nn.Module, places: dict[nn.Parameter, list[_Place]]) -> dict[nn.Parameter, str]:
    inputs = _modules_from(root, "get_input_embeddings")
    outputs = _modules_from(root, "get_output_embeddings")
    embeddings: dict[nn.Parameter, str] = {}
    for parameter, occurrences in places.items():
        if (kind := _embedding_kind(occurrences, inputs, outputs)) is not None:
            embeddings[parameter] = kind + _tied_suffix(occurrences)
    return _add_storage_ties(embeddings, places)


def _modules_from(root: nn.Module, method: str) -> set[nn.Module]:
    """What a method of every transformers model in the tree returns, where it returns a module."""
    found = set()
    for model in filter(_is_transformers_model, root.modules()):
        try:
            module = getattr(model, method)()
        except (NotImplementedError, AttributeError):
            # It has none: most models without text say so, and some look into a part that they may lack.
            continue
        if isinstance(module, nn.Module):
            found.add(_unwrap(module))
    return found


def _embedding_kind(places: list[_Place], inputs: set[nn.Module], outputs: set[nn.Module]) -> str | None:
    if any(not inputs.isdisjoint(place.path) for place in places):
        return "input embedding"
    if any(isinstance(place.owner, nn.Embedding | nn.EmbeddingBag) for place in places):
        return "embedding"
    if any(not outputs.isdisjoint(place.path) for place in places):
        return "output embedding"
    return None


def _tied_suffix(places: list[_Place]) -> str:
    """Names the first place of a tied embedding that is not an embedding module, as a head is."""
    heads = [place.name for place in places[1:] if not isinstance(place.owner, nn.Embedding | nn.EmbeddingBag)]
    return f", tied to `{heads[0]}`" if heads else ""


def _add_storage_ties(
    embeddings: dict[nn.Parameter, str], places: dict[nn.Parameter, list[_Place]]
) -> dict[nn.Parameter, str]:
    """Adds parameters that are other objects than an embedding but share its memory."""
    owners: dict[tuple[int, int, int], nn.Parameter] = {}
    for parameter in embeddings:
        if (storage := _storage(parameter)) is not None:
            owners.setdefault(storage, parameter)
    tied = dict(embeddings)
    for parameter in places:
        storage = _storage(parameter)
        owner = owners.get(storage) if storage is not None else None
        if owner is not None and owner is not parameter:
            kind = embeddings.get(parameter, "output embedding")
            tied[parameter] = f"{kind} tied to `{places[owner][0].name}`"
    return tied


def _storage(parameter: nn.Parameter) -> tuple[int, int, int] | None:
    """Identifies the memory of a parameter. On the meta device and for DTensors ``data_ptr()`` would be 0."""
    try:
        local: Any = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        return local.untyped_storage()._cdata, local.storage_offset(), local.numel()
    except NotImplementedError:
        return None  # it has none, as a sparse tensor


# Rules: each returns the algorithm and the reason, or None to leave the parameter to the next one.

_Verdict = tuple[str, str]


def _route(parameter: nn.Parameter, place: _Place, context: _Context) -> _Verdict:
    for rule in _RULES:
        if (verdict := rule(parameter, place, context)) is not None:
            return verdict
    return "adamw", "not a linear module's weight; opt in with an override"


def _route_non_matrix(parameter: nn.Parameter, place: _Place, context: _Context) -> _Verdict | None:
    if _is_bias(place.names[-1]):
        return "adamw", "bias"
    if parameter.ndim < 2:
        return "adamw", "vector" if parameter.ndim else "scalar"
    if parameter.ndim == 2 and min(parameter.shape) < 2:
        return "adamw", "not a matrix: a single row or column"
    if not parameter.is_floating_point():
        return "adamw", "not a real matrix"
    return None


def _route_lora_factor(parameter: nn.Parameter, place: _Place, context: _Context) -> _Verdict | None:
    factor = _lora_factor(place)
    if factor is None:
        return None
    if parameter.ndim == 2 and factor in _LORA_FACTORS[context.lora]:
        return "dion2", f'LoRA factor, lora="{context.lora}"'
    if "embedding" in factor:
        return "adamw", "LoRA factor of an embedding"
    return "adamw", "LoRA factor: its shorter axis is the rank"


def _route_embedding(parameter: nn.Parameter, place: _Place, context: _Context) -> _Verdict | None:
    return ("adamw", context.embeddings[parameter]) if parameter in context.embeddings else None


def _route_head(parameter: nn.Parameter, place: _Place, context: _Context) -> _Verdict | None:
    model = _outermost_transformers_model(place)
    if model is None:
        return None if context.backbone is None else ("adamw", f"head: outside transformers model `{context.backbone}`")
    base = getattr(model, "base_model", None)
    base = _unwrap(base) if isinstance(base, nn.Module) else model
    if base is model:
        return ("adamw", "head: one row a label") if _is_label_layer(parameter, place, model) else None
    if base in place.path:
        return None
    return "adamw", f"head: outside base model `{getattr(model, 'base_model_prefix', '')}`"


def _route_router(parameter: nn.Parameter, place: _Place, context: _Context) -> _Verdict | None:
    if _is_router_by_name(place) or _is_router_by_structure(parameter, place):
        return "adamw", "router: few rows, selection would starve experts"
    return None


def _route_expert_stack(parameter: nn.Parameter, place: _Place, context: _Context) -> _Verdict | None:
    if not _is_expert_stack(parameter, place) or min(parameter.shape[1:]) < 2:
        return None
    stored = {True: "stored (in, out)", False: "stored (out, in)", None: "taken as (out, in)"}
    return "dion2", f"stack of {parameter.shape[0]} experts, {stored[_experts_stored_in_out(place.owner)]}"


def _route_linear(parameter: nn.Parameter, place: _Place, context: _Context) -> _Verdict | None:
    if isinstance(place.owner, nn.MultiheadAttention) and place.names[-1] in _ATTENTION_PROJECTIONS:
        fused = ", fused projections kept whole" if place.names[-1] == "in_proj_weight" else ""
        return "dion2", f"attention projection{fused}"
    if not _is_linear_weight(parameter, place):
        return None
    stored = ", stored (in, out)" if _is_transformers_conv1d(place.owner) else ""
    fused = ", fused projections kept whole" if _FUSED_PROJECTION.search(place.attribute(1)) else ""
    return "dion2", f"linear{stored}{fused}"


def _route_convolution(parameter: nn.Parameter, place: _Place, context: _Context) -> _Verdict | None:
    return ("adamw", "convolution") if isinstance(place.owner, nn.modules.conv._ConvNd) else None


_RULES: tuple[Callable[[nn.Parameter, _Place, _Context], _Verdict | None], ...] = (
    _route_non_matrix,
    _route_lora_factor,  # before embeddings and heads: the factors of an adapted head are factors still
    _route_embedding,
    _route_head,
    _route_router,
    _route_expert_stack,
    _route_linear,
    _route_convolution,
)


def _is_bias(name: str) -> bool:
    return name == "bias" or name.endswith("_bias")


def _lora_factor(place: _Place) -> str | None:
    """The attribute of a peft LoRA layer that holds the parameter, e.g. ``lora_A``."""
    for module, name in zip(place.path, place.names, strict=True):
        if "lora_A" in getattr(type(module), "adapter_layer_names", ()) and name.startswith("lora_"):
            return name
    return None


def _is_linear_weight(parameter: nn.Parameter, place: _Place) -> bool:
    if place.names[-1] != "weight" or parameter.ndim != 2:
        return False
    owner = place.owner
    return isinstance(owner, nn.Linear) or type(owner).__name__.endswith("Linear") or _is_transformers_conv1d(owner)


def _is_transformers_conv1d(module: nn.Module) -> bool:
    mro = type(module).__mro__
    return any(each.__name__ == "Conv1D" and each.__module__ == "transformers.pytorch_utils" for each in mro)


def _is_label_layer(parameter: nn.Parameter, place: _Place, model: nn.Module) -> bool:
    # CLIPForImageClassification and others keep their body in several modules, so that none of them is the base model.
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    return place.path[-2:-1] == (model,) and _is_linear_weight(parameter, place) and parameter.shape[0] == labels


def _is_router_by_name(place: _Place) -> bool:
    # The root and whole transformers models may have "Router" in their names for other reasons.
    modules = (module for module in place.path[1:] if not _is_transformers_model(module))
    return "router" in place.attribute(1).lower() or any(_ROUTER_CLASS.search(type(m).__name__) for m in modules)


def _is_router_by_structure(parameter: nn.Parameter, place: _Place) -> bool:
    """Whether a linear weight has as many rows as there are experts next to it, or next to the gate that it sits in."""
    if not _is_linear_weight(parameter, place):
        return False
    blocks = [*place.path[-2:-1]]
    if re.search("gat|rout", place.attribute(2).lower()):
        blocks += place.path[-3:-2]
    return any(parameter.shape[0] in _expert_counts(block) for block in blocks)


def _expert_counts(block: nn.Module) -> set[int]:
    counts = set()
    for name, child in block.named_children():
        experts = _unwrap(child)
        if not _names_experts(name, experts) or "shared" in name:
            continue
        if isinstance(experts, nn.ModuleList | nn.ModuleDict):
            counts.add(len(experts))
        counts.update(stack.shape[0] for stack in experts.parameters(recurse=False) if stack.ndim == 3)
    return counts


def _names_experts(name: str, module: nn.Module) -> bool:
    return "expert" in name.lower() or "expert" in type(module).__name__.lower()


def _is_expert_stack(parameter: nn.Parameter, place: _Place) -> bool:
    if parameter.ndim != 3 or isinstance(place.owner, nn.modules.conv._ConvNd):
        return False
    return _names_experts(place.attribute(1), place.owner)


def _experts_stored_in_out(experts: nn.Module) -> bool | None:
    """Whether a module stores its experts as (E, in, out), None if nothing tells."""
    declared = getattr(experts, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    sizes = (getattr(experts, name, None) for name in _HIDDEN_SIZE_NAMES)
    hidden = next((size for size in sizes if isinstance(size, int)), None)
    for name, stack in experts.named_parameters(recurse=False):
        if stack.ndim != 3 or (stack.shape[1] == hidden) == (stack.shape[2] == hidden):
            continue  # a square matrix tells nothing, another one of the module will
        if _TO_HIDDEN.search(name):
            return stack.shape[2] == hidden
        if _FROM_HIDDEN.search(name):
            return stack.shape[1] == hidden
    return None


def _orientation(parameter: nn.Parameter, place: _Place) -> tuple[bool, bool]:
    """Whether the matrices are stored as (in, out), and whether the leading axis counts them."""
    if _is_expert_stack(parameter, place):
        return bool(_experts_stored_in_out(place.owner)), True
    return _is_linear_weight(parameter, place) and _is_transformers_conv1d(place.owner), False


# Overrides


@dataclass(frozen=True)
class _Override:
    """One entry of ``overrides``. None leaves a property as routed."""

    pattern: str
    algorithm: str | None = None
    transposed: bool | None = None
    batched: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def _parse_override(pattern: str, value: str | Mapping[str, Any]) -> _Override:
    options: dict[str, Any] = {"algorithm": value} if isinstance(value, str) else dict(_as_mapping(pattern, value))
    algorithm = options.pop("algorithm", None)
    if algorithm is not None and algorithm not in _ALGORITHMS:
        raise ValueError(
            f"override {pattern!r}: the algorithm must be 'dion2' or 'adamw', got {algorithm!r}; to leave parameters "
            "out, call requires_grad_(False) on them"
        )
    if reserved := options.keys() & {"params", "param_names", "name"}:
        raise ValueError(f"override {pattern!r}: {', '.join(sorted(reserved))} cannot be set, routing does that")
    storage = {key: options.pop(key, None) for key in ("transposed", "batched")}
    for key, flag in storage.items():
        if flag is not None and not isinstance(flag, bool):
            raise ValueError(f"override {pattern!r}: {key} must be True or False, got {flag!r}")
    return _Override(pattern, algorithm, **storage, options=options)


def _as_mapping(pattern: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"override {pattern!r}: expected 'dion2', 'adamw' or a mapping of group options, got {value!r}")
    return value


def _assign_overrides(
    overrides: list[_Override], places: dict[nn.Parameter, list[_Place]]
) -> dict[nn.Parameter, _Override]:
    assigned: dict[nn.Parameter, _Override] = {}
    for override in overrides:
        matched = [
            parameter
            for parameter, occurrences in places.items()
            if any(fnmatchcase(place.name, override.pattern) for place in occurrences)
        ]
        new = [parameter for parameter in matched if parameter.requires_grad and parameter not in assigned]
        if not new:
            raise ValueError(_useless_override(override.pattern, matched, assigned, places))
        assigned.update(dict.fromkeys(new, override))
    return assigned


def _useless_override(
    pattern: str,
    matched: list[nn.Parameter],
    assigned: dict[nn.Parameter, _Override],
    places: dict[nn.Parameter, list[_Place]],
) -> str:
    """Says why a pattern is without effect, and what to do about it."""
    taken = sorted({assigned[parameter].pattern for parameter in matched if parameter in assigned})
    if taken:
        return (
            f"override {pattern!r} is without effect: earlier patterns ({', '.join(map(repr, taken))}) take every "
            "trainable parameter that it matches, and the first match wins; move it up or remove it"
        )
    if matched:
        return (
            f"override {pattern!r} matches frozen parameters only, such as {places[matched[0]][0].name!r}; unfreeze "
            "them before building the optimizer, or remove the pattern"
        )
    names = {
        _collapse_numbers(place.name): None
        for parameter, occurrences in places.items()
        for place in occurrences
        if parameter.requires_grad
    }
    close = difflib.get_close_matches(pattern, list(names), n=3, cutoff=0.4)
    hint = f" (close names: {', '.join(map(repr, close))})" if close else ""
    return (
        f"override {pattern!r} matches no parameter{hint}; a pattern has to cover the whole name, as '*.q_proj.weight' "
        "does, and tells upper from lower case; correct or remove it"
    )


# Decisions and groups


@dataclass(frozen=True)
class _Group:
    """What parameters must have in common to share a group. ``override`` is set where it brings options."""

    algorithm: str
    batched: bool
    transposed: bool
    decays: bool
    override: _Override | None

    @property
    def name(self) -> str:
        flags = {"experts": self.batched, "transposed": self.transposed, "no-decay": not self.decays}
        base = "-".join([self.algorithm, *(flag for flag, is_set in flags.items() if is_set)])
        return base if self.override is None else f"{base} [{self.override.pattern}]"

    def rank(self, overrides: list[_Override]) -> tuple[bool, int, bool, bool, bool]:
        """Sort key: Dion2 first, then groups without options, then the plainest storage."""
        position = -1 if self.override is None else overrides.index(self.override)
        return self.algorithm != "dion2", position, self.batched, self.transposed, not self.decays

    def entries(self) -> dict[str, Any]:
        entries: dict[str, Any] = {"algorithm": self.algorithm}
        if self.batched:
            entries["batched"] = True
        if self.transposed:
            entries["transposed"] = True
        if not self.decays:
            entries["weight_decay"] = 0.0
        return entries if self.override is None else entries | dict(self.override.options)


def _decide(parameter: nn.Parameter, context: _Context, override: _Override | None) -> tuple[Decision, _Group | None]:
    place = context.places[parameter][0]
    shape = tuple(parameter.shape)
    if not parameter.requires_grad:
        return Decision(place.name, shape, "frozen", "requires no gradient", None, False, False, parameter), None

    algorithm, reason = _route(parameter, place, context)
    transposed, batched = _orientation(parameter, place)
    if override is not None:
        by = f"override `{override.pattern}`"
        algorithm, reason = (override.algorithm, by) if override.algorithm else (algorithm, f"{reason}; {by}")
        transposed = transposed if override.transposed is None else override.transposed
        batched = batched if override.batched is None else override.batched
        if algorithm == "dion2":
            _check_matrix(parameter, place.name, batched, override.pattern)
    if algorithm != "dion2":
        transposed = batched = False

    options = override if override is not None and override.options else None
    decays = _decays(parameter, place.name) or (options is not None and "weight_decay" in options.options)
    group = _Group(algorithm, batched, transposed, decays, options)
    return Decision(place.name, shape, algorithm, reason, group.name, transposed, batched, parameter), group


def _decays(parameter: nn.Parameter, name: str) -> bool:
    # Mamba marks parameters that must not decay with this attribute.
    marked = getattr(parameter, "_no_weight_decay", False)
    return parameter.ndim >= 2 and not _is_bias(name.rpartition(".")[2]) and not marked


def _check_matrix(parameter: nn.Parameter, name: str, batched: bool, pattern: str) -> None:
    subject = f"override {pattern!r} sends {name!r} of shape {tuple(parameter.shape)} to dion2, but"
    if not parameter.is_floating_point():
        raise ValueError(f"{subject} its dtype {parameter.dtype} is not real; send it to adamw")
    if batched and parameter.ndim != 3:
        raise ValueError(f"{subject} batched=True needs 3 axes, the first one to count matrices; remove it")
    if parameter.ndim == 3 and not batched:
        raise ValueError(f"{subject} it has 3 axes; add batched=True if the first one counts matrices, or use adamw")
    if parameter.ndim not in (2, 3):
        raise ValueError(f"{subject} it is not a matrix; narrow the pattern or send it to adamw")


def _refuse_unusable_parameters(model: nn.Module) -> None:
    parameters = list(model.named_parameters())
    for name, parameter in parameters:
        if getattr(parameter, "_fsdp_flattened", False):
            raise ValueError(
                f"{name!r} belongs to FullyShardedDataParallel (FSDP1), which flattens matrices into "
                "vectors; shard the model with FSDP2 instead (torch.distributed.fsdp.fully_shard)"
            )
        if hasattr(parameter, "ds_id") or hasattr(parameter, "ds_tensor"):
            raise ValueError(
                f"{name!r} is partitioned by DeepSpeed ZeRO, which flattens matrices into "
                "vectors; shard the model with FSDP2 instead (torch.distributed.fsdp.fully_shard)"
            )
        if is_lazy(parameter):
            raise ValueError(f"{name!r} has no shape yet; run a batch through the model before building the optimizer")
    if not any(parameter.requires_grad for _, parameter in parameters):
        raise ValueError(f"{type(model).__name__} has no trainable parameter; call requires_grad_() on some")


def _check_coverage(model: nn.Module, decisions: list[Decision]) -> None:
    routed = Counter(id(each.parameter) for each in decisions if each.algorithm != "frozen")
    trainable = Counter(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    if routed != trainable:
        raise RuntimeError(
            f"{len(trainable)} trainable parameters became {routed.total()} in the groups; this is a bug in "
            f"dion2_lightning, please report it with the class of the model, {type(model).__name__}"
        )


# The report


def _notes(context: _Context, decisions: list[Decision]) -> tuple[str, ...]:
    notes = []
    matrices = [each for each in decisions if each.algorithm == "dion2"]
    reasons = [each.reason for each in decisions if each.algorithm != "frozen"]
    if context.backbone is None and matrices:
        notes.append(
            "no transformers model was found, so no head was guessed. An output layer belongs to AdamW: if "
            f'`{matrices[-1].name}` is one, pass overrides={{"{matrices[-1].name}": "adamw"}}.'
        )
    if context.backbone and any(reason.startswith("head: outside transformers") for reason in reasons):
        notes.append(
            f"weights outside `{context.backbone}` were taken for heads. If one is an inner layer, pass "
            'overrides={"<its name>": "dion2"}.'
        )
    if context.lora == "adamw" and any(reason.startswith("LoRA factor:") for reason in reasons):
        notes.append('LoRA factors go to AdamW unless lora="B" or lora="both" is given.')
    if not matrices:
        notes.append("no parameter goes to Dion2: AdamW trains them all.")
    return tuple(notes)


def _decision_table(decisions: tuple[Decision, ...]) -> str:
    """One row for all decisions that differ by layer numbers only, in the order of their first layer."""
    rows: dict[tuple[Any, ...], list[Decision]] = {}
    for each in decisions:
        rows.setdefault((each.group, _collapse_numbers(each.name), each.shape, each.reason), []).append(each)
    cells = []
    for (_, pattern, shape, reason), row in rows.items():
        group = row[0].group or row[0].algorithm
        name = pattern if len(row) > 1 else row[0].name
        size = sum(each.parameter.numel() for each in row)
        cells.append([group, name, " x ".join(map(str, shape)) or "-", f"{len(row):,}", f"{size:,}", reason])
    return _table(["group", "parameter", "shape", "tensors", "parameters", "why"], cells, "<<>>><")


def _total_table(decisions: tuple[Decision, ...]) -> str:
    sizes = {
        algorithm: [each.parameter.numel() for each in decisions if each.algorithm == algorithm]
        for algorithm in (*_ALGORITHMS, "frozen")
    }
    trainable = sum(sum(sizes[algorithm]) for algorithm in _ALGORITHMS)
    cells = []
    for algorithm, each in sizes.items():
        share = "-" if algorithm == "frozen" else f"{sum(each) / max(trainable, 1):.1%}"
        cells.append([algorithm, f"{len(each):,}", f"{sum(each):,}", share])
    return _table(["algorithm", "tensors", "parameters", "of trainable"], cells, "<>>>")


def _collapse_numbers(name: str) -> str:
    """Replaces the numbers of layers and experts: ``layers.0.expert_3.weight`` becomes ``layers.*.expert_*.weight``."""
    return ".".join(re.sub(r"(^|_)\d+$", r"\1*", part) for part in name.split("."))


def _table(header: list[str], rows: list[list[str]], alignment: str) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = [
        "  ".join(f"{cell:{align}{width}}" for cell, align, width in zip(row, alignment, widths, strict=True))
        for row in (header, rule, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)
