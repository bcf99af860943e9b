"""Dion2 (arXiv 2512.16928) where people already train: Lightning, Accelerate and the Hugging Face Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from dion2_lightning.distributed.clipping import clip_grad_norm_
from dion2_lightning.factory import TRAINER_HOOKS, Dion2, build_optimizer
from dion2_lightning.kernels.selection import Selection
from dion2_lightning.monitoring.history import SelectionHistory
from dion2_lightning.monitoring.metrics import SelectionMetrics
from dion2_lightning.monitoring.tracker import SelectionTracker, SelectionWarning
from dion2_lightning.routing.router import Decision, Routing, route_parameters
from dion2_lightning.settings import OptimizerSettings

if TYPE_CHECKING:
    from dion2_lightning.integrations.accelerate import SelectionLogger as SelectionLogger
    from dion2_lightning.integrations.accelerate_parallelism import (
        CompressedParallelismConfig as CompressedParallelismConfig,
    )
    from dion2_lightning.integrations.lightning import NamedOptimizerStates as NamedOptimizerStates
    from dion2_lightning.integrations.lightning_hooks import with_parameter_names as with_parameter_names
    from dion2_lightning.integrations.lightning_selection import SelectionMonitor as SelectionMonitor
    from dion2_lightning.integrations.transformers import Dion2Factory as Dion2Factory
    from dion2_lightning.integrations.transformers import SynchronizeCallback as SynchronizeCallback
    from dion2_lightning.integrations.transformers_selection import SelectionCallback as SelectionCallback

__version__ = "0.1.0"

__all__ = [
    "Decision",
    "Dion2",
    "OptimizerSettings",
    "Routing",
    "Selection",
    "SelectionHistory",
    "SelectionMetrics",
    "SelectionTracker",
    "SelectionWarning",
    "build_optimizer",
    "clip_grad_norm_",
    "route_parameters",
]

_INTEGRATIONS: Final = {
    "CompressedParallelismConfig": "accelerate_parallelism",
    "Dion2Factory": "transformers",
    "NamedOptimizerStates": "lightning",
    "SelectionCallback": "transformers_selection",
    "SelectionLogger": "accelerate",
    "SelectionMonitor": "lightning_selection",
    "SynchronizeCallback": "transformers",
    "with_parameter_names": "lightning_hooks",
}
"""Names that need a framework, and the file in ``integrations`` that each is in; imported on first use.

They are not in ``__all__``: ``from dion2_lightning import *`` needs torch alone.
"""


def _add_lightning_callbacks(trainer: Any) -> None:
    import_module(f"{__name__}.integrations.lightning_hooks").add_callbacks(trainer)


# Only a program that has imported Lightning has a Trainer, so this imports nothing that is not there.
TRAINER_HOOKS.append(_add_lightning_callbacks)


def __getattr__(name: str) -> Any:
    if name not in _INTEGRATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.integrations.{_INTEGRATIONS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_INTEGRATIONS})
