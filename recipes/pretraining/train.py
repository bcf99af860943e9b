"""Pretrain a causal language model from scratch with Dion2 and Accelerate.

python recipes/pretraining/train.py --help
accelerate launch --config_file recipes/launch/fsdp2-8.yaml recipes/pretraining/train.py --steps 1000
"""

import logging
import math
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed, tqdm
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, RandomSampler
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_wsd_schedule,
)

from dion2_lightning import OptimizerSettings, SelectionLogger, clip_grad_norm_
from recipes.precision import sum_in_float32
from recipes.pretraining.data import load_tokenizer, load_windows


def dion2() -> OptimizerSettings:
    return OptimizerSettings(lr=4.5e-3, adamw_lr=6.7e-3, momentum=0.4, weight_decay=0.1, betas=(0.9, 0.95))


@dataclass(frozen=True)
class Settings:
    """Pretrain a causal language model from scratch with Dion2 and Accelerate.

    Args:
        model: "small", a Llama of the three sizes below, or the configuration of a model on the hub or in a folder.
        hidden_size: Width of the small model.
        layers: Decoder layers of the small model.
        heads: Attention heads in each layer of the small model.
        tokenizer: "bytes", a name on the hub, or a folder.
        dataset: "python", the manual and docstrings of the running Python; a name on the hub; or a .csv, .json, .jsonl,
            .parquet or .txt file, the last with a blank line between documents.
        subset: Configuration of a dataset on the hub that has several.
        train_split: Split of a dataset on the hub to train on.
        text_column: Column of the documents.
        validation: Share of the documents, another split of the dataset on the hub, or a file.
        validation_windows: Windows to validate on, at most.
        length: Tokens of a window.
        tokenizing_processes: Processes that tokenize. The result is kept in the cache of `datasets`.
        optimizer: What trains the model. Where the help names two defaults, the last is this recipe's.
        steps: Optimizer steps.
        batch_size: Windows in a step, on all ranks together.
        micro_batch_size: Windows that a rank reads at once, by default all of its share. Gradients accumulate.
        warmup: Share of the steps in which the learning rate rises.
        decay: Share of the steps, at the end, in which it falls to zero. In between it is constant.
        max_gradient_norm: Gradients are scaled down to this norm.
        gradient_checkpointing: Compute activations again in the backward pass, which saves memory.
        compile: Compile the decoder layers.
        seed: Decides the initial weights, the order of the windows and dropout.
        output: Folder for checkpoints, metrics and the model. Several machines have to share it.
        log_every: Steps between metrics.
        log_with: A tracker that gets the metrics, such as tensorboard or wandb; "all" is all that are installed.
        validate_every: Steps between validations. One always comes at the end.
        checkpoint_every: Steps between checkpoints, of which the newest two are kept. One is always written at the end.
        resume: Continue from the newest checkpoint in `output`.
    """

    model: str = "small"
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    tokenizer: str = "bytes"
    dataset: str = "python"
    subset: str | None = None
    train_split: str = "train"
    text_column: str = "text"
    validation: float | str = 0.05
    validation_windows: int = 128
    length: int = 128
    tokenizing_processes: int | None = None
    optimizer: OptimizerSettings = field(default_factory=dion2)
    steps: int = 400
    batch_size: int = 16
    micro_batch_size: int | None = None
    warmup: float = 0.1
    decay: float = 0.5
    max_gradient_norm: float = 1.0
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    output: Path = Path("runs/pretraining")
    log_every: int = 10
    log_with: str | None = None
    validate_every: int = 100
    checkpoint_every: int = 200
    resume: bool = False


def make_accelerator(settings: Settings) -> Accelerator:
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=os.environ.get("ACCELERATE_MIXED_PRECISION", "bf16" if torch.cuda.is_available() else "no"),
        log_with=settings.log_with,
        project_config=ProjectConfiguration(str(settings.output), automatic_checkpoint_naming=True, total_limit=2),
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError(
            "The launch configuration asks for FSDP, which Accelerate turns on for several GPUs only; it would train "
            f"by {accelerator.distributed_type.value} here. Use recipes/launch/gpu-1.yaml or cpu.yaml."
        )
    if accelerator.parallelism_config and accelerator.parallelism_config.non_data_parallel_size > 1:
        raise ValueError("Tensor, context and sequence parallelism are not done here. Use recipes/launch/fsdp2-8.yaml.")
    sum_in_float32(accelerator)
    return accelerator


def make_model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Returns a model with random weights for the tokenizer's tokens."""
    vocabulary = 64 * math.ceil(len(tokenizer) / 64)  # GPUs multiply much faster by a multiple of 64
    if settings.model == "small":
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=settings.hidden_size,
            intermediate_size=8 * math.ceil(settings.hidden_size / 3),
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=settings.length,
        )
    else:
        config = AutoConfig.from_pretrained(settings.model, vocab_size=vocabulary, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for each in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(each, name, getattr(tokenizer, name))
    if settings.gradient_checkpointing:
        # Named gradient_checkpointing_enable before transformers 5.23.
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    if settings.compile:  # layer by layer: they are alike, so one is compiled
        for layer in (module for module in model.modules() if type(module).__name__ in model._no_split_modules):
            layer.compile()
    return model


@torch.no_grad()
def validate(accelerator: Accelerator, model: nn.Module, loader: DataLoader[Any]) -> float:
    """Returns the mean loss over all tokens of the validation windows, each counted once on any number of ranks."""
    model.eval()
    losses: list[Tensor] = []  # of windows, which have equally many tokens
    for batch in loader:
        windows = batch["input_ids"]
        logits = model(input_ids=windows, use_cache=False).logits[:, :-1].float()
        loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
        losses.append(accelerator.gather_for_metrics(loss.view(len(windows), -1).mean(1)))
    model.train()
    return torch.cat(losses).mean().item()


def train(settings: Settings) -> float:
    """Trains, and returns the validation loss in nats a token. Every rank calls it."""
    counts = ("steps", "batch_size", "log_every", "validate_every", "checkpoint_every")
    for name, value in ((name, getattr(settings, name)) for name in counts):
        if value < 1:
            raise ValueError(f"--{name} {value}: it must be at least 1")
    if min(settings.warmup, settings.decay) < 0 or settings.warmup + settings.decay > 1:
        raise ValueError(
            f"--warmup {settings.warmup}, --decay {settings.decay}: they are shares of the steps, together at most 1"
        )
    if not settings.resume and (settings.output / "checkpoints").exists():
        raise ValueError(f"--output {settings.output} holds checkpoints. Give --resume true, or another folder.")
    accelerator = make_accelerator(settings)
    ranks, batch_size = accelerator.num_processes, settings.batch_size
    micro_batch_size = settings.micro_batch_size or max(1, batch_size // ranks)
    parts, rest = divmod(batch_size, ranks * micro_batch_size)
    if rest:
        raise ValueError(f"--batch_size {batch_size} is no multiple of {ranks} ranks times {micro_batch_size} windows")
    accelerator.gradient_accumulation_steps = parts
    is_main = accelerator.is_main_process
    if is_main:  # says which parameters Dion2 trains, and which AdamW
        logging.getLogger("dion2_lightning").setLevel(logging.INFO)

    set_seed(settings.seed)
    tokenizer = load_tokenizer(settings.tokenizer)
    with accelerator.local_main_process_first():  # the others find the windows in the cache
        windows, validation = load_windows(settings, tokenizer)
    model = make_model(settings, tokenizer)
    optimizer = settings.optimizer.build(model, strategy=accelerator)
    scheduler = get_wsd_schedule(
        optimizer,
        num_warmup_steps=round(settings.warmup * settings.steps),
        num_decay_steps=round(settings.decay * settings.steps),
        num_training_steps=settings.steps,
        decay_type="linear",
    )
    order = torch.Generator().manual_seed(settings.seed)
    sampler = RandomSampler(windows, num_samples=settings.steps * batch_size, generator=order)  # all, then all again
    # With a generator of its own: it would draw from that of dropout whenever it begins, as when a run is resumed.
    loader = DataLoader(windows, micro_batch_size, sampler=sampler, generator=torch.Generator())
    validation_loader = DataLoader(validation, micro_batch_size)
    model, optimizer, loader, validation_loader = accelerator.prepare(model, optimizer, loader, validation_loader)
    set_seed(settings.seed, device_specific=True)  # other dropout on every rank

    accelerator.register_for_checkpointing(scheduler)
    selection = None
    if settings.optimizer.algorithm != "adamw":
        save_to = settings.output / "selection.json"
        selection = SelectionLogger(accelerator, optimizer, every=settings.log_every, save_to=save_to)
    if settings.resume:
        accelerator.load_state()
        accelerator.step = 0  # counts parts, and other ranks may have shared a batch in others
    step = scheduler.last_epoch

    def log(metrics: dict[str, float]) -> None:
        accelerator.log(metrics, step=step)
        if is_main:
            progress.write(f"step {step:>6}  " + "  ".join(f"{name} {value:.5g}" for name, value in metrics.items()))

    accelerator.init_trackers("pretraining", {name: str(value) for name, value in asdict(settings).items()})
    accelerator.print(
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters on {ranks} ranks, "
        f"{len(windows):,} windows to train on, {len(validation)} to validate on"
    )
    progress = tqdm(total=settings.steps, initial=step, disable=not sys.stderr.isatty())
    losses: list[Tensor] = []
    for batch in skip_first_batches(loader, step * parts):
        with accelerator.accumulate(model):
            loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss
            losses.append(loss.detach())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.unscale_gradients()  # has an effect in fp16
                norm = clip_grad_norm_(model.parameters(), settings.max_gradient_norm)  # of the whole model
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        progress.update()
        if selection is not None:
            selection.log(step)
        if step % settings.log_every == 0:
            # Windows have equally many tokens, so the mean of the means is the mean over all tokens.
            train_loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            log({"train_loss": train_loss, "learning_rate": learning_rate, "gradient_norm": norm.item()})
            losses.clear()
        if step % settings.validate_every == 0 and step < settings.steps:
            log({"val_loss": validate(accelerator, model, validation_loader)})
        if step % settings.checkpoint_every == 0 or step == settings.steps:
            accelerator.project_configuration.iteration = step  # names the folder
            accelerator.save_state()
    progress.close()

    val_loss = validate(accelerator, model, validation_loader)
    log({"val_loss": val_loss})
    folder = settings.output / "model"
    weights = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(folder, state_dict=weights, is_main_process=is_main)
    if is_main:
        tokenizer.save_pretrained(folder)
    accelerator.print(f"The model: {folder}")
    if selection is not None:
        selection.close()
        accelerator.print(f"What was selected, as a page: dion2-report {settings.output / 'selection.json'}")
    accelerator.end_training()
    return val_loss


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    train(auto_cli(Settings))
