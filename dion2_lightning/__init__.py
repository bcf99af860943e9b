"""Dion2 (arXiv 2512.16928) where people already train: Lightning, Accelerate and the Hugging Face Trainer."""

from dion2_lightning.clipping import clip_grad_norm_
from dion2_lightning.factory import build_optimizer
from dion2_lightning.optimizer import Dion2
from dion2_lightning.routing import Decision, Routing, route_parameters
from dion2_lightning.selection import Selection
from dion2_lightning.statistics import Figures, SelectionStatistics, SelectionWarning

__version__ = "0.1.0"

__all__ = [
    "Decision",
    "Dion2",
    "Figures",
    "Routing",
    "Selection",
    "SelectionStatistics",
    "SelectionWarning",
    "build_optimizer",
    "clip_grad_norm_",
    "route_parameters",
]
