"""Supervised fine-tuning in a loop of one's own under Accelerate.

python recipes/supervised_fine_tuning/with_accelerate.py --help
accelerate launch --config_file recipes/launch/fsdp2-8.yaml recipes/supervised_fine_tuning/with_accelerate.py
"""

import math
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from dion2_lightning import SelectionLogger
from recipes.inputs import InputError
from recipes.metrics import MetricsFile
from recipes.precision import sum_in_float32
from recipes.selection_page import look_every
from recipes.supervised_fine_tuning.command import (
    begin_run,
    check_rows,
    keep_checkpoint,
    refuse_model_parallelism,
    run,
    selection_file,
    selects,
    show_outcome,
    tell,
)
from recipes.supervised_fine_tuning.data import collate_for, load_data
from recipes.supervised_fine_tuning.model import (
    autocast_dtype,
    count_flops_per_token,
    held_out_loss,
    load_model,
    save_model,
)
from recipes.supervised_fine_tuning.settings import Settings, run_folder
from recipes.throughput import Speedometer


def fine_tune(settings: Settings) -> float:
    """Trains, and leaves the model, metrics and a checkpoint in the run's folder; returns the held-out loss.

    Raises:
        InputError: If a setting asks for something that cannot be done.
    """
    dtype = autocast_dtype(settings)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=settings.accumulation,
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
    )
    refuse_model_parallelism(accelerator)
    sum_in_float32(accelerator)
    ranks = accelerator.num_processes
    done, last = begin_run(settings, "accelerate", ranks)
    accelerator.log_with.append(MetricsFile(run_folder(settings) / "metrics.jsonl", done))
    accelerator.init_trackers("")

    model, tokenizer = load_model(settings)
    data = load_data(settings, tokenizer, ranks)
    check_rows(settings, data.train)
    speed = Speedometer(count_flops_per_token(model, settings.length), accelerator.device, dtype, ranks)
    try:
        optimizer = settings.optimizer.build(model, strategy=accelerator)
    except ValueError as error:
        raise InputError(f"--optimizer: {error}") from error
    schedule = get_cosine_schedule_with_warmup(optimizer, round(settings.warmup * settings.steps), settings.steps)
    train, held_out = (
        DataLoader(rows, settings.batch_size, collate_fn=collate_for(settings.attention))
        for rows in (data.train, data.held_out)
    )
    model, optimizer, train, held_out = accelerator.prepare(model, optimizer, train, held_out)
    # Accelerate would advance a schedule that it prepares once for every process.
    accelerator.register_for_checkpointing(schedule)
    watch: Any = nullcontext()
    if selects(settings):
        every = look_every(settings.steps)
        watch = SelectionLogger(accelerator, optimizer, every=every, save_to=selection_file(settings))
    if last is not None:
        accelerator.load_state(last)

    def report(metrics: dict[str, float], step: int) -> None:
        accelerator.log(metrics, step)
        if accelerator.is_main_process:
            tell(step, metrics)

    def measure(step: int) -> float:
        speed.pause()
        loss = held_out_loss(model, held_out)
        speed.go_on()
        report({"held_out_loss": loss}, step)
        return loss

    reached = math.nan
    if last is None:
        reached = measure(0)
    elif done == settings.steps:
        reached = held_out_loss(model, held_out)  # stands in the metrics already
    batches = iter(skip_first_batches(train, done * settings.accumulation))
    total = torch.zeros((), device=accelerator.device)  # of the steps since the last line
    told = done
    with watch as selection:
        for step in range(done, settings.steps):
            for batch in islice(batches, settings.accumulation):
                with accelerator.accumulate(model):
                    # The step's mean over tokens, wherever they are: ranks' gradients are averaged, so their share of
                    # it is multiplied by their number; backward() divides by the accumulation.
                    share = model(**batch, num_items_in_batch=data.targets[step]).loss
                    accelerator.backward(share * ranks * settings.accumulation)
                    total += share.detach()
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), settings.max_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            rate = optimizer.param_groups[0]["lr"]
            schedule.step()
            speed.step(round(data.tokens[step] / ranks))
            done = step + 1
            if selection is not None:
                selection.log()
            if done % settings.log_every == 0:
                loss = accelerator.reduce(total).item() / (done - told)
                report({"train_loss": loss, "lr": rate, **speed.figures()}, done)
                total.zero_()
                told = done
            if done % settings.validate_every == 0 or done == settings.steps:
                reached = measure(done)
            if done % settings.checkpoint_every == 0 or done == settings.steps:
                speed.pause()
                save_checkpoint(accelerator, settings, done)
                speed.go_on()
    save_model(accelerator.unwrap_model(model), tokenizer, run_folder(settings) / "model")
    show_outcome(settings, reached, None if selection is None else selection.tracker.history)
    accelerator.end_training()
    return reached


def save_checkpoint(accelerator: Accelerator, settings: Settings, step: int) -> None:
    """Writes everything that the run needs to go on, and removes older checkpoints once it is there."""
    unfinished = run_folder(settings) / "checkpoints" / "unfinished"
    accelerator.save_state(unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        keep_checkpoint(unfinished, step)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run(fine_tune, Settings)
