"""What a run shows on the terminal: the recipe's own lines, what dion2_lightning logs, and errors."""

import logging
import os
import warnings

import datasets
import transformers
from rich.console import Console

IS_FIRST_RANK = all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))
"""Of several ranks this one speaks."""

console = Console(quiet=not IS_FIRST_RANK)


def quiet_libraries() -> None:
    """Leaves out what the frameworks say of their own accord."""
    logging.basicConfig(format="%(message)s")
    for name in ("accelerate", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of one process
    warnings.filterwarnings("ignore", "Slicing a flattened dim")  # Accelerate under HSDP
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def show_own_lines() -> None:
    """Shows what the recipe and dion2_lightning log, which :func:`quiet_libraries` leaves as it was."""
    for name in ("recipes", "dion2_lightning"):
        logging.getLogger(name).setLevel(logging.INFO if IS_FIRST_RANK else logging.WARNING)
