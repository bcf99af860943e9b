"""Supervised fine-tuning with the Hugging Face Trainer.

python recipes/supervised_fine_tuning/with_trainer.py --help
torchrun --nproc_per_node 2 recipes/supervised_fine_tuning/with_trainer.py
accelerate launch --config_file recipes/launch/fsdp2-8.yaml recipes/supervised_fine_tuning/with_trainer.py
"""

from dataclasses import asdict
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from dion2_lightning import Dion2Factory, SelectionCallback
from recipes.inputs import InputError
from recipes.precision import sum_in_float32
from recipes.selection_page import look_every
from recipes.supervised_fine_tuning.command import (
    begin_run,
    check_rows,
    refuse_model_parallelism,
    run,
    selection_file,
    selects,
    show_outcome,
    tell,
)
from recipes.supervised_fine_tuning.data import Data, collate_for, load_data
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
    args = TrainingArguments(
        str(run_folder(settings) / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.optimizer.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * settings.steps),
        max_grad_norm=settings.max_norm,
        bf16=dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        train_sampling_strategy="sequential",  # the rows are in the run's order
        remove_unused_columns=False,
        eval_strategy="steps",
        eval_steps=settings.validate_every,
        eval_on_start=not settings.resume,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # it logs an average in the place of a loss that is none
        save_steps=settings.checkpoint_every,
        save_total_limit=1,
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
    )
    args.mixed_precision = "bf16" if args.bf16 else "no"  # the launcher's would stand otherwise
    if args.n_gpu > 1:
        raise InputError(
            f"one process sees {args.n_gpu} GPUs. Start one for each with `torchrun --nproc_per_node {args.n_gpu}`, or "
            "choose one with CUDA_VISIBLE_DEVICES=0."
        )
    _, last = begin_run(settings, "trainer", args.world_size, "checkpoint-", seal="trainer_state.json")
    model, tokenizer = load_model(settings)
    data = load_data(settings, tokenizer, args.world_size)
    check_rows(settings, data.train)
    speed = Speedometer(count_flops_per_token(model, settings.length), args.device, dtype, args.world_size)
    callbacks: list[TrainerCallback] = [Progress(speed, data)]
    selection = None
    if selects(settings):
        selection = SelectionCallback(every=look_every(settings.steps), save_to=selection_file(settings))
        callbacks.append(selection)
    trainer = FineTuner(
        model,
        args,
        data_collator=collate_for(settings.attention),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        optimizer_cls_and_kwargs=(Dion2Factory, {**asdict(settings.optimizer), "strategy": args}),
        callbacks=callbacks,
    )
    refuse_model_parallelism(trainer.accelerator)
    sum_in_float32(trainer.accelerator)
    trainer.speed = speed
    trainer.remove_callback(PrinterCallback)  # it prints all figures of the selection
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    loss: float = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    trainer.save_state()
    save_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, run_folder(settings) / "model")
    show_outcome(settings, loss, None if selection is None else selection.tracker.history)
    return loss


class FineTuner(Trainer):
    """The Trainer, with the held-out loss as a mean over tokens, not over batches, and the speed in its logs.

    The training loss it divides by the step's tokens on all ranks by itself (`average_tokens_across_devices`).
    """

    speed: Speedometer

    def create_optimizer(self, *arguments: Any) -> torch.optim.Optimizer:
        try:
            optimizer: torch.optim.Optimizer = super().create_optimizer(*arguments)
        except ValueError as error:
            raise InputError(f"--optimizer: {error}") from error
        return optimizer

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        self.speed.pause()
        metrics = {"eval_loss": held_out_loss(self.model_wrapped, self.get_eval_dataloader())}
        self.speed.go_on()
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, *arguments: Any) -> None:
        self.speed.pause()
        super()._save_checkpoint(*arguments)
        self.speed.go_on()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self.speed.figures()
        if self.is_world_process_zero():
            tell(self.state.global_step, logs)
        super().log(logs, *args, **kwargs)


class Progress(TrainerCallback):
    """Tells the speedometer of each step."""

    def __init__(self, speed: Speedometer, data: Data) -> None:
        self.speed = speed
        self.data = data

    def on_step_end(self, args: TrainingArguments, state: Any, *_: Any, **__: Any) -> None:
        self.speed.step(round(self.data.tokens[state.global_step - 1] / args.world_size))


if __name__ == "__main__":
    run(fine_tune, Settings)
