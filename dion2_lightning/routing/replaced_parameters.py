"""Whether an optimizer still trains its model, and alone: checked before every step.

An optimizer holds parameters, not a model. Sharding or rebuilding a model replaces its parameters, and an optimizer
that was built before goes on with the old ones: it trains nothing, and says nothing. Two optimizers that take turns on
the same parameters each keep a momentum that knows nothing of the other's steps.
"""

import functools
import threading
import weakref
from collections.abc import Collection, Sequence
from typing import Any, Final

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from dion2_lightning.matrices.layout import is_dtensor
from dion2_lightning.routing.router import parameters_by_name


def attach(optimizer: Optimizer, model: nn.Module) -> None:
    """Check before every ``step()`` that the optimizer trains the model, and no other optimizer its parameters.

    Nothing waits for the device, and the walk through the modules of a Llama of 7 billion parameters takes 0.4 ms.
    Copies of the optimizer, which hold other parameters, are not attached.

    Args:
        optimizer: Its groups give the names of parameters as ``param_names``.
        model: Kept by a weak reference.
    """
    attachment = _Attachment(model)
    with _LOCK:
        _ATTACHMENTS.add(attachment)
    optimizer.register_step_pre_hook(attachment)
    optimizer.register_load_state_dict_post_hook(attachment.start_anew)


class _Attachment:
    """The hooks of one optimizer.

    They compare identities of parameters that exist at that moment, and refer to none: frameworks replace them in model
    and optimizer together, which is right, and torch moves no sharded parameter that is referred to weakly.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._taken: list[int] = []
        self._lost: set[int] = set()

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a step, and before the closure that it may call."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._refuse_replaced(optimizer, parameters)
        # By a step with lr 0 torch.distributed.checkpoint makes an optimizer create its state; it changes no weight.
        if any(group["lr"] for group in optimizer.param_groups):
            with _LOCK:
                self._refuse_taking_turns(optimizer, parameters)
                self._take(parameters)

    def start_anew(self, optimizer: Optimizer) -> None:
        """After a state was loaded: whoever loads it says that it is of the weights as they are."""
        with _LOCK:
            self._taken, self._lost = [], set()

    def _take(self, parameters: Sequence[Tensor]) -> None:
        """Become the last to have stepped these parameters, which tells those that have stepped them before."""
        identities = [id(parameter) for parameter in parameters]
        if identities == self._taken:
            return
        for other in _ATTACHMENTS:
            if other is not self:
                other._lost |= set(identities).intersection(other._taken)
        self._taken = identities

    def _refuse_replaced(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        model = self._model()
        if model is None or _identities(model).issuperset(map(id, parameters)):
            return
        present = parameters_by_name(model)
        in_model = {id(parameter) for parameter in present.values()}
        replaced = [
            name
            for group in optimizer.param_groups
            for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False)
            if id(parameter) not in in_model and _replaces(present.get(name, _attribute(model, name)), parameter)
        ]
        if replaced:
            raise RuntimeError(
                f"{_some(replaced)} of this optimizer: the model has another parameter under the name, so a step would "
                "train nothing. The model was sharded (fully_shard), rebuilt (configure_model) or changed after the "
                "optimizer was built; build the optimizer after that, in Lightning in configure_optimizers"
            )

    def _refuse_taking_turns(self, optimizer: Optimizer, parameters: Collection[Tensor]) -> None:
        if not self._lost:
            return
        lost = [parameter for parameter in parameters if id(parameter) in self._lost]
        if lost:
            raise RuntimeError(
                f"{_names_of(lost, optimizer)} of this optimizer: another Dion2 has stepped the same parameters since "
                "this one's last step. Optimizers that take turns know nothing of each other's steps: use one, also "
                "for several Trainers, or give each its own parameters; in a new phase of training go on with the new "
                "one. To go back to this one, with the weights that it left, load its state: "
                "optimizer.load_state_dict(optimizer.state_dict())"
            )


_LOCK: Final = threading.Lock()
"""Optimizers of several threads may tell each other."""

_ATTACHMENTS: Final["weakref.WeakSet[_Attachment]"] = weakref.WeakSet()
"""Of the optimizers that live: each is held by its optimizer's hooks alone."""


def _identities(model: nn.Module) -> set[int]:
    """Of all parameters; ``named_parameters`` spends seven times as long, on names."""
    identities: set[int] = set()
    seen: set[int] = set()
    modules: list[nn.Module | None] = [model]
    while modules:
        module = modules.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            identities.update(map(id, module._parameters.values()))
            modules.extend(module._modules.values())
    return identities


def _names_of(parameters: Sequence[Tensor], optimizer: Optimizer) -> str:
    names = {
        id(parameter): name
        for group in optimizer.param_groups
        for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False)
    }
    return _some([names.get(id(parameter), f"of shape {tuple(parameter.shape)}") for parameter in parameters])


def _attribute(model: nn.Module, name: str) -> Any:
    """What a model has under the name of a parameter that is none any more; None where it has nothing."""
    try:
        return functools.reduce(getattr, name.split("."), model)
    except AttributeError:
        return None


def _replaces(new: Any, old: Tensor) -> bool:
    """Whether a model computes with ``new`` instead of ``old``.

    A name that is gone stands for a part that was taken out of the model, but FSDP1 leaves plain tensors under the
    names. And FSDP2 may leave its whole, plain parameters in the modules until the next forward pass.
    """
    return isinstance(new, Tensor) and not (is_dtensor(old) and not is_dtensor(new))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return "parameter " + ", ".join(repr(name) for name in names[:3]) + more
