"""A classifier next to its AdamW control: which runs there are, what each reached, and the table of them."""

import logging
from collections.abc import Callable
from dataclasses import Field, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from rich.table import Table

from dion2_lightning.monitoring.history import SelectionHistory
from recipes.selection_page import write_selection_page
from recipes.terminal import console

TITLES = {"dion2": "Dion2", "muon": "Muon", "adamw": "AdamW"}


class Compared(Protocol):
    """What the settings of such recipes have in common; their docstrings say what each is."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def model(self) -> str: ...
    @property
    def dataset(self) -> str: ...
    @property
    def algorithm(self) -> str: ...
    @property
    def lr(self) -> float: ...
    @property
    def adamw_lr(self) -> float | None: ...
    @property
    def control(self) -> bool: ...
    @property
    def beta1(self) -> float: ...
    @property
    def control_lr(self) -> float: ...
    @property
    def control_beta1(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def repeats(self) -> int: ...
    @property
    def output(self) -> Path: ...


Settings = TypeVar("Settings", bound=Compared)


@dataclass(frozen=True)
class Result:
    """What a run reached on the held-out rows, and what it left.

    Attributes:
        settings: Of the run.
        accuracy: On the held-out rows.
        loss: On the held-out rows.
        step_seconds: The median time of its steps in this call, if it made any.
        selection: Files that show what was selected; none where nothing was.
    """

    settings: Compared
    accuracy: float
    loss: float
    step_seconds: float | None
    selection: tuple[Path, ...] = ()


def planned_runs(settings: Settings) -> list[Settings]:
    """Returns the settings of each single run: every seed with the optimizer, then every seed with its control.

    The control differs in the matrices alone, which AdamW trains at its own learning rate, and in AdamW's first beta.
    """
    settings = replace(settings, adamw_lr=settings.lr if settings.adamw_lr is None else settings.adamw_lr)
    optimizers = [settings]
    if settings.control and settings.algorithm != "adamw":
        optimizers.append(replace(settings, algorithm="adamw", lr=settings.control_lr, beta1=settings.control_beta1))
    return [replace(each, seed=settings.seed + n) for each in optimizers for n in range(settings.repeats)]


def make_runs(runs: list[Settings], train: Callable[[Settings], Result]) -> list[Result]:
    """Makes one run after the other and says which; the routing, the same in each, is told once."""
    results: list[Result] = []
    for run in runs:
        logging.getLogger("dion2_lightning").setLevel(logging.WARNING if results else logging.INFO)
        console.print(f"\n[bold]{TITLES[run.algorithm]}[/], lr {run.lr:g}, seed {run.seed}")
        results.append(train(run))
    return results


def run_folder(settings: Compared) -> Path:
    """Returns where a run leaves what it makes."""
    return settings.output / settings.algorithm / f"seed-{settings.seed}"


def saved_model(settings: Compared) -> Path:
    """Returns where a run leaves its model, as `save_pretrained` writes it."""
    return run_folder(settings) / "model"


def selection_file(settings: Compared) -> Path:
    """Returns where a run leaves the statistics of what was selected."""
    return run_folder(settings) / "selection.json"


def show_selection(settings: Compared, history: SelectionHistory) -> tuple[Path, ...]:
    """Makes pictures and a page of what was selected, and returns these files and that of the statistics."""
    title = f"{settings.model} on {settings.dataset}: what {TITLES[settings.algorithm]} selected"
    page, *pictures = write_selection_page(history, title, run_folder(settings))
    return (page, selection_file(settings), *pictures)


def print_comparison(results: list[Result], title: str, *classes: str) -> None:
    """Prints what the runs reached, and where the first one's model and selection are.

    Args:
        results: Of all runs.
        title: Of the table.
        classes: The classes of transformers that load the model and what prepares its inputs.
    """
    table = Table("Optimizer", "lr", "Seed", "Accuracy", "Loss", "Time per step", title=title)
    for result in results:
        settings = result.settings
        table.add_row(
            TITLES[settings.algorithm],
            f"{settings.lr:g}",
            str(settings.seed),
            f"{result.accuracy:.1%}",
            f"{result.loss:.3f}",
            "-" if result.step_seconds is None else f"{result.step_seconds * 1e3:.0f} ms",
        )
    console.print()
    console.print(table)
    first = results[0]
    console.print("Load the trained model with")
    for name in classes:
        console.print(f'    {name}.from_pretrained("{saved_model(first.settings)}")', soft_wrap=True)
    if first.selection:
        console.print("See which parts of the matrices were trained, and when: open the first in a browser")
        for file in first.selection:
            console.print(f"    {file}", soft_wrap=True, highlight=False)
