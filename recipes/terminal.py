"""What a run shows on the terminal: the recipe's own lines, what dion2_lightning logs, and errors."""

import logging
import os
import warnings

import datasets
import transformers
from rich.console import Console

console = Console(quiet=os.environ.get("RANK", "0") != "0")
"""Of several ranks the first one speaks."""


def quiet_libraries() -> None:
    """Leaves out what the frameworks say of their own accord."""
    logging.basicConfig(format="%(message)s")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
