"""What W&B gets from all integrations: real runs, offline, of which the files are read back."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from accelerate import Accelerator
from lightning.pytorch.loggers import WandbLogger
from wandb.proto.wandb_internal_pb2 import Record

from dion2_lightning import SelectionCallback, SelectionLogger, SelectionMonitor
from tests.integrations.selection import ALL, WINDOW, ByHand, gradients, named, optimizer_by_hand
from tests.integrations.test_selection_lightning import fit_by_hand
from tests.integrations.test_selection_trainer import trainer_by_hand

pytestmark = pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs are kept in the folder of the test, which W&B reads from the environment once in a process."""
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path), "PROJECT": "project"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.chdir(tmp_path)
    yield
    wandb.teardown()


def records_of(path: Path) -> Iterator[Record]:
    """What a run's file holds: LevelDB's log format, blocks of 32 KiB with records of one or more fragments."""
    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if (left := -position % 32768) < 7:  # too short for the head of a fragment
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield Record.FromString(record)
            record = b""


def logged_in(folder: Path, step: str) -> tuple[dict[int, dict[str, float]], dict[str, int]]:
    """The metrics of the one run in a folder by what is their step there, and of which step its pictures are."""
    wandb.teardown()  # a file may be incomplete until W&B's own process ends
    [run] = folder.glob("wandb/offline-run-*")
    [file] = run.glob("*.wandb")
    rows: list[dict[str, Any]] = []
    for record in records_of(file):
        if record.WhichOneof("record_type") == "history":
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    metrics: dict[int, dict[str, float]] = {}
    pictures: dict[str, int] = {}
    for row in rows:
        found = {name[name.index("dion2/") :]: value for name, value in row.items() if "dion2/" in name}
        for name in [name for name in found if name.endswith("/filenames")]:
            pictures[name.removesuffix("/filenames")] = row[step]
            assert all((run / "files" / picture).read_bytes()[1:4] == b"PNG" for picture in found[name])
        images = tuple(f"{name}/" for name in pictures)
        if numbers := {name: value for name, value in found.items() if not name.startswith(images)}:
            metrics[row[step]] = numbers
    return metrics, pictures


def test_lightning(tmp_path: Path) -> None:
    """The history lies in a folder of the run, as Lightning's checkpoints do; those of other runs stay."""
    logger = WandbLogger(project="project", save_dir=tmp_path)
    fit_by_hand(SelectionMonitor(window=WINDOW, pictures=True), logger=logger)
    folder = tmp_path / "project" / str(logger.version)
    assert (folder / "dion2_selection.json").exists()
    assert (folder / "pictures" / "heatmap.png").exists()
    logger.experiment.finish()
    metrics, pictures = logged_in(tmp_path, "trainer/global_step")
    assert metrics == {step: named(step, *ALL) for step in range(3)}
    assert pictures == {"dion2/overview": 2, "dion2/heatmap": 2}


def test_the_trainer(tmp_path: Path) -> None:
    trainer_by_hand(
        tmp_path / "run", [SelectionCallback(window=WINDOW, pictures=True)], report_to=["wandb"], run_name="by hand"
    ).train()
    assert wandb.run is not None  # the Trainer leaves it open
    wandb.finish()
    metrics, pictures = logged_in(tmp_path, "train/global_step")
    assert metrics == {step + 1: named(step, *ALL) for step in range(3)}
    assert pictures == {"dion2/overview": 3, "dion2/heatmap": 3}


def test_accelerate(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, log_with="wandb")
    accelerator.init_trackers("project")
    model = ByHand()
    optimizer = accelerator.prepare(optimizer_by_hand(model))
    with SelectionLogger(accelerator, optimizer, every=1, window=WINDOW, pictures=True) as selection:
        for number, gradient in enumerate(gradients()):
            accelerator.backward(model(gradient)["loss"])
            optimizer.step()
            optimizer.zero_grad()
            selection.log(step=10 * number)
    accelerator.end_training()
    metrics, pictures = logged_in(tmp_path, "_step")
    assert metrics == {10 * step: named(step, *ALL) for step in range(3)}
    assert pictures == {"dion2/overview": 20, "dion2/heatmap": 20}
