"""What Lightning's Trainer and Fabric need to be told: names in checkpoints, and rates of groups that were split.

Lightning comes as ``lightning`` and as ``pytorch_lightning``, with classes of their own, and a Trainer takes callbacks
of its own package alone. So this file holds the hooks and imports neither; ``lightning.py`` and
``pytorch_lightning.py`` make callbacks of them.

``torch.optim`` numbers parameters in the order of its groups. ``ModelParallelStrategy`` reads the numbers of a
checkpoint file in the order of the model (``_rekey_optimizer_state_if_needed`` in
``lightning/fabric/strategies/model_parallel.py``): with several groups a momentum then goes to another parameter,
unnoticed where shapes are equal. It leaves names as they are, and so does
:meth:`dion2_lightning.Dion2.load_state_dict`; so a checkpoint with names loads under every strategy.
"""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from dion2_lightning.optimizer import MatrixOptimizer
from dion2_lightning.routing.model_tree import parameters_by_name


class NamesInCheckpoints:
    """Keep the states of :class:`~dion2_lightning.Dion2` optimizers in checkpoints by the names of parameters.

    Every Trainer has it where ``dion2-lightning`` is installed, by an entry point of Lightning's; it concerns no other
    optimizer. Where the package is only on the path, :func:`~dion2_lightning.build_optimizer` adds it to the Trainer
    that it knows, and elsewhere ``Trainer(callbacks=[NamedOptimizerStates()])`` does. It has no state of its own.
    """

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Replace numbers by names, where the module has a name for every parameter of the optimizer."""
        states, named = checkpoint["optimizer_states"], set(pl_module.parameters())
        for index, optimizer in enumerate(trainer.optimizers):
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            if isinstance(optimizer, MatrixOptimizer) and named.issuperset(parameters):
                states[index] = with_parameter_names(states[index], optimizer, pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint with numbers that ``ModelParallelStrategy`` has read in another order.

        Raises:
            RuntimeError: It was saved by another strategy and without this callback.
        """
        if trainer.state.fn != "fit":  # no optimizer is loaded, and those of an earlier fit may still be there
            return
        if trainer.strategy.lightning_restore_optimizer:  # by Dion2.load_state_dict, in the right order
            return
        order = {parameter: number for number, (_, parameter) in enumerate(pl_module.named_parameters())}
        for optimizer, saved in zip(trainer.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            if not isinstance(optimizer, MatrixOptimizer):
                continue
            for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=False):
                for parameter, number in zip(group["params"], saved_group["params"], strict=False):
                    if isinstance(number, int) and number != order.get(parameter):
                        raise RuntimeError(
                            "the checkpoint numbers the optimizer's parameters in the order of its groups, but "
                            f"{type(trainer.strategy).__name__} has read them in the order of the model, so states "
                            "went to other parameters. Load it with the strategy that saved it, and save it again with "
                            "Trainer(callbacks=[NamedOptimizerStates()])"
                        )


def with_parameter_names(state_dict: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Return an optimizer's state dict with names of parameters instead of numbers.

    For Fabric, which has no hook in between: ``fabric.save(path, {"model": model, "optimizer":
    with_parameter_names(optimizer.state_dict(), optimizer, model)})`` loads under every strategy.

    Args:
        state_dict: What ``optimizer.state_dict()`` or a strategy made of it: the groups, and the parameters in them,
            stand as in the optimizer, whatever their numbers. Empty on ranks that do not save. Not changed.
        optimizer: Its optimizer.
        module: The names are those in this module, without the prefixes of wrappers.

    Raises:
        ValueError: A parameter of the optimizer is not in the module.
    """
    if not state_dict:
        return state_dict
    names: dict[Any, str] = {}
    for name, parameter in parameters_by_name(module).items():
        names.setdefault(parameter, name)  # a tied parameter goes by its first name
    of_ids: dict[Any, str] = {}
    groups = []
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for parameter, identifier in zip(group["params"], saved["params"], strict=True):
            if parameter not in names:
                raise ValueError(
                    f"group {group.get('name')!r} of the optimizer holds a parameter of shape {tuple(parameter.shape)} "
                    f"that is not in {type(module).__name__}, so it has no name there"
                )
            of_ids[identifier] = names[parameter]
        groups.append({**saved, "params": [of_ids[identifier] for identifier in saved["params"]]})
    state = {of_ids[identifier]: value for identifier, value in state_dict["state"].items()}
    return {**state_dict, "state": state, "param_groups": groups}


class RatesOfTheBackbone:
    """Give every group of the backbone the learning rate that ``BackboneFinetuning`` gives the last group.

    That callback adds one group and steps the rate of the last; of the one, Dion2 makes several, for matrices, biases
    and norms. :func:`~dion2_lightning.build_optimizer` adds this callback where that one is, in the Trainer that it
    knows; elsewhere it has to stand before that one in ``Trainer(callbacks=[...])``.
    """

    def __init__(self) -> None:
        self._before: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Remember the rates of the last groups: it stands before ``BackboneFinetuning``."""
        self._before = [optimizer.param_groups[-1]["lr"] for optimizer in trainer.optimizers]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Change the other groups' rates where the last one's has changed."""
        if not self._before:  # not the first batch of an epoch
            return
        backbone = set(pl_module.backbone.parameters())
        for optimizer, before in zip(trainer.optimizers, self._before, strict=True):
            for group in optimizer.param_groups:
                is_of_backbone = isinstance(optimizer, MatrixOptimizer) and backbone.issuperset(group["params"])
                if is_of_backbone and group["lr"] == before:
                    group["lr"] = optimizer.param_groups[-1]["lr"]
        self._before = []


def add_callbacks(trainer: Any) -> None:
    """Add the callbacks that a Trainer needs and does not have."""
    if _is_of(trainer, "pytorch_lightning"):
        from dion2_lightning.integrations import pytorch_lightning

        classes: Any = pytorch_lightning
    else:
        from dion2_lightning.integrations import lightning

        classes = lightning
    needed = [classes.NamedOptimizerStates]
    if any(kind.__name__ == "BackboneFinetuning" for each in trainer.callbacks for kind in type(each).__mro__):
        needed.append(classes.BackboneRates)
    missing = [kind() for kind in needed if not any(isinstance(each, kind) for each in trainer.callbacks)]
    # In front: Lightning wants ModelCheckpoint last, and BackboneRates looks before BackboneFinetuning changes a rate.
    # A new list, because Lightning may be going through the old one.
    trainer.callbacks = [*missing, *trainer.callbacks]


def _is_of(trainer: Any, package: str) -> bool:
    """Whether a Trainer, which may be of a user's subclass, is that of a package."""
    return any(kind.__module__.split(".")[0] == package for kind in type(trainer).__mro__)
