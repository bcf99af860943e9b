"""Walking a model: where each parameter is, behind which wrappers.

Libraries built on torch are recognised by what their classes look like, so that none of them has to be installed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from torch import nn
from torch.nn.parameter import is_lazy

from dion2_lightning.parameter_groups import WRAPPED_NAMES, refuse_flattened

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
    def layer_name(self) -> str:
        """Name under which the owner is registered, or the list or the adapter of peft that holds it."""
        names = self.names[:-1]
        if "modules_to_save" in names:
            names = names[: names.index("modules_to_save")]
        return next((name for name in reversed(names) if name != "base_layer" and not name.isdigit()), "")

    @property
    def transformers_model(self) -> nn.Module | None:
        """The outermost transformers model along the path."""
        return next((module for module in self.modules if is_transformers_model(module)), None)


@dataclass(frozen=True)
class ModelTree:
    """A model, as the rules see it.

    Attributes:
        root: The model without its wrappers.
        paths: The module paths of every parameter, parameters in model order.
        backbone: Name of the first outermost transformers model (empty for the root), None if there is none.
    """

    root: nn.Module
    paths: dict[nn.Parameter, list[ModulePath]]
    backbone: str | None


def read_model(model: nn.Module) -> ModelTree:
    """Walk a model; parameters that are uninitialized or flattened by FSDP1 or DeepSpeed ZeRO are an error."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for name, parameter in model.named_parameters():
        refuse_flattened(parameter, repr(name))
        if is_lazy(parameter):
            raise ValueError(f"{name!r} has no shape yet; run a batch through the model before building the optimizer")
    root = _unwrap_root(model)
    paths: dict[nn.Parameter, list[ModulePath]] = {}
    for parameter, path in _walk(root):
        paths.setdefault(parameter, []).append(path)
    return ModelTree(root, paths, _backbone(paths))


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters by their names without the prefixes of wrappers, tied ones under each of theirs."""
    return {path.name: parameter for parameter, path in _walk(_unwrap_root(model))}


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module that wrappers such as torch.compile hold, or the module itself."""
    children = module._modules  # faster than named_children(), and asked of every module
    wrapped = next(
        (child for name in WRAPPED_NAMES if name in children and (child := children[name]) is not None), None
    )
    return module if wrapped is None else unwrap(wrapped)


def is_transformers_model(module: nn.Module) -> bool:
    """Whether a module is a model of transformers."""
    # On the class: PeftModel and others forward the attributes of an instance to the model that they wrap.
    return all(hasattr(type(module), name) for name in ("base_model_prefix", "get_input_embeddings"))


def number_of(source: object, *names: str) -> int | None:
    """Return the first of some attributes of a module, or of a configuration, that is a number over 0."""
    for name in names:
        try:
            value = getattr(source, name, None)
        except Exception:  # a configuration whose layers differ in it
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def collapse_numbers(name: str) -> str:
    """Replace the numbers of layers and experts: ``layers.0.expert_3.weight`` becomes ``layers.*.expert_*.weight``."""
    return ".".join(re.sub(r"(^|_)\d+$", r"\1*", part) for part in name.split("."))


def _walk(
    module: nn.Module, names: tuple[str, ...] = (), modules: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[nn.Parameter, ModulePath]]:
    """All parameters with their paths, in the order of ``named_parameters()``, tied ones as often as they occur."""
    modules = (*modules, module)
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield parameter, ModulePath((*names, name), modules)
    for name, child in module.named_children():
        child = unwrap(child)
        if not any(child is module for module in modules):  # torchmetrics' modules have an == of their own
            yield from _walk(child, (*names, name), modules)


def _unwrap_root(model: nn.Module) -> nn.Module:
    model = unwrap(model)
    if any(each.__name__ in _DATA_PARALLEL_CLASSES for each in type(model).__mro__):
        return _unwrap_root(model.get_submodule("module"))
    return model


def _backbone(paths: dict[nn.Parameter, list[ModulePath]]) -> str | None:
    for occurrences in paths.values():
        for path in occurrences:
            if (model := path.transformers_model) is not None:
                place = next(place for place, module in enumerate(path.modules) if module is model)
                return ".".join(path.names[:place])
    return None
