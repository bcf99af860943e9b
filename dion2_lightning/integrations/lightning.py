"""The callbacks that ``lightning_hooks.py`` describes, for Trainers of the package ``lightning``."""

from lightning.pytorch import Callback

from dion2_lightning.integrations.lightning_hooks import NamesInCheckpoints, RatesOfTheBackbone


class NamedOptimizerStates(NamesInCheckpoints, Callback):
    """Keep the states of :class:`~dion2_lightning.Dion2` optimizers in checkpoints by the names of parameters.

    Every Trainer has it where ``dion2-lightning`` is installed, by an entry point of Lightning's; it concerns no other
    optimizer. Where the package is only on the path, :func:`~dion2_lightning.build_optimizer` adds it to the Trainer
    that it knows, and elsewhere ``Trainer(callbacks=[NamedOptimizerStates()])`` does. It has no state of its own.
    """


class BackboneRates(RatesOfTheBackbone, Callback):
    """Give every group of the backbone the learning rate that ``BackboneFinetuning`` gives the last group.

    That callback adds one group and steps the rate of the last; of the one, Dion2 makes several, for matrices, biases
    and norms. :func:`~dion2_lightning.build_optimizer` adds this callback where that one is, in the Trainer that it
    knows; elsewhere it has to stand before that one in ``Trainer(callbacks=[...])``.
    """


def callbacks() -> list[Callback]:
    """Make what every Trainer gets; the entry point."""
    return [NamedOptimizerStates()]
