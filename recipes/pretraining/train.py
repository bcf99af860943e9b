"""Pretrain a causal language model: the whole run, top to bottom.

python recipes/pretraining/train.py --help
accelerate launch --config_file recipes/launch/ddp-8.yaml recipes/pretraining/train.py --config my.yaml
torchrun --nproc_per_node 8 recipes/pretraining/train.py --config my.yaml
"""

import sys
from dataclasses import asdict

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_wsd_schedule

from dion2_lightning import Dion2, SelectionLogger, SelectionMetrics, clip_grad_norm_
from recipes.inputs import InputError, read_settings
from recipes.metrics import MetricsFile
from recipes.precision import sum_in_float32
from recipes.pretraining.checkpoints import Checkpoints, refuse_old_checkpoints
from recipes.pretraining.data import IGNORED, Window, fill_up, load_windows, shuffled_order
from recipes.pretraining.model import divide_model, is_divided, load_tokenizer, make_model
from recipes.pretraining.ranks import make_accelerator, share_of_batch, tensor_parallel_size
from recipes.pretraining.settings import Settings
from recipes.terminal import quiet_libraries, show_own_lines
from recipes.throughput import Speedometer, model_flops_per_token
from recipes.versions import checkpoint_activations

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pretrain(settings: Settings) -> float:
    """Trains, and leaves checkpoints, figures and the model in the output folder. Every rank calls it.

    Returns:
        The loss on the held-out windows, in nats a token.

    Raises:
        InputError: If an argument asks for something that cannot be done.
    """
    if not settings.resume:
        refuse_old_checkpoints(settings)
    accelerator = make_accelerator(settings)
    sum_in_float32(accelerator)
    tensor_parallel = tensor_parallel_size(accelerator)
    readers = accelerator.num_processes // tensor_parallel  # ranks that read different windows
    micro_batch_size, parts = share_of_batch(settings, readers)
    accelerator.gradient_accumulation_steps = parts
    set_seed(settings.seed)

    tokenizer = load_tokenizer(settings)
    with accelerator.local_main_process_first():  # the others then find the tokenized data on the disk
        train, held_out = load_windows(settings, tokenizer)
    model = make_model(settings, tokenizer)
    flops = model_flops_per_token(model, {"input_ids": train[0]["input_ids"][None]}) / tensor_parallel
    dtype = DTYPES.get(accelerator.mixed_precision, torch.float32)
    speed = Speedometer(flops, accelerator.device, dtype, readers)
    if tensor_parallel > 1:
        model = divide_model(model, accelerator, settings.output / "initial_model")
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    if settings.compile:
        compile_layers(model)
    optimizer = make_optimizer(settings, model, accelerator)
    scheduler = make_schedule(settings, optimizer)
    measured = Subset(held_out, range(min(settings.held_out_windows, len(held_out))))
    held_out_loader = make_loader(fill_up(measured, micro_batch_size * readers), micro_batch_size)
    model, optimizer, scheduler, held_out_loader = accelerator.prepare(model, optimizer, scheduler, held_out_loader)
    selection = make_selection_logger(settings, accelerator, optimizer)
    checkpoints = Checkpoints(settings, accelerator, model, optimizer, scheduler, selection)
    torch.manual_seed(settings.seed + accelerator.process_index // tensor_parallel)  # other data, other dropout

    step = checkpoints.load() if settings.resume else 0
    order = shuffled_order(len(train), settings.steps * settings.batch_size, settings.seed)
    loader = accelerator.prepare(make_loader(Subset(train, order[step * settings.batch_size :]), micro_batch_size))
    accelerator.log_with.append(MetricsFile(settings.output / "metrics.jsonl", step))
    accelerator.init_trackers("pretraining", config=flat(settings))
    describe(settings, accelerator, model, len(train), len(measured))

    # All windows have as many tokens, so the mean of the parts' and ranks' means is the mean over all tokens.
    losses: list[Tensor] = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
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
        speed.step(tokens=parts * batch["input_ids"].numel())
        selected = None if selection is None else selection.log(step)
        if step % settings.log_every == 0:
            figures = {
                "train_loss": accelerator.reduce(torch.stack(losses).mean(), "mean").item(),
                "learning_rate": learning_rate,
                "gradient_norm": norm.item(),
                **speed.figures(),
            }
            report(accelerator, figures, step, selected)
            losses.clear()
        if step % settings.validate_every == 0 and step < settings.steps:
            speed.pause()
            report(accelerator, {"held_out_loss": measure(accelerator, model, held_out_loader)}, step)
            speed.go_on()
        if step % settings.checkpoint_every == 0 or step == settings.steps:
            speed.pause()
            checkpoints.save(step)
            speed.go_on()

    held_out_loss = measure(accelerator, model, held_out_loader)
    report(accelerator, {"held_out_loss": held_out_loss}, step)
    save_model(accelerator, settings, model, tokenizer)
    if selection is not None:
        selection.close()
    conclude(accelerator, settings, selection)
    accelerator.end_training()
    return held_out_loss


def make_loader(windows: Dataset[Window], size: int) -> DataLoader[Window]:
    # Every pass of a DataLoader draws a seed, from the generator of dropout if it has none of its own: a resumed run,
    # which makes more passes, would go on with other masks.
    return DataLoader(windows, size, generator=torch.Generator())


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles the decoder layers in place: being alike they are compiled once, and no name changes.

    Raises:
        InputError: If the architecture does not say what its layers are.
    """
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    if not layers:
        raise InputError(f"--compile: {type(model).__name__} does not name its layers. Leave it out.")
    for layer in layers:
        layer.compile()


def make_optimizer(settings: Settings, model: nn.Module, accelerator: Accelerator) -> Dion2:
    """Returns Dion2 for the matrices and AdamW for the rest; under DDP the ranks share the work.

    Raises:
        InputError: If a setting does not suit the model, or the strategy leaves no matrices.
    """
    try:
        return settings.optimizer.build(model, strategy=accelerator)
    except ValueError as error:
        raise InputError(f"--optimizer: {error}") from error


def make_schedule(settings: Settings, optimizer: Optimizer) -> LRScheduler:
    """Returns a warm-up, a plateau, and a straight line down to zero."""
    schedule: LRScheduler = get_wsd_schedule(
        optimizer,
        num_warmup_steps=round(settings.warmup * settings.steps),
        num_decay_steps=round(settings.decay * settings.steps),
        num_training_steps=settings.steps,
        decay_type="linear",
    )
    return schedule


def make_selection_logger(settings: Settings, accelerator: Accelerator, optimizer: Optimizer) -> SelectionLogger | None:
    """Returns what logs the selection; None where all of every matrix is trained in every step."""
    if settings.optimizer.algorithm != "dion2":
        return None
    save_to = settings.output / "selection.json"
    return SelectionLogger(accelerator, optimizer, every=settings.log_every, save_to=save_to)


@torch.no_grad()
def measure(accelerator: Accelerator, model: nn.Module, loader: DataLoader[Window]) -> float:
    """Returns the mean loss over all tokens of the held-out windows, the same on every rank and for every number."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in loader:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        total[0] += functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        total[1] += (labels != IGNORED).sum()
    model.train()
    loss, tokens = accelerator.reduce(total, "sum").tolist()
    return float(loss / tokens)


def save_model(
    accelerator: Accelerator, settings: Settings, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Saves the whole model, whatever the ranks hold of it, and its tokenizer."""
    folder = settings.output / "model"
    unwrapped = accelerator.unwrap_model(model)
    # A model that transformers has divided is put together by transformers.
    weights = None if is_divided(unwrapped) else accelerator.get_state_dict(model)
    unwrapped.save_pretrained(folder, is_main_process=accelerator.is_main_process, state_dict=weights)
    if accelerator.is_main_process:
        tokenizer.save_pretrained(folder)
    accelerator.wait_for_everyone()


def report(
    accelerator: Accelerator, figures: dict[str, float], step: int, selected: SelectionMetrics | None = None
) -> None:
    """Gives figures to the trackers, and prints them with the coverage, which the trackers have already."""
    accelerator.log(figures, step=step)
    shown = figures if selected is None else {**figures, "coverage": selected.overall["coverage"]}
    accelerator.print(f"step {step:>6}  " + "  ".join(f"{name} {value:.4g}" for name, value in shown.items()))


def describe(settings: Settings, accelerator: Accelerator, model: nn.Module, windows: int, held_out: int) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    accelerator.print(
        f"{settings.model}: {parameters:,} parameters, {settings.optimizer.algorithm}, {accelerator.num_processes} "
        f"ranks on {accelerator.device.type}, precision {accelerator.mixed_precision}\n"
        f"{settings.dataset}: {windows:,} windows of {settings.length} tokens to train on, {held_out} held out\n"
        f"{settings.steps} steps of {settings.batch_size} windows: "
        f"{settings.steps * settings.batch_size / windows:.2g} passes"
    )


def conclude(accelerator: Accelerator, settings: Settings, selection: SelectionLogger | None) -> None:
    accelerator.print(
        "Load the model with\n"
        f'    AutoModelForCausalLM.from_pretrained("{settings.output / "model"}")\n'
        f'    AutoTokenizer.from_pretrained("{settings.output / "model"}")'
    )
    if selection is not None:
        accelerator.print(f"See what was selected\n    dion2-report {settings.output / 'selection.json'}")


def flat(settings: Settings) -> dict[str, str]:
    """Returns the settings as trackers take them."""
    values = asdict(settings)
    values |= {f"optimizer.{name}": value for name, value in values.pop("optimizer").items()}
    return {name: str(value) for name, value in values.items()}


def main(arguments: list[str] | None = None) -> None:
    try:
        settings = read_settings(Settings, arguments, prog="recipes/pretraining/train.py")
        quiet_libraries()
        show_own_lines()
        pretrain(settings)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
