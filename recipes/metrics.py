"""A run's figures in a file of its own, a line for each step that has some, whatever trackers there are besides."""

import json
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker


class MetricsFile(GeneralTracker):
    """A tracker of Accelerate that writes JSON lines.

    Args:
        path: The file.
        step: Steps that the run has behind it. What the file says of later ones is dropped, as they come again; a new
            run, which has none, begins an empty file.
    """

    name = "metrics_file"
    requires_logging_directory = False

    def __init__(self, path: Path, step: int) -> None:
        super().__init__()
        self.path, self.step = path, step

    @property
    def tracker(self) -> Path:
        return self.path

    def start(self) -> None:
        """Begins the file; Accelerate calls it on the main process alone."""
        goes_on = self.step > 0 and self.path.exists()
        kept = [line for line in read_metrics(self.path) if line["step"] <= self.step] if goes_on else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_suffix(".unfinished")
        written.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        written.replace(self.path)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Nothing: a recipe keeps its settings in a file of their own."""

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of such a file, without one that was not finished."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # nothing comes after a finished line
    return [json.loads(line) for line in lines]
