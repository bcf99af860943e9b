"""The arguments of ``build_optimizer`` as a typed object, for configuration files and command lines."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from dion2_lightning.algorithms.hyperparameters import described
from dion2_lightning.factory import Dion2, FactorySettings, build_optimizer


@dataclass(kw_only=True)
class OptimizerSettings(FactorySettings):
    """Settings of Dion2 for the matrices of a model and AdamW for everything else.

    A plain dataclass. As an argument of a LightningModule it is what ``--model.optimizer.lr`` or a YAML file fills in;
    :meth:`build` is then called in ``configure_optimizers``. A checkpoint that holds it among its hyperparameters loads
    with ``weights_only=True``.

    Args:
        **settings: As follows.

    Raises:
        TypeError: A setting of the wrong type, such as a number given as text.
        ValueError: A setting out of range.

    Example::

        class Model(LightningModule):
            def __init__(self, optimizer: OptimizerSettings):
                super().__init__()
                self.optimizer_settings = optimizer

            def configure_optimizers(self):
                return self.optimizer_settings.build(self)
    """

    def build(
        self,
        model: nn.Module,
        *,
        strategy: Any = None,
        orthonormalize: Callable[[Tensor], Tensor] | None = None,
    ) -> Dion2:
        """Build the optimizer of a model, see :func:`~dion2_lightning.build_optimizer`.

        Args:
            model: Any module; ``self`` in Lightning's ``configure_optimizers``.
            strategy: What knows about the ranks, where the model does not (default: None).
            orthonormalize: A callable instead of Polar Express (default: None).

        Raises:
            TypeError: A setting that was changed to one of the wrong type, or a ``strategy`` of an unknown kind.
            ValueError: A setting that was changed to one out of range, or a model that cannot be trained so.
        """
        settings = {each.name: getattr(self, each.name) for each in fields(self)}
        return build_optimizer(model, strategy=strategy, orthonormalize=orthonormalize, **settings)


described(OptimizerSettings)(OptimizerSettings)
# Plain data in a plain class: a checkpoint whose hyperparameters hold it needs no weights_only=False.
torch.serialization.add_safe_globals([OptimizerSettings])
