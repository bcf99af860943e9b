"""The tasks: models, data and measures, small for two cores of a CPU and at full size for a GPU."""

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import default_collate
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
    get_wsd_schedule,
)

from benchmarks.convergence.data import (
    IGNORED,
    Batch,
    load_functions,
    load_texts,
    load_windows,
    shuffled_batches,
    training_rows,
    validation_batches,
)
from benchmarks.convergence.methods import (
    ADAMW,
    ADAMW_LORA,
    DION2_EIGHTH,
    DION2_HALF,
    DION2_OUTPUTS,
    DION2_QUARTER,
    DION2_QUARTER_LORA,
    DION2_QUARTER_LORA_B,
    DION3_EIGHTH,
    DION3_HALF,
    DION3_QUARTER,
    DION_HALF,
    DION_QUARTER,
    MUON,
    Candidate,
    Method,
    in_blocks,
)
from dion2_lightning import Dion2
from recipes.offline_data import MODULES, Function
from recipes.offline_models import MINILM, SMOLLM2, model_folder


@dataclass(frozen=True)
class Task(abc.ABC):
    """A model and its data; every method trains it from the same weights on the same batches.

    Attributes:
        name: For the command line and file names.
        title: For tables and pictures.
        steps: Of a final run.
        search_steps: Of a run of the search.
        short_steps: Of a final run with fewer steps and a shorter schedule.
        long_steps: Of final runs with more steps and the same settings, of the first two seeds; None for no such runs.
        measure_every: Steps between two measurements on the validation data.
        batch_size: Rows per step.
        weight_decay: Decoupled; of all parameters that decay.
        betas: AdamW's, also where it trains the rest.
        methods: The methods that are compared.
        starts: First learning rates of the search, by algorithm; with a momentum, `lr` is all that is searched.
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
        """Returns `loss`, and `accuracy` where there is one, on all of the validation data."""

    def overrides(self, method: Method) -> dict[str, Any]:
        """Returns the argument of `build_optimizer`."""
        return {}

    def schedule(self, optimizer: Dion2, steps: int) -> LRScheduler:
        """Returns a warm-up over a tenth of the steps and half a cosine down to zero."""
        return get_cosine_schedule_with_warmup(optimizer, round(steps / 10), steps)


@dataclass(frozen=True)
class Pretraining(Task):
    """A byte-level Llama from nothing on Python's manual and docstrings; at full size on WikiText-103, from the hub."""

    name = "pretraining"
    title = "Pretraining: byte-level Llama, from scratch"
    methods: ClassVar[tuple[Method, ...]] = (
        *(ADAMW, MUON, DION2_HALF, DION2_QUARTER, DION2_OUTPUTS, DION2_EIGHTH),
        *(DION3_HALF, DION3_QUARTER, DION3_EIGHTH, DION_HALF, DION_QUARTER),
    )
    starts: ClassVar = {
        "adamw": Candidate(2e-3, 2e-3),
        "muon": Candidate(3e-3, 3e-3),
        "dion2": Candidate(3e-3, 3e-3),
        "dion3": Candidate(3e-3, 3e-3),
        "dion": Candidate(3e-3, 3e-3),
    }

    length: int = 128
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    validation_windows: int = 128
    full: bool = False

    def model(self) -> nn.Module:
        config = LlamaConfig(
            vocab_size=len(self._tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=-(-self.hidden_size * 8 // 24) * 8,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.length,
            use_cache=False,
        )
        return LlamaForCausalLM(config)

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        train, _ = self._windows
        for rows in shuffled_batches(len(train), self.batch_size, steps, seed):
            windows = train[rows].long()
            yield {"input_ids": windows, "labels": windows}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    def measure(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        _, validation = self._windows
        losses = [
            self.loss(model, {"input_ids": windows, "labels": windows}).item()
            for windows in validation[: self.validation_windows].long().to(device).split(self.batch_size)
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
    def _windows(self) -> tuple[Tensor, Tensor]:
        return load_windows(self._tokenizer, self.length, wikitext=self.full)


@dataclass(frozen=True)
class Fused(Pretraining):
    """The same with a byte-level GPT-2, whose q, k and v are one weight; the momenta are those of the Llama."""

    name = "fused"
    title = "Pretraining: byte-level GPT-2, from scratch"
    methods: ClassVar[tuple[Method, ...]] = (
        *(ADAMW, *in_blocks(DION2_QUARTER)),
        *in_blocks(DION3_QUARTER)[:2],  # not per head
    )
    starts: ClassVar = {
        "adamw": Candidate(8.9e-4, 3e-3, "0.6"),
        "dion2": Candidate(4.5e-3, 6.7e-3, "0.8^(n/k)"),
        "dion3": Candidate(1.5e-2, 4.5e-3, "0.8^(n/k)"),
    }

    def model(self) -> nn.Module:
        config = GPT2Config(
            vocab_size=len(self._tokenizer),
            n_embd=self.hidden_size,
            n_layer=self.layers,
            n_head=self.heads,
            n_positions=self.length,
            activation_function="gelu_pytorch_tanh",  # GPT-2's, in one operation
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),  # no row is seen twice
            **dict.fromkeys(("bos_token_id", "eos_token_id"), self._tokenizer.eos_token_id),
            use_cache=False,
        )
        return GPT2LMHeadModel(config)

    def overrides(self, method: Method) -> dict[str, Any]:
        if method.blocks is None:
            return {}
        rows = {"split": f"{self.hidden_size}", "per head": f"{self.heads}*{self.hidden_size // self.heads}"}
        splits = "whole" if method.blocks == "whole" else " | ".join(f"{name} {rows[method.blocks]}" for name in "qkv")
        return {"*.c_attn.weight": {"splits": splits}}


@dataclass(frozen=True)
class Classification(Task):
    """MiniLM-L6 is trained to tell which module of Python's library a docstring comes from."""

    name = "classification"
    title = "Fine-tuning: MiniLM-L6, 8-way text classification"
    methods = (
        *(ADAMW, MUON, DION2_HALF, DION2_QUARTER, DION2_OUTPUTS, DION2_EIGHTH),
        *(DION3_HALF, DION3_QUARTER, DION3_EIGHTH, DION_HALF, DION_QUARTER),
    )
    starts: ClassVar = {
        "adamw": Candidate(4e-4, 8e-4),
        "muon": Candidate(8e-4, 8e-4),
        "dion2": Candidate(1.6e-3, 1.6e-3),
        "dion3": Candidate(1.6e-3, 1.6e-3),
        "dion": Candidate(1.6e-3, 1.6e-3),
    }

    max_length: int = 64

    def model(self) -> nn.Module:
        model = AutoModelForSequenceClassification.from_pretrained(
            model_folder(MINILM), dtype=torch.float32, num_labels=len(MODULES)
        )
        return model.train()

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        train, _ = self._texts
        for rows in shuffled_batches(len(train), self.batch_size, steps, seed):
            yield self._collate([train[row] for row in rows])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(self._logits(model, batch), batch["labels"])

    def measure(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        _, validation = self._texts
        examples = sorted(validation, key=lambda example: len(example[0]))  # so that little is padding
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

    def _collate(self, examples: list[tuple[str, int]]) -> Batch:
        texts, labels = zip(*examples, strict=True)
        inputs = self._tokenizer(
            list(texts), truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        return {**inputs, "labels": torch.tensor(labels)}

    @cached_property
    def _texts(self) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        return load_texts()

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(model_folder(MINILM))


@dataclass(frozen=True)
class CausalFineTuning(Task):
    """SmolLM2-135M-Instruct is trained to write the docstrings of functions, all of its weights."""

    name = "fine-tuning"
    title = "Fine-tuning: SmolLM2-135M, docstrings of functions"
    methods: ClassVar[tuple[Method, ...]] = (ADAMW, MUON, DION2_HALF, DION2_QUARTER, DION2_EIGHTH)
    starts: ClassVar = {"adamw": Candidate(2e-4, 2e-4), "muon": Candidate(3e-4, 2e-4), "dion2": Candidate(4e-4, 2e-4)}

    length: int = 256
    validation_size: int = 32
    lora_rank: int = 0

    def model(self) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(model_folder(SMOLLM2), dtype=torch.float32)
        if self.lora_rank:
            torch.manual_seed(torch.initial_seed())  # whatever loading has drawn
            adapters = LoraConfig(r=self.lora_rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, adapters)
        return model.train()

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        train, _ = self._functions
        rows = training_rows(train, self._tokenizer, self.length, seed)
        for _ in range(steps):
            yield default_collate(list(islice(rows, self.batch_size)))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(**batch, use_cache=False).loss  # with a cache, packed conversations see each other
        return loss

    def measure(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        losses, counts = [], []
        for batch in self._validation:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            counts.append(int((batch["labels"] != IGNORED).sum()))
            losses.append(self.loss(model, batch).item() * counts[-1])
        return {"loss": math.fsum(losses) / sum(counts)}

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(model_folder(SMOLLM2))

    @cached_property
    def _functions(self) -> tuple[list[Function], list[Function]]:
        return load_functions(self.validation_size)

    @cached_property
    def _validation(self) -> list[Batch]:
        return validation_batches(self._functions[1], self._tokenizer, self.length, self.batch_size)


@dataclass(frozen=True)
class Lora(CausalFineTuning):
    """The same with adapters on all linear layers."""

    name = "lora"
    title = "Fine-tuning: SmolLM2-135M, LoRA of rank 8"
    methods: ClassVar[tuple[Method, ...]] = (ADAMW_LORA, DION2_QUARTER_LORA, DION2_QUARTER_LORA_B)
    starts: ClassVar = {"adamw": Candidate(1e-3, 1e-3), "dion2": Candidate(2e-3, 1e-3)}

    lora_rank: int = 8

    def overrides(self, method: Method) -> dict[str, Any]:
        """Returns the method's fraction, which factors of so low a rank do not get by themselves."""
        factors = {"both": "*lora_*", "B": "*lora_B*"}
        return {} if method.algorithm == "adamw" else {factors[method.lora]: {"fraction": method.fraction}}


_FROM_SCRATCH: dict[str, Any] = {
    "steps": 400,
    "search_steps": 400,
    "short_steps": 260,
    "measure_every": 20,
    "batch_size": 16,
    "weight_decay": 0.1,
    "betas": (0.9, 0.95),
}
_PRETRAINING = Pretraining(**_FROM_SCRATCH, long_steps=1200)
_FUSED = Fused(**{**_FROM_SCRATCH, "search_steps": 300, "measure_every": 40})
_CLASSIFICATION = Classification(
    steps=80, search_steps=80, short_steps=60, measure_every=20, batch_size=16, weight_decay=0.01
)
_FINE_TUNING = CausalFineTuning(
    steps=24, search_steps=12, short_steps=20, measure_every=4, batch_size=2, weight_decay=0.01
)
_LORA = Lora(steps=24, search_steps=12, short_steps=20, measure_every=4, batch_size=2, weight_decay=0.01)

SMALL: dict[str, Task] = {task.name: task for task in (_PRETRAINING, _FUSED, _CLASSIFICATION, _FINE_TUNING, _LORA)}
"""What two cores of a CPU train in an hour or two a task."""

_LONGER: dict[str, Any] = {"steps": 320, "search_steps": 80, "short_steps": 272, "measure_every": 20}

_LARGER: dict[str, Any] = {
    "steps": 8000,
    "search_steps": 2000,
    "short_steps": 5200,
    "long_steps": None,
    "measure_every": 200,
    "batch_size": 64,
    "length": 1024,
    "hidden_size": 768,
    "layers": 12,
    "heads": 12,
    "validation_windows": 256,
    "full": True,
}

FULL: dict[str, Task] = {
    task.name: task
    for task in (
        replace(_PRETRAINING, **_LARGER),
        replace(_FUSED, **_LARGER),
        replace(_CLASSIFICATION, **_LONGER),
        replace(_FINE_TUNING, batch_size=32, validation_size=256, **_LONGER),
        replace(_LORA, batch_size=32, validation_size=256, **_LONGER),
    )
}
"""What one GPU trains."""
