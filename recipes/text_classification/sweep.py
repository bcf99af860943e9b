"""How the recipe's learning rates were chosen."""

from pathlib import Path

from jsonargparse import auto_cli

from recipes.comparison import Result
from recipes.sweep import Candidate, search
from recipes.terminal import quiet_libraries
from recipes.text_classification.data import load_split
from recipes.text_classification.settings import Settings
from recipes.text_classification.train import train

ADAMW: list[Candidate] = [
    {"algorithm": "adamw", "lr": lr, "adamw_lr": adamw_lr}
    for lr, adamw_lr in [(2e-4, 8e-4), (4e-4, 4e-4), (4e-4, 8e-4), (8e-4, 8e-4), (4e-4, 1.6e-3), (8e-4, 1.6e-3)]
]
DION2: list[Candidate] = [
    {"algorithm": "dion2", "momentum": momentum, "lr": lr, "adamw_lr": adamw_lr}
    for momentum, lr, adamw_lr in [
        (0.8, 8e-4, 8e-4),
        (0.8, 1.6e-3, 8e-4),
        (0.8, 1.6e-3, 1.6e-3),
        (0.8, 3.2e-3, 1.6e-3),
        (0.95, 1.6e-3, 8e-4),
        (0.95, 1.6e-3, 1.6e-3),
    ]
]


def sweep(seeds: list[int] | None = None, keep: int = 4, results: Path = Path("runs/sweep.jsonl")) -> None:
    """Searches the learning rates of Dion2 and of AdamW, with the recipe's defaults for everything else.

    Args:
        seeds: The first one screens all candidates, the others decide among the best. By default [0, 1, 2].
        keep: Candidates of each optimizer that run with the other seeds.
        results: File that takes a line for each run.
    """
    quiet_libraries()
    split = load_split(Settings())

    def run(candidate: Candidate, seed: int, folder: Path) -> Result:
        settings = Settings(**candidate, seed=seed, output=folder, validate_every=Settings.steps)
        return train(settings, split, progress=False)

    search([ADAMW, DION2], run, seeds=seeds or [0, 1, 2], keep=keep, by="accuracy", results=results)


if __name__ == "__main__":
    auto_cli(sweep)
