"""The callback that ``lightning_hooks.py`` describes, for Trainers of the package ``lightning``."""

from lightning.pytorch import Callback

from dion2_lightning.integrations.lightning_hooks import OptimizerHooks


class NamedOptimizerStates(OptimizerHooks, Callback):
    """Keep states in checkpoints by name, and rates of a thawed backbone equal; see :class:`OptimizerHooks`."""


def callbacks() -> list[Callback]:
    """Make what every Trainer gets; the entry point."""
    return [NamedOptimizerStates()]
