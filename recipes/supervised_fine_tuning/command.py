"""What every entry point does around its training: read the arguments, keep quiet, and show what it leaves."""

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from accelerate import Accelerator
from jsonargparse import auto_cli

from dion2_lightning.history import SelectionHistory
from dion2_lightning.plots import save_pictures
from dion2_lightning.report import render_report
from recipes.inputs import InputError
from recipes.offline import SMOLLM2
from recipes.supervised_fine_tuning.settings import Settings, run_folder
from recipes.terminal import quiet_libraries, show_own_lines

LOOKS_AT_SELECTION = 80
"""A run looks about so many times at what is selected: enough for pictures, whatever its length."""

logger = logging.getLogger("recipes")

AnySettings = TypeVar("AnySettings", bound=Settings)


def run(
    fine_tune: Callable[[AnySettings], object], kind: type[AnySettings], arguments: list[str] | None = None
) -> None:
    """Reads settings from the command line and trains; ends with a message alone where these cannot work."""
    try:
        settings = auto_cli(kind, args=arguments)
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


def last_checkpoint(settings: Settings, names: str) -> Path | None:
    """Returns the checkpoint to go on from, if the run is to go on.

    Args:
        settings: Of the run.
        names: What the framework calls checkpoints, by a pattern; the step is the one number in a name.

    Raises:
        InputError: If there is none, or if a new run would mix its checkpoints with those of another.
    """
    folder = run_folder(settings) / "checkpoints"
    found = sorted(folder.glob(names), key=step_of)
    if settings.resume and not found:
        raise InputError(f"--resume: there is no checkpoint in {folder}.")
    if found and not settings.resume:
        raise InputError(
            f"--output {settings.output}: there are checkpoints of an earlier run in {folder}. Go on from them with "
            "--resume true, choose another --output, or remove them."
        )
    return found[-1] if found else None


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


def looks_every(settings: Settings) -> int:
    """Returns the steps from one look at the selection to the next."""
    return max(1, settings.steps // LOOKS_AT_SELECTION)


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
        pictures = save_pictures(history, folder / "pictures")
        page = folder / "selection.html"
        page.write_text(render_report(history, title=title, pictures=pictures), encoding="utf-8")
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
