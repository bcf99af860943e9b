"""Whether a model tells packed conversations apart, found out by asking it."""

import logging
import os

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recipes.inputs import InputError
from recipes.supervised_fine_tuning.settings import Settings

SIZE = 16
"""Tokens of each conversation that is compared: more than a convolution reads, and cheap."""

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Of the largest logit. Products of equal shapes are equal to the bit, but those of a mixture of experts, whose shapes
follow the tokens: they differ by rounding."""

logger = logging.getLogger("recipes")


def check_packing(model: PreTrainedModel, settings: Settings) -> None:
    """Changes a conversation in front of another one: the other's logits must not change.

    transformers tells packed conversations apart by their positions, but not every model hands these on to its
    attention, and few to a state, as Mamba's. Nothing says so, and the loss does not show it.

    Args:
        model: As it was loaded; where its weights are still to come from another rank, that one does it.
        settings: Of the run.

    Raises:
        InputError: If they change, or the model takes no positions.
    """
    if any(parameter.is_meta for parameter in model.parameters()) or _waits_for_weights():
        return
    home, training = model.device, model.training
    device, dtype = home, torch.float32
    # Flash attention runs on GPUs alone, in half precision; a CPU compiles flex attention for half a minute.
    if settings.attention not in ("sdpa", "eager"):
        device, dtype = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), torch.bfloat16
    problem = None
    try:
        model.eval().to(device)
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            change = _change_of_the_second(model)
        if not change <= TOLERANCE[dtype]:
            problem = f"the logits of one change by {change:.1g} of the largest with another before it"
    except torch.OutOfMemoryError:
        logger.warning("The model does not fit on one GPU: it was not tested whether it tells conversations apart.")
    except (TypeError, ValueError) as error:
        problem = f"it takes no positions ({error})"
    finally:
        model.train(training).to(home)
    if problem is not None:
        raise InputError(
            f"--model {settings.model}, --attention {settings.attention}: the model does not tell apart conversations "
            f"in one row: {problem}. Give each a row of its own with --packing false, or choose another model."
        )


def _waits_for_weights() -> bool:
    """Whether FSDP brings the weights to this rank later: until then they are whatever the memory held."""
    asked = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    return all(os.environ.get(name) == "true" for name in asked) and os.environ.get("LOCAL_RANK", "0") != "0"


def _change_of_the_second(model: PreTrainedModel) -> float:
    tokens = torch.arange(2 * SIZE, device=model.device)
    others = torch.where(tokens < SIZE, tokens + 1, tokens)
    positions = tokens % SIZE
    words = model.get_input_embeddings().num_embeddings

    def logits(row: Tensor) -> Tensor:
        found: Tensor = model(input_ids=row[None] % words, position_ids=positions[None]).logits
        return found[0, SIZE:].float()

    one, other = logits(tokens), logits(others)
    return ((one - other).abs().max() / one.abs().max()).item()
