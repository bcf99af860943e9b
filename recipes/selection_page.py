"""What a recipe shows of the selection: a page with figures, verdicts and pictures."""

from pathlib import Path

from dion2_lightning.monitoring.history import SelectionHistory
from dion2_lightning.monitoring.plots import save_pictures
from dion2_lightning.monitoring.report import render_report

LOOKS_AT_SELECTION = 80
"""A run looks about so many times at what is selected: enough for pictures, whatever its length."""


def look_every(steps: int) -> int:
    """Returns after how many steps to look again, in a run of so many."""
    return max(1, steps // LOOKS_AT_SELECTION)


def write_selection_page(history: SelectionHistory, title: str, folder: Path) -> tuple[Path, ...]:
    """Draws what was selected and returns the files: the page, `selection.html`, and its pictures."""
    page = folder / "selection.html"
    pictures = save_pictures(history, folder / "pictures")
    page.write_text(render_report(history, title=title, pictures=pictures), encoding="utf-8")
    return (page, *pictures)
