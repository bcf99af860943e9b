"""Models with fused weights, trained as they are and with every block as a parameter of its own, on every layout.

Momenta and selections are equal bit for bit, and weights within 1e-5; of Dion, which selects nothing, within 1e-4.
"""

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from dion2_lightning import Dion2, build_optimizer
from tests.distributed.ranks import run_on_ranks
from tests.distributed.test_layouts import errors_name_case, place
from tests.routing import models
from tests.routing.models import decide

STEPS = 12
IN_FLOAT32 = {"orthonormalize_dtype": "float32"}
SETTINGS: dict[str, dict[str, Any]] = {
    "dion2": {"fraction": 0.25, **IN_FLOAT32},
    "dion3": {"algorithm": "dion3", "fraction": 0.25, **IN_FLOAT32},
    "muon": {"fraction": 1.0, **IN_FLOAT32},
    "dion": {"algorithm": "dion", "rank_fraction": 0.5, "qr": "qr"},
}
COMMON: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
TOKENS = 12


class Model(NamedTuple):
    """A model, what has to be found in it, and whether each head is a matrix."""

    build: Callable[[], nn.Module]
    splits: set[str]
    per_head: bool = False


def phi3() -> nn.Module:
    """Borders between two ranks and three lie inside q, gate and up."""
    config = transformers.Phi3Config(
        vocab_size=96,
        hidden_size=40,
        intermediate_size=46,
        num_hidden_layers=1,
        num_attention_heads=5,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    return transformers.Phi3ForCausalLM(config)


def dbrx() -> nn.Module:
    config = transformers.DbrxConfig(
        vocab_size=96,
        d_model=32,
        n_heads=4,
        n_layers=1,
        max_seq_len=16,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    )
    return transformers.DbrxForCausalLM(config)


QKV, OF_4_HEADS = "q 32 | k 32 | v 32", "4 x (q 8 | k 8 | v 8)"
MODELS = {
    "GPT-2": Model(models.gpt2, {QKV}),
    "Phi-3": Model(phi3, {"q 40 | k 8 | v 8", "gate 46 | up 46"}),
    "GPT-NeoX": Model(models.gpt_neox, {OF_4_HEADS}),
    "BLOOM": Model(models.bloom, {OF_4_HEADS}),
    "Falcon": Model(models.falcon, {"2 x (q 16 | k 4 | v 4)"}),
    "Falcon, one k and v": Model(models.falcon_multi_query, {"q 32 | k 4 | v 4"}),
    "Falcon, old": Model(models.falcon_old, {"8 x (q 4 | k 4 | v 4)"}),
    "CodeGen": Model(models.codegen, {"4 x (q 16 | v 16 | k 16)"}),
    "GPT-BigCode": Model(models.gpt_bigcode, {"q 32 | k 8 | v 8"}),
    "MPT": Model(models.mpt, {QKV}),
    "GLM-4": Model(models.glm4, {"gate 48 | up 48"}),
    "Mixtral": Model(models.mixtral, {"gate 48 | up 48"}),
    "GPT-OSS": Model(models.gpt_oss, {"48 x (gate 1 | up 1)"}),
    "DBRX": Model(dbrx, {"q 32 | k 16 | v 16", "expert 4*24", "expert 4*24 along inputs"}),
    "nn.MultiheadAttention": Model(models.transformer_encoder, {"q 16 | k 16 | v 16"}),
    "Phi-3 by head": Model(
        phi3,
        {"q 5*8 | k 1*8 | v 1*8", "head 5*8 along inputs", "gate 46 | up 46"},
        per_head=True,
    ),
    "GPT-NeoX by head": Model(models.gpt_neox, {"4 x (q 1*8 | k 1*8 | v 1*8)", "head 4*8 along inputs"}, per_head=True),
    "GPT-2 by head": Model(models.gpt2, {"q 4*8 | k 4*8 | v 4*8", "head 4*8 along inputs"}, per_head=True),
}


def blocks(text: str, weight: Tensor, transposed: bool) -> dict[str, Tensor]:
    """Cut a weight (..., rows, columns) into what a text names; a stack of matrices where it says how many they are."""

    def turned(each: Tensor) -> Tensor:
        """The blocks as rows, or back."""
        return each.mT if text.endswith(" along inputs") != transposed else each

    repeats = re.match(r"(\d+) x ", text)
    pieces = re.findall(r"(\w+) (?:(\d+)\*)?(\d+)", text.removeprefix(repeats[0]) if repeats else text)
    sizes = [int(count or 1) * int(size) for _, count, size in pieces]
    periods = turned(weight).unflatten(-2, (int(repeats[1]) if repeats else 1, sum(sizes)))
    found = {}
    for (name, count, size), piece in zip(pieces, periods.split(sizes, dim=-2), strict=True):
        rows = piece.flatten(-3, -2)
        matrices = rows.unflatten(-2, (-1, int(size))).flatten(0, -3) if count else rows
        found[name] = turned(matrices).contiguous()
    return found


class Separate:
    """The blocks of a model's fused weights as parameters of their own, and their optimizer.

    Attributes:
        fused: The model's decisions about fused weights, by name.
        parameters: The blocks of each, by name.
        optimizer: What trains them.
    """

    def __init__(self, model: nn.Module, settings: dict[str, Any], per_head: bool) -> None:
        self.fused = {name: each for name, each in decide(model, per_head=per_head).items() if each.splits != "whole"}
        self.parameters = {
            name: {block: nn.Parameter(each.clone()) for block, each in self.blocks(name, whole.parameter).items()}
            for name, whole in self.fused.items()
        }
        groups = [
            {"params": [each], "batched": each.ndim == 3, "transposed": self.fused[name].transposed, **settings}
            for name, own in self.parameters.items()
            for each in own.values()
        ]
        self.optimizer = Dion2(groups, **COMMON)

    def blocks(self, name: str, whole: Tensor) -> dict[str, Tensor]:
        return blocks(self.fused[name].splits, whole.detach(), self.fused[name].transposed)

    def step(self, gradients: dict[str, Tensor]) -> None:
        """Take a step, given the gradients of the fused weights."""
        for name, own in self.parameters.items():
            for block, gradient in self.blocks(name, gradients[name]).items():
                own[block].grad = gradient
        self.optimizer.step()

    def compare(self, model: nn.Module, optimizer: Dion2, algorithm: str) -> None:
        """Compare momenta and selections with those of the fused weights."""
        parameters = dict(model.named_parameters())
        for name, own in self.parameters.items():
            parameter = parameters[name]
            momenta = self.blocks(name, full(optimizer.state[parameter]["momentum"]))
            assert momenta.keys() == own.keys()
            for block, each in own.items():
                momentum, label = self.optimizer.state[each]["momentum"], (algorithm, name, block)
                if algorithm == "dion":
                    assert_close(momenta[block], momentum, 1e-4)
                    continue
                assert torch.equal(momenta[block], momentum), label
                found, expected = optimizer.selection_of(parameter, block), self.optimizer.selection_of(each)
                assert found.axis == expected.axis, label
                assert torch.equal(full(found.indices).view_as(expected.indices), expected.indices), label

    def compare_weights(self, model: nn.Module, tolerance: float) -> None:
        parameters = dict(model.named_parameters())
        for name, own in self.parameters.items():
            for block, weight in self.blocks(name, full(parameters[name])).items():
                assert_close(weight, own[block].detach(), tolerance)


def full(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def gradients_of(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Return the gradients of all weights, from a backward pass."""
    generator = torch.Generator().manual_seed(step)
    model.zero_grad()
    if hasattr(model, "config"):
        # Short cycles of tokens, so that there is something to learn.
        batch = (torch.randint(0, 96, (4, 1), generator=generator) + 5 * torch.arange(TOKENS)) % 96
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    else:
        model(torch.randn(4, TOKENS, 16, generator=generator)).square().mean().backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def begin_alike(model: nn.Module, optimizer: Dion2, separate: Separate) -> None:
    """Give the blocks of Dion the Q that the fused weights have: it depends on names."""
    for each in (optimizer, separate.optimizer):
        rates = [group["lr"] for group in each.param_groups]
        for group in each.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        each.step()
        for group, lr in zip(each.param_groups, rates, strict=True):
            group["lr"] = lr
    parameters = dict(model.named_parameters())
    for name, own in separate.parameters.items():
        for block, weight in own.items():
            separate.optimizer.state[weight]["Q"].copy_(full(optimizer.state[parameters[name]][f"Q[{block}]"]))


@pytest.mark.parametrize("name", MODELS)
def test_fused_equals_separate(name: str) -> None:
    """For every algorithm, given the same gradients: those of a model that the first one trains."""
    model = built(name)
    runs: dict[str, tuple[nn.Module, Dion2, Separate]] = {}
    for algorithm, settings in SETTINGS.items():
        own = copy.deepcopy(model) if runs else model
        optimizer = build_optimizer(own, **COMMON | settings, per_head=MODELS[name].per_head)
        runs[algorithm] = own, optimizer, Separate(own, settings, MODELS[name].per_head)
        if algorithm == "dion":
            begin_alike(*runs[algorithm])
    separate = runs["dion2"][-1]
    assert {each.splits for each in separate.fused.values()} == MODELS[name].splits
    before = {weight: each.parameter.detach().clone() for weight, each in separate.fused.items()}
    for step in range(STEPS):
        gradients = gradients_of(model, step)
        for algorithm, (own, optimizer, separate) in runs.items():
            for weight, parameter in own.named_parameters():
                parameter.grad = gradients[weight].clone()
            optimizer.step()
            separate.step(gradients)
            separate.compare(own, optimizer, algorithm)
    for algorithm, (own, _, separate) in runs.items():
        separate.compare_weights(own, 1e-4 if algorithm == "dion" else 1e-5)
        assert not any(torch.equal(weight, own.get_parameter(name)) for name, weight in before.items())


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name].build().eval()  # dropout would be as good, and slower


# On several ranks. Every one also trains the blocks by itself, from the same gradients.

SHARDED = ("Phi-3", "GPT-NeoX", "GPT-OSS", "Phi-3 by head")
COMPARED_EVERY = 4
"""Steps: a comparison gathers all momenta, which takes longer than a step."""


def check_layout(shard: Callable[[nn.Module], object]) -> None:
    """Compare sharded models with their blocks as parameters of their own, given gradients of the whole model."""
    for name in SHARDED:
        gradients = [gradients_of(built(name), step) for step in range(STEPS)]
        for algorithm, settings in SETTINGS.items():
            separate = Separate(built(name), settings, MODELS[name].per_head)
            model = built(name)
            shard(model)
            optimizer = build_optimizer(model, **COMMON | settings, per_head=MODELS[name].per_head)
            if algorithm == "dion":
                begin_alike(model, optimizer, separate)
            for number, of_step in enumerate(gradients, 1):
                for weight, parameter in model.named_parameters():
                    parameter.grad = of_step[weight].clone()
                    if isinstance(parameter, DTensor):
                        parameter.grad = place(of_step[weight], parameter.device_mesh, parameter.placements)
                optimizer.step()
                separate.step(of_step)
                if number % COMPARED_EVERY == 0:
                    with errors_name_case(name):
                        separate.compare(model, optimizer, algorithm)
            assert all(isinstance(model.get_parameter(weight), DTensor) for weight in separate.fused)
            separate.compare_weights(model, 1e-4 if algorithm == "dion" else 1e-5)


def split_fused(model: nn.Module, mesh: DeviceMesh, dim: int) -> None:
    """Distribute fused weights by their rows as stored, dim -2, or by their columns, -1."""
    for name, decision in decide(model, per_head=True).items():
        if decision.splits != "whole":
            weight = decision.parameter.detach()
            owner, _, leaf = name.rpartition(".")
            placements = (Shard(weight.ndim + dim),)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(place(weight, mesh, placements)))


def check_fsdp(ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,))
    check_layout(partial(fully_shard, mesh=mesh))


def check_tp() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for dim in (-2, -1):
        check_layout(partial(split_fused, mesh=mesh, dim=dim))


def check_fsdp_over_tp() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))

    def shard(model: nn.Module) -> None:
        split_fused(model, mesh["tp"], -2)
        fully_shard(model, mesh=mesh["fsdp"])

    check_layout(shard)


@pytest.mark.parametrize("ranks", [2, 3])
def test_fsdp(ranks: int) -> None:
    run_on_ranks(ranks, check_fsdp, ranks)


def test_tp() -> None:
    run_on_ranks(2, check_tp)


def test_fsdp_over_tp() -> None:
    run_on_ranks(4, check_fsdp_over_tp)
