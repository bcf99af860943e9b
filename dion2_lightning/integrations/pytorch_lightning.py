"""The callbacks that ``lightning_hooks.py`` describes, for Trainers of the package ``pytorch_lightning``."""

from pytorch_lightning import Callback

from dion2_lightning.integrations.lightning_hooks import NamesInCheckpoints, RatesOfTheBackbone


class NamedOptimizerStates(NamesInCheckpoints, Callback):
    """Keep optimizers' states in checkpoints by the names of parameters; see :class:`NamesInCheckpoints`."""


class BackboneRates(RatesOfTheBackbone, Callback):
    """Give a backbone's groups the rate of ``BackboneFinetuning``; see :class:`RatesOfTheBackbone`."""


def callbacks() -> list[Callback]:
    """Make what every Trainer gets; the entry point."""
    return [NamedOptimizerStates()]
