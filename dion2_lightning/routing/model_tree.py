"""Walking a model: where each parameter is, behind which wrappers, and which parameters are embeddings.

Libraries built on torch are recognised by what their classes look like, so that none of them has to be installed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from dion2_lightning.parameter_groups import refuse_flattened

_WRAPPED_NAMES: Final = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
"""Names of the wrapped module: in torch.compile, activation checkpointing, FSDP1 and Fabric."""

_DATA_PARALLEL_CLASSES: Final = ("DistributedDataParallel", "DataParallel")


@dataclass(frozen=True)
class ModulePath:
    """The module path of a parameter. A tied parameter has several.

    Attributes:
        names: Attribute names from the root, e.g. ``("model", "embed_tokens", "weight")``.
        modules: The modules along the path, from the root to the owner: ``names[i]`` is an attribute of ``modules[i]``.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    @property
    def name(self) -> str:
        """The parameter's name in the model, without the prefixes of wrappers."""
        return ".".join(self.names)

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter."""
        return self.modules[-1]

    def module_name(self, level: int) -> str:
        """Name under which the owner (level 1), its parent (level 2), ... is registered; empty for the root."""
        return self.names[-1 - level] if level < len(self.names) else ""

    @property
    def transformers_model(self) -> nn.Module | None:
        """The outermost transformers model along the path."""
        return next((module for module in self.modules if is_transformers_model(module)), None)


class Embedding(NamedTuple):
    """``"input embedding"``, ``"embedding"`` or ``"output embedding"``, and the name of what it is tied to, if any."""

    kind: str
    tied_to: str = ""


@dataclass(frozen=True)
class ModelTree:
    """A model, as the rules see it.

    Attributes:
        paths: The module paths of every parameter, parameters in model order.
        embeddings: The parameters that are embeddings, output embeddings or tied to one.
        backbone: Name of the first outermost transformers model (empty for the root), None if there is none.
    """

    paths: dict[nn.Parameter, list[ModulePath]]
    embeddings: dict[nn.Parameter, Embedding]
    backbone: str | None


def read_model(model: nn.Module) -> ModelTree:
    """Walk a model and find its embeddings.

    Raises:
        ValueError: If its parameters are uninitialized or flattened by FSDP1 or DeepSpeed ZeRO.
    """
    _refuse_unusable_parameters(model)
    root = _unwrap_root(model)
    paths: dict[nn.Parameter, list[ModulePath]] = {}
    for parameter, path in _walk(root, (), ()):
        paths.setdefault(parameter, []).append(path)
    return ModelTree(paths, _find_embeddings(root, paths), _backbone(paths))


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters by their names without the prefixes of wrappers, tied ones under each of theirs."""
    return {path.name: parameter for parameter, path in _walk(_unwrap_root(model), (), ())}


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module that wrappers such as torch.compile hold, or the module itself."""
    children = dict(module.named_children())
    wrapped = next((children[name] for name in _WRAPPED_NAMES if name in children), None)
    return module if wrapped is None else unwrap(wrapped)


def is_transformers_model(module: nn.Module) -> bool:
    """Whether a module is a model of transformers."""
    # On the class: PeftModel and others forward the attributes of an instance to the model that they wrap.
    return all(hasattr(type(module), name) for name in ("base_model_prefix", "get_input_embeddings"))


def collapse_numbers(name: str) -> str:
    """Replace the numbers of layers and experts: ``layers.0.expert_3.weight`` becomes ``layers.*.expert_*.weight``."""
    return ".".join(re.sub(r"(^|_)\d+$", r"\1*", part) for part in name.split("."))


def _walk(
    module: nn.Module, names: tuple[str, ...], modules: tuple[nn.Module, ...]
) -> Iterator[tuple[nn.Parameter, ModulePath]]:
    """All parameters with their paths, in the order of ``named_parameters()``, tied ones as often as they occur."""
    modules = (*modules, module)
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield parameter, ModulePath((*names, name), modules)
    for name, child in module.named_children():
        child = unwrap(child)
        if child not in modules:
            yield from _walk(child, (*names, name), modules)


def _unwrap_root(model: nn.Module) -> nn.Module:
    model = unwrap(model)
    if any(each.__name__ in _DATA_PARALLEL_CLASSES for each in type(model).__mro__):
        return _unwrap_root(model.get_submodule("module"))
    return model


def _refuse_unusable_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        refuse_flattened(parameter, repr(name))
        if is_lazy(parameter):
            raise ValueError(f"{name!r} has no shape yet; run a batch through the model before building the optimizer")


def _backbone(paths: dict[nn.Parameter, list[ModulePath]]) -> str | None:
    for occurrences in paths.values():
        for path in occurrences:
            if (model := path.transformers_model) is not None:
                return ".".join(path.names[: path.modules.index(model)])
    return None


# Embeddings


def _find_embeddings(root: nn.Module, paths: dict[nn.Parameter, list[ModulePath]]) -> dict[nn.Parameter, Embedding]:
    inputs = _modules_from(root, "get_input_embeddings")
    outputs = _modules_from(root, "get_output_embeddings")
    embeddings: dict[nn.Parameter, Embedding] = {}
    for parameter, occurrences in paths.items():
        if (kind := _embedding_kind(occurrences, inputs, outputs)) is not None:
            embeddings[parameter] = Embedding(kind, _tied_head(occurrences))

    # Parameters that are other objects than an embedding but share its memory are tied to it as well.
    first_in: dict[tuple[int, ...], nn.Parameter] = {}
    for parameter in embeddings:
        first_in.setdefault(_memory(parameter), parameter)
    for parameter in paths:
        first = first_in.get(_memory(parameter))
        if first is not None and first is not parameter:
            kind = embeddings[parameter].kind if parameter in embeddings else "output embedding"
            embeddings[parameter] = Embedding(kind, paths[first][0].name)
    return embeddings


def _modules_from(root: nn.Module, method: str) -> set[nn.Module]:
    """What a method of every transformers model in the tree returns, where it returns a module."""
    found = set()
    for model in filter(is_transformers_model, root.modules()):
        try:
            module = getattr(model, method)()
        except (NotImplementedError, AttributeError):
            # It has none. Most models without text raise the first error; some look in a part that is optional.
            continue
        if isinstance(module, nn.Module):
            found.add(unwrap(module))
    return found


def _embedding_kind(paths: list[ModulePath], inputs: set[nn.Module], outputs: set[nn.Module]) -> str | None:
    if any(not inputs.isdisjoint(path.modules) for path in paths):
        return "input embedding"
    if any(_is_embedding_module(path.owner) for path in paths):
        return "embedding"
    if any(not outputs.isdisjoint(path.modules) for path in paths):
        return "output embedding"
    return None


def _tied_head(paths: list[ModulePath]) -> str:
    """The first other name of an embedding under which its owner is not an embedding module: that of a tied head."""
    return next((path.name for path in paths[1:] if not _is_embedding_module(path.owner)), "")


def _is_embedding_module(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _memory(parameter: nn.Parameter) -> tuple[int, ...]:
    """Identify the memory of a parameter; ``data_ptr()`` would be 0 on the meta device and for DTensors."""
    try:
        local: Any = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        return local.untyped_storage()._cdata, local.storage_offset(), local.numel()
    except NotImplementedError:
        return (id(parameter),)  # a sparse tensor has no storage that another could share
