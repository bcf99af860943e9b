"""Dion2 (arXiv 2512.16928) where people already train: Lightning, Accelerate and the Hugging Face Trainer."""

import importlib
from typing import TYPE_CHECKING, Any

from dion2_lightning.clipping import clip_grad_norm_
from dion2_lightning.factory import build_optimizer
from dion2_lightning.optimizer import Dion2
from dion2_lightning.routing import Decision, Routing, route_parameters
from dion2_lightning.selection import Selection
from dion2_lightning.settings import OptimizerSettings

if TYPE_CHECKING:
    from dion2_lightning.integrations.lightning import NamedOptimizerStates, with_parameter_names

__version__ = "0.1.0"

__all__ = [
    "Decision",
    "Dion2",
    "NamedOptimizerStates",
    "OptimizerSettings",
    "Routing",
    "Selection",
    "build_optimizer",
    "clip_grad_norm_",
    "route_parameters",
    "with_parameter_names",
]

# A framework is imported when one of its names is first used.
_INTEGRATIONS = {
    "NamedOptimizerStates": "dion2_lightning.integrations.lightning",
    "with_parameter_names": "dion2_lightning.integrations.lightning",
}


def __getattr__(name: str) -> Any:
    if name not in _INTEGRATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_INTEGRATIONS[name]), name)
