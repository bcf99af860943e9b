"""What every entry point does around its training: read the arguments, keep quiet, and show what it leaves."""

import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from accelerate import Accelerator

from dion2_lightning.history import SelectionHistory
from recipes.inputs import InputError, read_settings
from recipes.offline import SMOLLM2
from recipes.resuming import describe, refuse_changes
from recipes.selection_page import write_selection_page
from recipes.supervised_fine_tuning.settings import FREE, Settings, run_folder
from recipes.terminal import IS_FIRST_RANK, quiet_libraries, show_own_lines

logger = logging.getLogger("recipes")

AnySettings = TypeVar("AnySettings", bound=Settings)


def run(
    fine_tune: Callable[[AnySettings], object], kind: type[AnySettings], arguments: list[str] | None = None
) -> None:
    """Reads settings from the command line and trains; ends with a message alone where these cannot work."""
    try:
        settings = read_settings(kind, arguments)
        quiet_libraries()
        show_own_lines()
        fine_tune(settings)
    except InputError as error:
        sys.exit(f"error: {error}")


def tell(step: int, metrics: Mapping[str, float]) -> None:
    """Prints a step's metrics, those of the selection left out: their page shows them better."""
    shown = {name: value for name, value in metrics.items() if not name.startswith("dion2/")}
    if shown:
        logger.info("step %d: %s", step, ", ".join(f"{name} {value:.5g}" for name, value in shown.items()))


def begin_run(settings: Settings, names: str, seal: str = "", ranks: int = 1) -> Path | None:
    """Writes down what a new run is asked for, or compares it with a run that goes on, and returns its checkpoint.

    Args:
        settings: Of the run.
        names: What the framework calls checkpoints, by a pattern; the step is the one number in a name.
        seal: The file in such a folder that is written last: a folder without it was not finished.
        ranks: Processes that read different rows.

    Raises:
        InputError: If there is none, if it is of another run, or if a new run would mix its checkpoints with those of
            another.
    """
    folder = run_folder(settings) / "checkpoints"
    found = sorted(folder.glob(names), key=step_of)
    whole = [each for each in found if each.is_file() or (each / seal).exists()]
    begun = run_folder(settings) / "settings.json"
    asked = describe(settings, FREE)
    if not settings.resume:
        if found:
            raise InputError(
                f"--output {settings.output}: there are checkpoints of an earlier run in {folder}. Go on from them "
                "with --resume true, choose another --output, or remove them."
            )
        if IS_FIRST_RANK:
            begun.parent.mkdir(parents=True, exist_ok=True)
            begun.write_text(json.dumps({**asked, "ranks": ranks}, indent=2), encoding="utf-8")
        return None
    if not whole or not begun.exists():
        raise InputError(f"--resume: there is no finished checkpoint in {folder}, or no {begun.name} beside it.")
    saved = json.loads(begun.read_text(encoding="utf-8"))
    refuse_changes(saved, asked, f"the run in {run_folder(settings)}")
    if saved["ranks"] != ranks:
        raise InputError(
            f"--resume: the run in {run_folder(settings)} was begun by {saved['ranks']} processes, which divide its "
            f"rows among them; now there are {ranks}. Start as many again."
        )
    return whole[-1]


def step_of(checkpoint: Path) -> int:
    """Returns the step that the name of a checkpoint says."""
    return int("".join(filter(str.isdigit, checkpoint.stem)))


def selection_file(settings: Settings) -> Path:
    """Returns where the statistics of the selection are kept."""
    return run_folder(settings) / "selection.json"


def refuse_model_parallelism(accelerator: Accelerator) -> None:
    """Raises an error where the launch configuration asks for more than replicas and shards.

    As of Accelerate 1.15 and transformers 5.23, Accelerate prepares no FSDP2 over tensor parallelism and saves no
    tensor-parallel model; context and sequence parallelism take packed rows apart.

    Raises:
        InputError: If it does.
    """
    parallelism = accelerator.parallelism_config
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise InputError(
            f"the launch configuration asks for tp_size {parallelism.tp_size}, cp_size {parallelism.cp_size} and "
            f"sp_size {parallelism.sp_size}, which this recipe cannot do: all have to be 1. Use FSDP2 for models that "
            "do not fit."
        )


def selects(settings: Settings) -> bool:
    """Returns whether there is a selection to look at: not where all of every matrix is trained in every step."""
    if settings.optimizer.algorithm != "dion2":
        return False
    if settings.lora_rank and settings.optimizer.lora == "adamw":
        logger.info("AdamW trains all adapters. --optimizer.lora B has Dion2 train their B, --optimizer.lora both all.")
        return False
    return True


def show_outcome(settings: Settings, loss: float, history: SelectionHistory | None) -> None:
    """Prints what the run reached and left, and makes a page of what was selected. One rank does it.

    Args:
        settings: Of the run.
        loss: On what is held out.
        history: Of the selection; None where all of every matrix is trained in every step.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    folder = run_folder(settings)
    lines = [f"Held-out loss {loss:.4f}. Load the fine-tuned model with", *_how_to_load(settings)]
    if history is not None:
        title = f"{settings.model} on {settings.dataset}: what Dion2 selected"
        page, *_ = write_selection_page(history, title, folder)
        lines += ["See which parts of the matrices were trained, and when: open in a browser", f"    {page}"]
    print("\n".join(lines))


def _how_to_load(settings: Settings) -> list[str]:
    saved = run_folder(settings) / "model"
    if not settings.lora_rank:
        lines = [f'AutoModelForCausalLM.from_pretrained("{saved}")', f'AutoTokenizer.from_pretrained("{saved}")']
    elif settings.model != SMOLLM2:
        lines = [f'AutoPeftModelForCausalLM.from_pretrained("{saved}")', f'AutoTokenizer.from_pretrained("{saved}")']
    else:  # peft would look for its weights in another format
        lines = ["model, tokenizer = load_model(Settings())", f'PeftModel.from_pretrained(model, "{saved}")']
    return [f"    {line}" for line in lines]
