"""The arguments of ``build_optimizer`` as a typed object, for configuration files and command lines."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dion2_lightning.factory import build_optimizer, check_arguments
from dion2_lightning.optimizer import Dion2


@dataclass
class OptimizerSettings:
    """Settings of Dion2 for the matrices of a model and AdamW for everything else.

    A plain dataclass. As an argument of a LightningModule it is what ``--model.optimizer.lr`` or a YAML file fills in;
    :meth:`build` is then called in ``configure_optimizers``. A checkpoint that holds it among its hyperparameters loads
    with ``weights_only=True``.

    Args:
        lr: Learning rate of the matrices, and of everything else unless adamw_lr is given (default: 3e-4).
        algorithm: What updates the matrices: dion2; muon, which is dion2 at fraction 1; or adamw, the control
            (default: dion2).
        fraction: Share of each matrix's slices to update every step, in (0, 1] (default: 0.25).
        momentum: Decay rate of the matrices' momentum, in [0, 1) (default: 0.95).
        weight_decay: Of the matrices, decoupled (default: 0.01).
        adjust_lr_fn: The scale of a matrix's update; match_rms_adamw takes AdamW's learning rates, original is that of
            torch.optim.Muon (default: match_rms_adamw).
        scale_lr_by_fraction: Whether one lr fits every fraction (default: True).
        select: Select slices along the shorter axis, or always output slices (default: shorter).
        orthonormalize_dtype: Precision of the orthonormalization; None goes by the hardware (default: None).
        state_dtype: Precision of the momentum; None is float32 for half-precision parameters, else the parameter's own
            (default: None).
        adamw_lr: Learning rate of everything else; None is lr (default: None).
        adamw_weight_decay: Of embeddings, heads and other parameters that decay under AdamW; None is weight_decay
            (default: None).
        betas: AdamW's decay rates (default: (0.9, 0.999)).
        eps: AdamW's term in the denominator (default: 1e-8).
        check_finite: Refuse gradients with NaN or Inf, at the price of a synchronisation every step (default: False).
        overrides: By patterns of parameter names: dion2, adamw, or a mapping of group options (default: None).
        lora: Which LoRA factors are updated by Dion2: adamw for none, B, or both (default: adamw).
        share_replicas: Whether ranks that hold replicas, as under DDP and HSDP, share the work; None is where it pays
            (default: None).

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

    lr: float = 3e-4
    algorithm: Literal["dion2", "muon", "adamw"] = "dion2"
    fraction: float = 0.25
    momentum: float = 0.95
    weight_decay: float = 0.01
    adjust_lr_fn: Literal["match_rms_adamw", "original", "spectral", "none"] | None = "match_rms_adamw"
    scale_lr_by_fraction: bool = True
    select: Literal["shorter", "output"] = "shorter"
    orthonormalize_dtype: Literal["bfloat16", "float32", "float64"] | None = None
    state_dtype: Literal["bfloat16", "float32", "float64"] | None = None
    adamw_lr: float | None = None
    adamw_weight_decay: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    check_finite: bool = False
    overrides: dict[str, Any] | None = None
    lora: Literal["adamw", "B", "both"] = "adamw"
    share_replicas: bool | None = None

    def __post_init__(self) -> None:
        check_arguments(vars(self))

    def build(
        self,
        model: nn.Module,
        *,
        strategy: object | None = None,
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
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return build_optimizer(model, strategy=strategy, orthonormalize=orthonormalize, **settings)


# Plain data in a plain class: a checkpoint whose hyperparameters hold it needs no weights_only=False.
torch.serialization.add_safe_globals([OptimizerSettings])
