"""The Trainer with models that transformers shards while it loads them, by ``DistributedConfig``.

The Trainer itself refuses to resume those from transformers 5.23 on, so there are no checkpoints of the optimizer.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed import DistributedConfig

from dion2_lightning import Dion2
from tests.distributed.ranks import run_like_torchrun
from tests.integrations import test_plain_loop
from tests.integrations.huggingface import fsdp2_on_cpu
from tests.integrations.resume import unwrapped
from tests.integrations.test_trainer import arguments, make_trainer
from tests.integrations.training import LENGTH, make_model

STEPS = 5

DIVIDES_MODELS = "dp_replicate_size" in {field.name for field in fields(DistributedConfig)}
"""Whether this transformers, 5.23 or later, divides models by more than FSDP2 or TP alone."""


class Layout(NamedTuple):
    """A layout, and how the second layer's down projection must lie under it.

    Attributes:
        ranks: How many.
        batches: How many of them have batches of their own.
        settings: Of DistributedConfig.
        placements: As torch prints them, on the mesh's dimensions.
        lacking: Why transformers before 5.23 cannot, as 5.17 was seen to; None if it can.
    """

    ranks: int
    batches: int
    settings: dict[str, int]
    placements: str
    lacking: str | None = None


GIVEN_TO_DDP = "its Trainer gives them to DDP, which refuses DTensors"
ONE_OF_THEM = "it divides by FSDP2 or by TP, not by both"
DENSE = {
    "FSDP2": Layout(2, 2, {"fsdp_size": 2}, "fsdp (Shard(dim=0),)", GIVEN_TO_DDP),
    "TP": Layout(2, 1, {"tp_size": 2}, "tp (Shard(dim=1),)"),
    "FSDP2 over TP": Layout(4, 2, {"fsdp_size": 2, "tp_size": 2}, "fsdp tp (Shard(dim=0), Shard(dim=1))", ONE_OF_THEM),
    "HSDP": Layout(
        4,
        4,
        {"dp_replicate_size": 2, "fsdp_size": 2},
        "dp_replicate fsdp (Replicate(), Shard(dim=0))",
        "it has no dp_replicate_size",
    ),
}
STRIDED = "efsdp ep (_StridedShard(dim=0, sf=2), Shard(dim=0))"
NO_EXPERTS = "it has no ep_size"
EXPERTS = {
    "experts over FSDP2": Layout(2, 2, {"fsdp_size": 2, "ep_size": 2}, STRIDED, NO_EXPERTS),
    "experts over half of FSDP2": Layout(4, 4, {"fsdp_size": 4, "ep_size": 2}, STRIDED, NO_EXPERTS),
}


def each_of(layouts: dict[str, Layout]) -> list[Any]:
    """Their names; those that this transformers cannot do are skipped."""
    reasons = {name: None if DIVIDES_MODELS else layout.lacking for name, layout in layouts.items()}
    return [
        pytest.param(name, marks=[pytest.mark.skip(f"transformers before 5.23: {reason}")] if reason else [])
        for name, reason in reasons.items()
    ]


def make_mixture() -> PreTrainedModel:
    """Four experts in a stack."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return Qwen3MoeForCausalLM(config)


def placed(parameter: Any) -> str:
    names = parameter.device_mesh.mesh_dim_names or ["tp"]  # before 5.23 that mesh is without names
    return f"{' '.join(names)} {parameter.placements}"


def check_curve(source: Path, layout: Layout, down_projection: str, expected: list[float], target: Path) -> None:
    fsdp2_on_cpu()  # Accelerate knows no TP among CPUs either
    args = arguments(target, layout.batches, STEPS)
    config = DistributedConfig(**layout.settings)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(source, distributed_config=config)
    parameter = model.get_parameter(down_projection)
    assert placed(parameter) == layout.placements
    if DIVIDES_MODELS:
        with pytest.raises(ValueError, match="Resuming is not supported for models sharded at load time"):
            make_trainer(arguments(target, layout.batches, STEPS, save_strategy="steps"), model)
    trainer = make_trainer(args, model)
    trainer.train()
    optimizer = unwrapped(trainer.optimizer)
    assert isinstance(optimizer, Dion2)
    (group,) = (group for group in optimizer.param_groups if any(parameter is each for each in group["params"]))
    assert group["algorithm"] == "dion2"
    losses = trainer.accelerator.reduce(torch.tensor(trainer.losses), reduction="mean")
    assert losses.tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", each_of(DENSE))
def test_a_dense_model(name: str, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    layout, down_projection = DENSE[name], "model.layers.1.mlp.down_proj.weight"
    curve = test_plain_loop.loss_curve(STEPS)
    run_like_torchrun(layout.ranks, check_curve, tmp_path / "model", layout, down_projection, curve, tmp_path / "run")


@pytest.mark.parametrize("name", each_of(EXPERTS))
def test_a_mixture_of_experts(name: str, tmp_path: Path) -> None:
    make_mixture().save_pretrained(tmp_path / "model")
    layout, experts = EXPERTS[name], "model.layers.1.mlp.experts.down_proj"
    curve = test_plain_loop.loss_curve(STEPS, make_mixture())
    run_like_torchrun(layout.ranks, check_curve, tmp_path / "model", layout, experts, curve, tmp_path / "run")
