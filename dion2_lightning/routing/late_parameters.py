"""A check after every step: does the model have parameters that get gradients and that nothing trains?

An optimizer trains what it was built with. A parameter that was frozen then, or came into the model later, gets
gradients from then on and never moves, and no error would say so.
"""

import gc
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from dion2_lightning.matrices.layout import local


def check_after_steps(optimizer: Optimizer, model: nn.Module) -> None:
    """Let every ``step()`` warn of parameters that get gradients and that nothing trains; once of each, by name.

    They are in no group, and have the value that they had after the step before. A parameter of another optimizer,
    which may step less often, as in a GAN, is none of them. It waits for no device, and takes 2 ms for a Llama of 7
    billion parameters.
    """
    reference = weakref.ref(model)
    # By id, as nothing may refer to parameters: see replaced_parameters.py.
    versions: dict[int, tuple[int, int]] = {}
    looked_up: set[int] = set()

    def check(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        known = reference()
        if known is None:
            return
        before = dict(versions)
        versions.clear()
        versions.update({id(parameter): _version(parameter) for parameter in _untrained(optimizer, known)})
        unchanged = {each for each, version in versions.items() if before.get(each) == version} - looked_up
        if unchanged:
            looked_up.update(unchanged)
            late = unchanged - _held_by_optimizers()
            names = [name for name, parameter in known.named_parameters() if id(parameter) in late]
            if names:
                warnings.warn(_message(names), stacklevel=5)  # where step() is called

    optimizer.register_step_post_hook(check)


def _untrained(optimizer: Optimizer, model: nn.Module) -> list[Tensor]:
    """The model's parameters that have a gradient and are in no group."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [
        parameter
        for parameter in model.parameters()
        if parameter.grad is not None and parameter.requires_grad and id(parameter) not in trained
    ]


def _version(parameter: Tensor) -> tuple[int, int]:
    """Numbers that differ once a parameter, or what this rank holds of it, has been changed in place."""
    return parameter._version, local(parameter.detach())._version


def _held_by_optimizers() -> set[int]:
    """The parameters of all optimizers there are, by id; a search through all objects, for want of a list."""
    optimizers = [each for each in gc.get_objects() if issubclass(type(each), Optimizer)]
    return {
        id(parameter)
        for each in optimizers
        for group in getattr(each, "param_groups", ())
        for parameter in group["params"]
    }


def _message(names: Sequence[str]) -> str:
    return (
        "no optimizer trains some parameters of the model that get gradients: they were frozen when this one was "
        "built, or not in the model yet. To train them, with the learning rate that it was built with: "
        f"optimizer.add_param_group({{'params': [model.get_parameter(name) for name in {names}]}}). A learning rate "
        "scheduler has to be made again after that"
    )
