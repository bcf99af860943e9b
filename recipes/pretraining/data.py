"""Documents as one stream of tokens, cut into windows of equal length: nothing is padded and nothing left out."""

import random
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

SPLIT_SEED = 0
"""Every run is measured on the same documents, whatever its seed."""


class PackedTokens(Dataset[dict[str, Tensor]]):
    """Windows of a stream of tokens, as inputs and labels of a causal language model.

    Args:
        tokens: All documents, each closed by the end token.
        length: Tokens of a window; what does not fill the last one is left out.
    """

    def __init__(self, tokens: Tensor, length: int) -> None:
        windows = len(tokens) // length
        self.windows = tokens[: windows * length].view(windows, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[index].long()
        return {"input_ids": window, "labels": window}


def split_documents(documents: Iterable[str], held_out_share: float) -> tuple[list[str], list[str]]:
    """Shuffles documents and returns those to train on and those held out, a share of the characters."""
    documents = list(documents)
    random.Random(SPLIT_SEED).shuffle(documents)
    wanted = held_out_share * sum(map(len, documents))
    held_out: list[str] = []
    while wanted > 0:
        held_out.append(documents.pop())
        wanted -= len(held_out[-1])
    return documents, held_out


def pack(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> PackedTokens:
    """Tokenizes documents, closes each with the end token and packs them into windows of `length` tokens."""
    stream: list[int] = []
    for document in documents:
        stream += tokenizer(document, add_special_tokens=False)["input_ids"]
        stream.append(tokenizer.eos_token_id)
    return PackedTokens(torch.tensor(stream, dtype=torch.int32), length)
