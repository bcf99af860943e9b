"""Hooks for Lightning's Trainer and Fabric: names in checkpoints, and the rates of groups that were split.

Lightning comes as ``lightning`` and as ``pytorch_lightning``, with classes of their own, and to import the other one
takes seconds. So this file holds the hooks and imports neither; ``lightning.py`` and ``pytorch_lightning.py`` make a
callback of them.

``torch.optim`` numbers parameters in the order of its groups. ``ModelParallelStrategy`` reads the numbers of a
checkpoint file in the order of the model (``_rekey_optimizer_state_if_needed`` in
``lightning/fabric/strategies/model_parallel.py``): with several groups a momentum then goes to another parameter,
unnoticed where shapes are equal. It leaves names alone, and so does
:meth:`dion2_lightning.Dion2.load_state_dict`; so a checkpoint with names loads under every strategy.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dion2_lightning.algorithms.hyperparameters import set_rate
from dion2_lightning.optimizer import MatrixOptimizer
from dion2_lightning.routing.model_tree import parameters_by_name


class OptimizerHooks:
    """Keep the states of :class:`~dion2_lightning.Dion2` optimizers by name, and what Lightning does to rates right.

    In checkpoints, states go by the names of parameters. ``BackboneFinetuning`` adds one group and changes the rate of
    the last one; Dion2 splits that group into several, for matrices, biases and norms, and this keeps their rates
    equal. ``LearningRateFinder`` and ``Tuner.lr_find`` set one rate for all groups, in the search and for the training
    after it; this keeps the ratios that the optimizer was built with, such as ``adamw_lr / lr``.

    Every Trainer has it where ``dion2-lightning`` is installed, by an entry point of Lightning's; it concerns no other
    optimizer. Where the package is only on the path, :func:`~dion2_lightning.build_optimizer` adds it to the Trainer
    that it knows, and elsewhere ``Trainer(callbacks=[NamedOptimizerStates()])`` does. It has no state of its own.
    """

    _rates: Sequence[float] = ()
    _ratios: "Sequence[_Ratios]" = ()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Move to the front, to see rates before ``BackboneFinetuning`` changes one."""
        _put_first(trainer, self)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Have the ratios of rates kept, before a finder sets one rate for all groups."""
        self._keep_ratios(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """End that with the fit: its optimizers may be used again."""
        self._end_searches()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Have ratios kept, as some finders search here; remember rates that ``BackboneFinetuning`` may change."""
        self._keep_ratios(trainer)
        if _has_callback(trainer, "BackboneFinetuning"):
            self._rates = [_rates(optimizer)[-1] for optimizer in trainer.optimizers]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Change the rates of the backbone's other groups where that of the last one has changed; end searches.

        From here on rates are what schedules and callbacks make of them. A search has callbacks of its own alone.
        """
        self._end_searches()
        if not self._rates:  # not the first batch of an epoch
            return
        backbone = set(pl_module.backbone.parameters())
        for optimizer, before in zip(trainer.optimizers, self._rates, strict=True):
            rates = _rates(optimizer)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                is_of_backbone = isinstance(optimizer, MatrixOptimizer) and backbone.issuperset(group["params"])
                if is_of_backbone and rate == before:
                    set_rate(group, "lr", rates[-1])
        self._rates = ()

    def _keep_ratios(self, trainer: Any) -> None:
        self._end_searches()
        if _has_callback(trainer, "LearningRateFinder"):
            self._ratios = [_Ratios(each) for each in trainer.optimizers if isinstance(each, MatrixOptimizer)]

    def _end_searches(self) -> None:
        for ratios in self._ratios:
            ratios.end()
        self._ratios = ()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Replace numbers by names, where the module has a name for every parameter of the optimizer."""
        states, named = checkpoint["optimizer_states"], set(pl_module.parameters())
        for index, optimizer in enumerate(trainer.optimizers):
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            if isinstance(optimizer, MatrixOptimizer) and named.issuperset(parameters):
                if not trainer.strategy.lightning_restore_optimizer:
                    states[index] = _in_optimizers_order(states[index], optimizer, pl_module)
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

    For Fabric, which has no such hook: ``fabric.save(path, {"model": model, "optimizer":
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


def _in_optimizers_order(state_dict: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Put the numbers of each group in the optimizer's order.

    ``ModelParallelStrategy`` numbers parameters in the order of the model, and sorts the numbers of a group.
    """
    numbers = {parameter: number for number, parameter in enumerate(module.parameters())}
    groups = []
    for group, saved in zip(optimizer.param_groups, state_dict.get("param_groups", ()), strict=False):
        its_numbers = [numbers[parameter] for parameter in group["params"]]
        is_numbered = set(its_numbers) == set(saved["params"])
        groups.append({**saved, "params": its_numbers} if is_numbered else saved)
    return {**state_dict, "param_groups": groups} if groups else state_dict


def add_callbacks(trainer: Any) -> None:
    """Add the callback that a Trainer needs, unless it has it."""
    if any(kind.__module__.split(".")[0] == "pytorch_lightning" for kind in type(trainer).__mro__):
        from dion2_lightning.integrations import pytorch_lightning

        made: Any = pytorch_lightning.callbacks()
    else:
        from dion2_lightning.integrations import lightning

        made = lightning.callbacks()
    if not any(isinstance(each, type(made[0])) for each in trainer.callbacks):
        _put_first(trainer, made[0])


def _has_callback(trainer: Any, name: str) -> bool:
    return name in {kind.__name__ for each in trainer.callbacks for kind in type(each).__mro__}


def _rates(optimizer: Optimizer) -> list[float]:
    """The learning rates of the groups, also where they are tensors, for which the host then waits."""
    return [float(group["lr"]) for group in optimizer.param_groups]


class _Ratios:
    """The ratios of an optimizer's rates, which every step of a search restores where all groups have one rate."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer, self._rates, self._has_searched = optimizer, _rates(optimizer), False
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def end(self) -> None:
        """Restore them a last time, if there was a search: it leaves one rate for all groups."""
        self._hook.remove()
        if self._has_searched:
            self._restore()

    def _before_step(self, *_: Any) -> None:
        self._has_searched = True
        self._restore()

    def _restore(self) -> None:
        """Give each group its share of the one rate; that of the first group stays."""
        first, *others = _rates(self._optimizer)
        if self._rates[0] and all(other == first for other in others):
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=False):  # some may have been added
                set_rate(group, "lr", first * (rate / self._rates[0]))


def _put_first(trainer: Any, callback: Any) -> None:
    # A new list, because Lightning may be going through the old one.
    trainer.callbacks = [callback, *(each for each in trainer.callbacks if each is not callback)]
