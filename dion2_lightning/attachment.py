"""Whether an optimizer still trains its model, and alone: checked before a step where that may have changed.

An optimizer holds parameters, not a model. Sharding or rebuilding a model replaces its parameters, and an optimizer
that was built before goes on with the old ones: it trains nothing, and says nothing. Two optimizers that take turns on
the same parameters each keep a momentum that knows nothing of the other's steps.
"""

import functools
import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Final

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from dion2_lightning.layout import is_dtensor
from dion2_lightning.routing import parameters_by_name

_TURNS: Final = itertools.count(1)


def attach(optimizer: Optimizer, model: nn.Module) -> None:
    """Check before every ``step()`` that the optimizer trains the model, and no other optimizer its parameters.

    The model is looked through at the first step, and where the groups' parameters have changed or none has a gradient;
    nothing waits for the device. Copies of the optimizer, which hold other parameters, are not attached.

    Args:
        optimizer: Its groups give the names of parameters as ``param_names``.
        model: Kept by a weak reference.
    """
    attachment = _Attachment(optimizer, model)
    _ATTACHMENTS.add(attachment)
    optimizer.register_step_pre_hook(attachment)


class _Attachment:
    """A hook before ``step()``.

    It compares identities of parameters that exist at that moment, and keeps none: frameworks replace them in model and
    optimizer together, which is right.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._model = weakref.ref(model)
        self._seen: list[int] = []
        self._turn = 0

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parameters = self.parameters()
        identities = [id(parameter) for parameter in parameters]
        has_closure = any(each is not None for each in (*args[1:], *kwargs.values()))  # the first is self
        is_idle = not has_closure and all(parameter.grad is None for parameter in parameters)
        if is_idle or identities != self._seen:
            self._refuse_replaced()
        # By a step with lr 0 torch.distributed.checkpoint makes an optimizer create its state; it changes no weight.
        if any(group["lr"] for group in optimizer.param_groups):
            self._refuse_taking_turns(set(identities))
            self._turn = next(_TURNS)
        self._seen = identities

    def parameters(self) -> list[Tensor]:
        optimizer = self._optimizer()
        return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]

    def _refuse_replaced(self) -> None:
        optimizer, model = self._optimizer(), self._model()
        if optimizer is None or model is None:
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

    def _refuse_taking_turns(self, identities: set[int]) -> None:
        if not self._turn:
            return
        for other in _ATTACHMENTS:
            if other is not self and other._turn > self._turn:
                shared = [parameter for parameter in other.parameters() if id(parameter) in identities]
                if shared:
                    raise RuntimeError(
                        f"{self._names_of(shared)} of this optimizer: another Dion2 has stepped the same parameters "
                        "since this one's last step. Optimizers that take turns know nothing of each other's steps: "
                        "use one, or give each its own parameters; in a new phase of training go on with the new one"
                    )

    def _names_of(self, parameters: Sequence[Tensor]) -> str:
        optimizer = self._optimizer()
        assert optimizer is not None, "it is stepping"
        names = {
            id(parameter): name
            for group in optimizer.param_groups
            for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False)
        }
        return _some([names.get(id(parameter), f"of shape {tuple(parameter.shape)}") for parameter in parameters])


_ATTACHMENTS: Final["weakref.WeakSet[_Attachment]"] = weakref.WeakSet()
"""Of the optimizers that live: each is held by its optimizer's hooks alone."""


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
