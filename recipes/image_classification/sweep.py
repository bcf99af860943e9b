"""How the recipe's learning rates were chosen."""

from pathlib import Path

from jsonargparse import auto_cli

from recipes.comparison import Result
from recipes.image_classification.data import load_split
from recipes.image_classification.settings import Settings
from recipes.image_classification.train import train
from recipes.sweep import Candidate, search
from recipes.terminal import quiet_libraries

ADAMW: list[Candidate] = [
    {"algorithm": "adamw", "lr": lr, "adamw_lr": adamw_lr}
    for lr, adamw_lr in [
        (5e-4, 5e-4),
        (1e-3, 1e-3),
        (2e-3, 2e-3),
        (4e-3, 4e-3),
        (8e-3, 8e-3),
        (2.8e-3, 2e-3),
    ]
]
DION2: list[Candidate] = [
    {"algorithm": "dion2", "momentum": momentum, "lr": lr, "adamw_lr": 2e-3}
    for momentum, lr in [
        (0.8, 2e-3),
        (0.8, 4e-3),
        (0.8, 8e-3),
        (0.8, 1.6e-2),
        (0.95, 4e-3),
        (0.95, 8e-3),
    ]
]


def sweep(seeds: list[int] | None = None, results: Path = Path("runs/image_sweep.jsonl")) -> None:
    """Searches the learning rates of AdamW and of Dion2, with the recipe's defaults for everything else.

    Args:
        seeds: The first one screens all candidates; the best of each optimizer, by loss, runs with the others too. By
            default [0, 1, 2, 3].
        results: File that takes a line for each run.
    """
    quiet_libraries()
    split = load_split(Settings())

    def run(candidate: Candidate, seed: int, folder: Path) -> Result:
        settings = Settings(**candidate, seed=seed, output=folder, validate_every=Settings.steps)
        return train(settings, split, progress=False)

    search([ADAMW, DION2], run, seeds=seeds or [0, 1, 2, 3], keep=1, by="loss", results=results)


if __name__ == "__main__":
    auto_cli(sweep)
