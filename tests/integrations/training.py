"""One small training that every framework runs: the same Llama, the same English text, the same settings.

Frameworks differ in how they make the model, the batches and the steps their own; what they are given is the same.
"""

import pydoc_data.topics
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

BATCH: Final = 4
"""Sequences in a step, on all ranks together."""

LENGTH: Final = 48
"""Tokens, which are bytes, in a sequence."""

SETTINGS: Final[dict[str, Any]] = {
    "lr": 3e-3,
    "adamw_lr": 2e-3,
    "fraction": 0.25,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "orthonormalize_dtype": "float32",
}
"""Of build_optimizer, in every framework."""

MAX_NORM: Final = 1.0
"""Of the gradients."""


def make_model(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """Make the model, the same for a seed. Sizes divide over two ranks, matrices of one shape could be mistaken."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "use_cache": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **config}))


class Sequences(Dataset[dict[str, Tensor]]):
    """Consecutive pieces of Python's reference manual, ``BATCH`` for every step."""

    def __init__(self, steps: int) -> None:
        """Take as much text as the steps need."""
        text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
        size = steps * BATCH * LENGTH
        tokens = ByT5Tokenizer()(text[: 2 * size], add_special_tokens=False)["input_ids"][:size]
        self.pieces = torch.tensor(tokens).view(steps * BATCH, LENGTH)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}
