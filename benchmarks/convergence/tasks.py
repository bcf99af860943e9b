"""The tasks: models, data and measures of the recipes, small for two cores of a CPU and at full size for a GPU."""

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from datasets import load_dataset
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import default_collate
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
    get_wsd_schedule,
)

from benchmarks.convergence.methods import (
    ADAMW,
    ADAMW_LORA,
    DION2_EIGHTH,
    DION2_HALF,
    DION2_QUARTER,
    DION2_QUARTER_LORA,
    DION2_QUARTER_LORA_B,
    MUON,
    Candidate,
    Method,
)
from dion2_lightning import Dion2
from recipes.pretraining.data import PackedTokens, pack, split_documents
from recipes.pretraining.model import build_model
from recipes.offline_data import read_prose
from recipes.supervised_fine_tuning import settings as supervised_fine_tuning
from recipes.supervised_fine_tuning.conversations import Conversation, load_conversations
from recipes.supervised_fine_tuning.data import PackedConversations, pack_held_out_rows, pack_training_rows
from recipes.supervised_fine_tuning.encoding import IGNORED
from recipes.supervised_fine_tuning.model import load_model as load_causal_model
from recipes.supervised_fine_tuning.model import save_model
from recipes.text_classification import settings as text_classification
from recipes.text_classification.data import ShuffledBatches, Split, collate_with, load_split
from recipes.text_classification.train import load_model

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task(abc.ABC):
    """A model and its data; every method trains it from the same weights on the same batches.

    Attributes:
        name: For the command line and file names.
        title: For tables and pictures.
        steps: Of a final run.
        search_steps: Of a run of the search.
        short_steps: Of a final run with fewer steps and a shorter schedule.
        long_steps: Of a final run with more steps and the same settings; None for no such run.
        measure_every: Steps between two measurements on the held-out data.
        batch_size: Rows per step.
        weight_decay: Decoupled; of all parameters that decay.
        betas: AdamW's, also where it trains the rest.
        methods: The methods that are compared.
        starts: First learning rates of the search, by algorithm.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    methods: ClassVar[tuple[Method, ...]]
    starts: ClassVar[dict[str, Candidate]]

    steps: int
    search_steps: int
    short_steps: int
    measure_every: int
    batch_size: int
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    long_steps: int | None = None

    @abc.abstractmethod
    def model(self) -> nn.Module:
        """Returns the initial model; random weights depend on torch's seed."""

    @abc.abstractmethod
    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        """Yields ``steps`` batches in an order that depends on the seed."""

    @abc.abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the training loss."""

    @abc.abstractmethod
    def measure(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Returns `loss`, and `accuracy` where there is one, on all of the held-out data."""

    def schedule(self, optimizer: Dion2, steps: int) -> LRScheduler:
        """Returns a warm-up over a tenth of the steps and half a cosine down to zero."""
        return get_cosine_schedule_with_warmup(optimizer, round(steps / 10), steps)


@dataclass(frozen=True)
class Pretraining(Task):
    """A byte-level Llama from nothing on Python's manual and docstrings; at full size on WikiText-103, from the hub."""

    name = "pretraining"
    title = "Pretraining: byte-level Llama, from scratch"
    methods = (ADAMW, MUON, DION2_HALF, DION2_QUARTER, DION2_EIGHTH)
    starts: ClassVar = {"adamw": Candidate(2e-3, 2e-3), "muon": Candidate(3e-3, 3e-3), "dion2": Candidate(3e-3, 3e-3)}

    length: int = 128
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    held_out_windows: int = 128
    full: bool = False

    def model(self) -> nn.Module:
        return build_model(
            len(self._tokenizer),
            length=self.length,
            hidden_size=self.hidden_size,
            layers=self.layers,
            heads=self.heads,
        )

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        train, _ = self._data
        for rows in ShuffledBatches(len(train), self.batch_size, steps, seed):
            windows = train.windows[rows].long()
            yield {"input_ids": windows, "labels": windows}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    def measure(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        _, held_out = self._data
        losses = [
            self.loss(model, {"input_ids": windows, "labels": windows}).item()
            for windows in held_out.windows[: self.held_out_windows].long().to(device).split(self.batch_size)
        ]
        return {"loss": math.fsum(losses) / len(losses)}

    def schedule(self, optimizer: Dion2, steps: int) -> LRScheduler:
        """Returns a warm-up over a tenth of the steps, a plateau, and a line down to zero from the middle on."""
        return get_wsd_schedule(
            optimizer, round(steps / 10), steps // 2, num_training_steps=steps, decay_type="linear", min_lr_ratio=0.0
        )

    @cached_property
    def _tokenizer(self) -> ByT5Tokenizer:
        return ByT5Tokenizer()

    @cached_property
    def _data(self) -> tuple[PackedTokens, PackedTokens]:
        train, held_out = split_documents(self._documents(), held_out_share=0.05)
        return pack(train, self._tokenizer, self.length), pack(held_out, self._tokenizer, self.length)

    def _documents(self) -> list[str]:
        if not self.full:
            return read_prose()
        rows = load_dataset("Salesforce/wikitext", "wikitext-103-raw-v1", split="train")
        return [text for text in rows["text"] if text.strip()]


@dataclass(frozen=True)
class Classification(Task):
    """MiniLM-L6 learns to tell which module of Python's library a docstring comes from."""

    name = "classification"
    title = "Fine-tuning: MiniLM-L6, 8-way text classification"
    methods = (ADAMW, MUON, DION2_HALF, DION2_QUARTER, DION2_EIGHTH)
    starts: ClassVar = {
        "adamw": Candidate(4e-4, 8e-4),
        "muon": Candidate(8e-4, 8e-4),
        "dion2": Candidate(1.6e-3, 1.6e-3),
    }

    def model(self) -> nn.Module:
        model, _ = load_model(self._settings, self._split.classes)
        return model

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        examples = self._split.train
        for rows in ShuffledBatches(len(examples), self.batch_size, steps, seed):
            yield self._collate([examples[row] for row in rows])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(self._logits(model, batch), batch["labels"])

    def measure(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        # By length, so that little is padding.
        examples = sorted(self._split.held_out, key=lambda example: len(example.text))
        losses: list[Tensor] = []
        right: list[Tensor] = []
        for start in range(0, len(examples), 64):
            batch = {name: tensor.to(device) for name, tensor in self._collate(examples[start : start + 64]).items()}
            logits = self._logits(model, batch)
            losses.append(functional.cross_entropy(logits, batch["labels"], reduction="none"))
            right.append(logits.argmax(dim=-1) == batch["labels"])
        return {"loss": torch.cat(losses).mean().item(), "accuracy": torch.cat(right).float().mean().item()}

    @staticmethod
    def _logits(model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        return logits.float()

    @cached_property
    def _settings(self) -> text_classification.Settings:
        return text_classification.Settings()

    @cached_property
    def _split(self) -> Split:
        return load_split(self._settings)

    @cached_property
    def _collate(self) -> Any:
        _, tokenizer = load_model(self._settings, self._split.classes)
        return collate_with(tokenizer, self._split.classes, self._settings.max_length)


@dataclass(frozen=True)
class CausalFineTuning(Task):
    """SmolLM2-135M-Instruct learns to write the docstrings of functions, all of its weights."""

    name = "fine-tuning"
    title = "Fine-tuning: SmolLM2-135M, docstrings of functions"
    methods: ClassVar[tuple[Method, ...]] = (ADAMW, MUON, DION2_HALF, DION2_QUARTER, DION2_EIGHTH)
    starts: ClassVar = {"adamw": Candidate(2e-4, 2e-4), "muon": Candidate(3e-4, 2e-4), "dion2": Candidate(4e-4, 2e-4)}

    length: int = 256
    held_out_size: int = 32
    lora_rank: int = 0

    def model(self) -> nn.Module:
        model, _ = load_causal_model(replace(self._settings, seed=torch.initial_seed(), lora_rank=self.lora_rank))
        return model

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        train, _ = self._conversations
        settings = replace(self._settings, seed=seed)
        packed = pack_training_rows(train, self._tokenizer, settings, steps * self.batch_size)
        for step in range(steps):
            yield default_collate([packed[step * self.batch_size + row] for row in range(self.batch_size)])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    def measure(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        losses, counts = [], []
        for start in range(0, len(self._held_out), self.batch_size):
            rows = [self._held_out[row] for row in range(start, start + self.batch_size)]
            batch = {name: tensor.to(device) for name, tensor in default_collate(rows).items()}
            counts.append(int((batch["labels"] != IGNORED).sum()))
            losses.append(self.loss(model, batch).item() * counts[-1] if counts[-1] else 0.0)
        return {"loss": math.fsum(losses) / sum(counts)}

    @cached_property
    def _settings(self) -> supervised_fine_tuning.Settings:
        return supervised_fine_tuning.Settings(
            model=self._folder.name, length=self.length, batch_size=self.batch_size, held_out_size=self.held_out_size
        )

    @cached_property
    def _folder(self) -> TemporaryDirectory[str]:
        """The model as transformers saves it: it loads faster so than from the quantized file that it comes in."""
        folder = TemporaryDirectory()
        save_model(*load_causal_model(supervised_fine_tuning.Settings()), Path(folder.name))
        return folder

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self._folder.name)

    @cached_property
    def _conversations(self) -> tuple[list[Conversation], list[Conversation]]:
        return load_conversations(self._settings)

    @cached_property
    def _held_out(self) -> PackedConversations:
        return pack_held_out_rows(self._conversations[1], self._tokenizer, self._settings)


@dataclass(frozen=True)
class Lora(CausalFineTuning):
    """The same with adapters on all linear layers."""

    name = "lora"
    title = "Fine-tuning: SmolLM2-135M, LoRA of rank 8"
    methods: ClassVar[tuple[Method, ...]] = (ADAMW_LORA, DION2_QUARTER_LORA, DION2_QUARTER_LORA_B)
    starts: ClassVar = {"adamw": Candidate(1e-3, 1e-3), "dion2": Candidate(2e-3, 1e-3)}

    lora_rank: int = 8


_PRETRAINING = Pretraining(
    steps=400,
    search_steps=400,
    short_steps=260,
    long_steps=1200,
    measure_every=20,
    batch_size=16,
    weight_decay=0.1,
    betas=(0.9, 0.95),
)
_CLASSIFICATION = Classification(
    steps=80, search_steps=80, short_steps=60, measure_every=20, batch_size=16, weight_decay=0.01
)
_FINE_TUNING = CausalFineTuning(
    steps=24, search_steps=12, short_steps=20, measure_every=4, batch_size=2, weight_decay=0.01
)
_LORA = Lora(steps=24, search_steps=12, short_steps=20, measure_every=4, batch_size=2, weight_decay=0.01)

SMALL: dict[str, Task] = {task.name: task for task in (_PRETRAINING, _CLASSIFICATION, _FINE_TUNING, _LORA)}
"""What two cores of a CPU train in an hour or two a task."""

_LONGER: dict[str, Any] = {"steps": 320, "search_steps": 80, "short_steps": 272, "measure_every": 20}

FULL: dict[str, Task] = {
    task.name: task
    for task in (
        replace(
            _PRETRAINING,
            steps=8000,
            search_steps=2000,
            short_steps=5200,
            long_steps=None,
            measure_every=200,
            batch_size=64,
            length=1024,
            hidden_size=768,
            layers=12,
            heads=12,
            held_out_windows=256,
            full=True,
        ),
        replace(_CLASSIFICATION, **_LONGER),
        replace(_FINE_TUNING, batch_size=32, held_out_size=256, **_LONGER),
        replace(_LORA, batch_size=32, held_out_size=256, **_LONGER),
    )
}
"""What one GPU trains."""
