"""Supervised fine-tuning in a loop of one's own, with Accelerate.

python recipes/supervised_fine_tuning/with_accelerate.py --help
accelerate launch --config_file recipes/launch/fsdp2-8.yaml recipes/supervised_fine_tuning/with_accelerate.py
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import ProjectConfiguration, set_seed, tqdm
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup
from trl.trainer import add_fused_lm_head
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from dion2_lightning import OptimizerSettings, SelectionLogger
from recipes.offline_models import SMOLLM2, model_folder
from recipes.precision import sum_in_float32
from recipes.supervised_fine_tuning.data import DataSettings, load_rows
from recipes.supervised_fine_tuning.model import IGNORED, check_packing, pad_rows, validation_loss

ON_GPU = torch.cuda.is_available()
CONVERSATIONS = DataSettings()
OPTIMIZER = OptimizerSettings(lr=4e-4, adamw_lr=9e-5, momentum=0.81, fraction=0.25)


def fine_tune(
    model: str = SMOLLM2,
    attention: str = "sdpa",
    conversations: DataSettings = CONVERSATIONS,
    optimizer: OptimizerSettings = OPTIMIZER,
    steps: int = 24,
    batch_size: int = 2,
    accumulation: int = 1,
    output: Path = Path("runs/supervised_fine_tuning/accelerate"),
    report_to: str | None = None,
    validate_every: int = 12,
    checkpoint_every: int = 500,
    resume: bool = False,
) -> None:
    """Fine-tune a causal language model on conversations. By default neither network nor GPU is needed.

    Args:
        model: "smollm2", a name on the hub, or a folder.
        attention: Of transformers: sdpa, eager, flash_attention_2, ...
        conversations: What to train on.
        optimizer: The optimizer.
        steps: Optimizer steps: a tenth of warm-up, then a cosine.
        batch_size: Rows that a process reads at a time.
        accumulation: Times that it does so for a step.
        output: Folder for the model, checkpoints and trackers.
        report_to: Tracker of Accelerate, such as tensorboard or wandb.
        validate_every: Steps between two validations.
        checkpoint_every: Steps between two checkpoints.
        resume: Go on from the last checkpoint in ``output``.
    """
    accelerator = Accelerator(
        cpu=not ON_GPU,
        mixed_precision="bf16" if ON_GPU else "no",
        log_with=report_to,
        project_config=ProjectConfiguration(str(output), automatic_checkpoint_naming=True, total_limit=2),
    )
    sum_in_float32(accelerator)
    accelerator.init_trackers("supervised_fine_tuning")
    set_seed(conversations.seed)
    folder = model_folder(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    add_fused_lm_head(net)  # the loss without the logits of the whole vocabulary, as SFTTrainer computes it
    with accelerator.autocast():
        check_packing(net)
    with accelerator.main_process_first():  # the others find on the disk what it has tokenized
        train, validation = load_rows(conversations, tokenizer)
    ranks = accelerator.num_processes
    collate = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True)
    loader = DataLoader(train, batch_size, collate_fn=collate)
    validation_loader = DataLoader(pad_rows(validation, batch_size * ranks), batch_size, collate_fn=collate)

    dion2 = optimizer.build(net, strategy=accelerator)
    schedule = get_cosine_schedule_with_warmup(dion2, math.ceil(0.1 * steps), steps)
    net, dion2, loader, validation_loader = accelerator.prepare(net, dion2, loader, validation_loader)
    accelerator.register_for_checkpointing(schedule)  # prepared, it would advance once for every process
    selection = SelectionLogger(accelerator, dion2, every=max(1, steps // 80), save_to=True)
    if resume:
        accelerator.load_state()
    done = schedule.last_epoch
    batches = endless(loader, done * accumulation)
    progress = tqdm(range(done + 1, steps + 1))

    def log(step: int, **values: float) -> None:
        accelerator.log(values, step)
        if accelerator.is_main_process:
            progress.write(f"step {step}: " + ", ".join(f"{name} {value:.6g}" for name, value in values.items()))

    if not resume:
        log(0, val_loss=validation_loss(net, validation_loader, accelerator))
    for step in progress:
        net.train()
        parts = list(islice(batches, accumulation))
        # The loss of a step is the mean over its tokens with labels, on all ranks and in all parts.
        tokens = accelerator.reduce(sum((part["labels"] != IGNORED).sum() for part in parts))
        total = torch.zeros((), device=accelerator.device)
        for number, part in enumerate(parts, 1):
            with nullcontext() if number == accumulation else accelerator.no_sync(net):
                loss = net(**part, fused_lm_head=True, num_items_in_batch=tokens).loss
                accelerator.backward(loss * ranks)  # the ranks' gradients are averaged
            total += loss.detach()
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        dion2.step()
        dion2.zero_grad()
        log(step, loss=accelerator.reduce(total).item(), lr=schedule.get_last_lr()[0])
        schedule.step()
        selection.log(step)
        if step % validate_every == 0 or step == steps:
            log(step, val_loss=validation_loss(net, validation_loader, accelerator))
        if step % checkpoint_every == 0 or step == steps:
            accelerator.project_configuration.iteration = step  # names the folder
            accelerator.save_state()

    selection.close()
    accelerator.unwrap_model(net).save_pretrained(
        output, state_dict=accelerator.get_state_dict(net), is_main_process=accelerator.is_main_process
    )
    if accelerator.is_main_process:
        tokenizer.save_pretrained(output)
    accelerator.print(f"The model is in {output}.")
    accelerator.end_training()


def endless(loader: DataLoader[Any], first: int) -> Iterator[dict[str, Tensor]]:
    """Yield the batches from number ``first`` on, in one pass after the other."""
    yield from skip_first_batches(loader, first % len(loader))
    while True:
        yield from loader


def main() -> None:
    auto_cli(fine_tune)


if __name__ == "__main__":
    main()
