"""What dion2-routes computes, against what real steps of small models take."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode, baddbmm_flop

from benchmarks.communication import CollectiveCounter
from dion2_lightning import build_optimizer
from dion2_lightning.costs import Layout, Placed, gradient_bytes, step_costs
from dion2_lightning.integrations.routes import build_model, costs_of, load_config, main
from dion2_lightning.matrices.layout import local
from tests.distributed.ranks import run_on_ranks
from tests.installed import is_before

BATCH, LENGTH = 2, 32
# A quarter of every matrix has at least 32 slices: fewer are iterated in float32, which saves FLOPs.
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "attn_implementation": "eager",
}
FRACTION_OF = {"dion2": "fraction", "dion3": "fraction", "dion": "rank_fraction"}


def llama() -> Any:
    return transformers.LlamaConfig(**SIZES)


def mixtral() -> Any:
    return transformers.MixtralConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager"
    )


CONFIGS: dict[str, Callable[[], Any]] = {"llama": llama, "mixtral": mixtral, "llama in blocks": llama}
OVERRIDES: dict[str, dict[str, Any]] = {
    "llama in blocks": {
        "*.q_proj.*": {"splits": "2 x (even 64 | odd 64)"},
        "*.k_proj.*": {"splits": "head 1*128"},
        "*.o_proj.*": {"splits": "64 x (a 2 | b 2) along inputs"},
        "*.down_proj.*": {"splits": "first 128 | second 128"},
    }
}
"""Of some weights, as if they were several matrices, of which two ranks hold halves or all."""


def make_model(config: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def loss_of(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return model(input_ids=tokens, labels=tokens).loss


def figures_of(config: Any, **options: Any) -> dict[str, Any]:
    options = {"batch": BATCH, "length": LENGTH, **options}
    return costs_of(build_model(config), **options)[1]


def step_at(figures: dict[str, Any], fraction: float) -> dict[str, Any]:
    return next(each for each in figures["steps"] if each["fraction"] == fraction)


def counted() -> FlopCounterMode:
    in_place = {torch.ops.aten.baddbmm_: lambda *shapes, out_shape: baddbmm_flop(*shapes)}
    return FlopCounterMode(display=False, custom_mapping=in_place)


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_backward(name: str) -> None:
    """The counter sees all products of eager attention, the masked half too, which the figures leave out."""
    config = CONFIGS[name]()
    model = make_model(config)
    with counted() as counter:
        loss_of(model).backward()
    figures = figures_of(config)["forward_backward"]
    assert figures["products_flops"] + 2 * figures["attention_flops"] == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )
    assert figures["attention_flops"] > 0


def test_frozen_weights_have_no_gradient_of_their_own() -> None:
    """Frozen weights pass on gradients of their inputs; the first layer's do not, which the figures leave in."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(llama()), LoraConfig(r=8, target_modules="all-linear"))
    with counted() as counter:
        loss_of(model).backward()
    figures = figures_of(llama(), lora_rank=8)["forward_backward"]
    of_first_inputs = 2 * BATCH * LENGTH * (256 * 256 + 2 * 128 * 256 + 3 * 8 * 256)
    expected = figures["products_flops"] + 2 * figures["attention_flops"] - of_first_inputs
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_model_of_images() -> None:
    """Sixteen patches and one; of the patch embedding's input the counter sees no gradient, the figures do."""
    sizes = {"image_size": 32, "patch_size": 8, "num_labels": 10, "attn_implementation": "eager"}
    config = transformers.ViTConfig(**{**SIZES, **sizes})
    model = transformers.ViTForImageClassification(config)
    with counted() as counter:
        model(torch.randn(BATCH, 3, 32, 32)).logits.sum().backward()
    figures = figures_of(config, length=None)
    assert figures["tokens"] == BATCH * 17
    counted_by_figures = figures["forward_backward"]["products_flops"] + figures["forward_backward"]["attention_flops"]
    assert counted_by_figures == pytest.approx(counter.get_total_flops(), rel=0.04)


NOT_COUNTED = "its attention was not counted: "
NO_EMBEDDING = "transformers before 5.23: a model's plan of tensor parallelism does not say that embeddings are cut too"
NOT_BEFORE_5_23 = pytest.mark.skipif(
    is_before("transformers", "5.23"), reason="transformers before 5.23 does not have it, or cannot build it"
)


@pytest.mark.parametrize(
    ("model_type", "kind", "note"),
    [
        pytest.param(
            *("embedding_gemma2_text", "EmbeddingGemma2TextModel", f"{NOT_COUNTED}its layers differ in head_dim"),
            marks=NOT_BEFORE_5_23,
        ),
        ("d_fine", "DFineModel", f"{NOT_COUNTED}its config does not give one number of heads, or of layers"),
        ("lxmert", "LxmertModel", f"{NOT_COUNTED}its config does not give one number of heads, or of layers"),
        ("xlnet", "XLNetLMHeadModel", None),  # its config says -1 positions
        ("deit", "DeiTForImageClassification", None),  # of two classes for it
        ("depth_anything", "DepthAnythingForDepthEstimation", None),  # no class of those that are tried first
        pytest.param(  # its first class cannot be built, and it has two texts
            *("musicgen", "MusicgenForConditionalGeneration", None),
            marks=NOT_BEFORE_5_23,
        ),
    ],
)
def test_configs_that_do_not_say_all(model_type: str, kind: str, note: str | None) -> None:
    figures = costs_of(build_model(load_config(model_type)))[1]
    assert figures["model"] == kind
    assert figures["forward_backward"]["products_flops"] > 0 and 0 < figures["tokens"] < 100_000
    if note is not None:
        assert [each for each in figures["notes"] if each.startswith(NOT_COUNTED)] == [note]


def test_a_class_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is taken and a warning says so; where there is none, the error is that of the first."""

    def fail(message: str) -> Callable[..., None]:
        def raise_it(*_: Any, **__: Any) -> None:
            raise RuntimeError(message)

        return raise_it

    monkeypatch.setattr(transformers.ViTForImageClassification, "__init__", fail("no head"))
    with pytest.warns(UserWarning, match="^ViTModel stands for ViTForImageClassification, which cannot .*: no head$"):
        assert type(build_model(transformers.ViTConfig())) is transformers.ViTModel
    for other in (transformers.ViTModel, transformers.ViTForMaskedImageModeling):
        monkeypatch.setattr(other, "__init__", fail("nothing"))
    with pytest.raises(ValueError, match="cannot build this config: RuntimeError: no head"):
        build_model(transformers.ViTConfig())


def test_a_note_where_all_fractions_are_one() -> None:
    notes = {rank: figures_of(llama(), lora_rank=rank)["notes"] for rank in (8, 16)}
    assert "factors of rank 8 are trained at fraction 1, whatever the row says" in notes[8]
    assert not any("factors of rank" in each for each in notes[16])


@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize("algorithm", FRACTION_OF)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step(name: str, algorithm: str, fraction: float) -> None:
    """FLOPs and state. The counter sees products: nothing entry by entry, and no QR."""
    config = CONFIGS[name]()
    model = make_model(config)
    loss_of(model).backward()
    overrides = OVERRIDES.get(name)
    optimizer = build_optimizer(
        model,
        algorithm=algorithm,
        overrides=overrides,
        **{FRACTION_OF[algorithm]: fraction},
        **in_half_precision(algorithm),
    )
    with counted() as counter:
        optimizer.step()
    step = step_at(figures_of(config, algorithm=algorithm, overrides=overrides), fraction)
    assert step["products_flops"] == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert step["state_bytes"] == sum(held_bytes(optimizer))
    trained = sum(each.numel() for each in model.parameters())
    assert step["state_bytes_per_parameter"] == step["state_bytes"] / trained

    adamw = torch.optim.AdamW(model.parameters())
    adamw.step()
    assert figures_of(config)["adamw"]["state_bytes"] == sum(held_bytes(adamw))


def in_half_precision(algorithm: str) -> dict[str, str]:
    """What the figures assume, as on GPUs."""
    return {} if algorithm == "dion" else {"orthonormalize_dtype": "bfloat16"}


def held_bytes(optimizer: torch.optim.Optimizer) -> list[int]:
    return [local(each).nbytes for state in optimizer.state.values() for each in state.values()]


CASES = [
    ("llama", "dion2", "fsdp2=2"),
    ("llama", "dion3", "fsdp2=2"),
    ("llama", "dion", "fsdp2=2"),
    ("llama", "dion2", "ddp=2"),
    ("llama", "dion2", "tp=2"),
    ("llama", "dion3", "tp=2"),
    ("llama", "dion", "tp=2"),
    ("llama in blocks", "dion2", "fsdp2=2"),
    ("llama in blocks", "dion3", "fsdp2=2"),
    ("llama in blocks", "dion", "fsdp2=2"),
    ("llama in blocks", "dion", "tp=2"),
    ("mixtral", "dion2", "fsdp2=2"),
    ("mixtral", "dion", "fsdp2=2"),
]
SHARES = [1.0, 0.25]
STEPS = 3


@pytest.fixture(scope="module")
def on_2_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("traffic") / "counted.json"
    run_on_ranks(2, count_traffic, str(path))
    return json.loads(path.read_text())


def count_traffic(path: str) -> None:
    """Write what each rank sends and holds: bytes of gradients, of a step, and of state."""
    found: dict[str, list[Any]] = {}
    for name, algorithm, layout in CASES:
        for fraction in SHARES:
            by_rank: list[Any] = [None, None]
            dist.all_gather_object(by_rank, traffic_of(name, algorithm, layout, fraction))
            found[f"{name} {algorithm} {layout} {fraction}"] = by_rank
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(found))


def traffic_of(name: str, algorithm: str, layout: str, fraction: float) -> dict[str, float]:
    mesh = init_device_mesh("cpu", (2,))
    model = make_model(CONFIGS[name]())
    trained = spread(model, layout, mesh)
    optimizer = build_optimizer(
        model,
        algorithm=algorithm,
        overrides=OVERRIDES.get(name),
        strategy=mesh.get_group() if layout.startswith("ddp") else None,
        orthonormalize=None if algorithm == "dion" else lambda submatrices: submatrices,  # not what is counted
        **{FRACTION_OF[algorithm]: fraction},
        **in_half_precision(algorithm),
    )
    gradients, steps = CollectiveCounter(), CollectiveCounter()
    for step in range(STEPS + 1):
        if trained is not None:
            loss = loss_of(trained)
            with gradients:
                loss.backward()
        if layout != "ddp=2":  # of a small model's own gradients the largest slices lie close to each other
            torch.manual_seed(dist.get_rank() + 10 * step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
        with steps if step else nullcontext():  # the first one also compares the ranks' settings
            optimizer.step()
        optimizer.zero_grad()
    kind = "all-reduce" if layout.startswith("ddp") else "reduce-scatter"
    return {
        "gradients": gradients.traffic.sent[kind] / (STEPS + 1),
        "sums": steps.traffic.sums / STEPS,
        "submatrices": steps.traffic.submatrices / STEPS,
        "state": sum(held_bytes(optimizer)),
    }


def spread(model: nn.Module, layout: str, mesh: DeviceMesh) -> nn.Module | None:
    """Spread a model's parameters; return what a backward pass is counted in, None under TP."""
    if layout == "ddp=2":
        return DistributedDataParallel(model, broadcast_buffers=False)
    if layout == "fsdp2=2":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    for name, module in model.named_modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            columns = name.endswith(("o_proj", "down_proj"))  # norms are replicated
            if parameter.ndim > 1:
                part = distribute_tensor(parameter.detach(), mesh, [Shard(1 if columns else 0)], src_data_rank=None)
                module.register_parameter(own, nn.Parameter(part))
    return None


@pytest.mark.parametrize("fraction", SHARES)
@pytest.mark.parametrize(("name", "algorithm", "layout"), CASES)
def test_two_ranks(name: str, algorithm: str, layout: str, fraction: float, on_2_ranks: dict[str, Any]) -> None:
    """Bytes sent and state, of the rank with the most. The first rank has the most state."""
    if layout.startswith("tp") and is_before("transformers", "5.23"):
        pytest.skip(NO_EMBEDDING)
    by_rank = on_2_ranks[f"{name} {algorithm} {layout} {fraction}"]
    options = {"overrides": OVERRIDES.get(name), "layout": Layout.read(layout)}
    figures = figures_of(CONFIGS[name](), algorithm=algorithm, **options)
    step = step_at(figures, fraction)
    assert step["sums_bytes_sent"] == pytest.approx(max(each["sums"] for each in by_rank), rel=0.05)
    assert step["submatrices_bytes_sent"] == pytest.approx(max(each["submatrices"] for each in by_rank), rel=0.05)
    assert step["state_bytes"] == by_rank[0]["state"]
    assert figures["gradients_bytes_sent"] == pytest.approx(max(each["gradients"] for each in by_rank), rel=0.05)
    assert step["sums_bytes_sent"] > 0
    sends_submatrices = algorithm != "dion" and layout != "ddp=2"
    assert (step["submatrices_bytes_sent"] > 0) == sends_submatrices


DEFAULTS = ["llama", "gpt2", "bert", "phi3", "mixtral", "qwen3_moe", "gpt_neox", "falcon", "vit", "whisper"]


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_configs(name: str) -> None:
    """On the meta device: none of their weights is made."""
    config = load_config(name)
    model = build_model(config)
    assert all(each.is_meta for each in model.parameters())
    routing, figures = costs_of(model, layout=Layout("hsdp", 4, 8))
    assert figures["parameters"] == sum(each.numel() for each in model.parameters())
    assert figures["trainable_parameters"] == sum(group["parameters"] for group in figures["groups"])
    assert [each["fraction"] for each in figures["steps"]] == [1.0, 0.5, 0.25, 0.125]
    flops = [each["flops"] for each in figures["steps"]]
    sent = [each["bytes_sent"] for each in figures["steps"]]
    # A half of a fourfold MLP weight is square, so that it may take as much as all of it.
    assert sorted(flops, reverse=True) == flops and flops[-1] > figures["adamw"]["flops"]
    assert sorted(sent, reverse=True) == sent and sent[-1] > 0
    assert 0 < figures["forward_backward"]["attention_flops"] < figures["forward_backward"]["products_flops"]
    assert figures["state_bytes"]["dion2"] > 0 and routing.why_no_matrices is None


def test_known_sizes() -> None:
    """Llama-2-7B's default config, by hand: 6 FLOPs a parameter of matrices and head, and of attention half of all."""
    figures = costs_of(build_model(load_config("llama")), batch=4, length=1024)[1]
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert figures["active_parameters"] == matrices + 32000 * 4096
    assert figures["forward_backward"]["products_flops"] == 6 * 4 * 1024 * (matrices + 32000 * 4096)
    assert figures["forward_backward"]["attention_flops"] == 12 * 32 * 4096 * 1024 * 4 * 1024 // 2
    assert figures["state_bytes"]["dion2"] == 4 * matrices + 4 * 32 * 7


def test_experts_that_a_token_meets() -> None:
    config = mixtral()
    figures = figures_of(config)
    layer = 2 * 256**2 + 2 * 128 * 256 + 4 * 256 + 2 * 3 * 256 * 128
    assert figures["active_parameters"] == 2 * layer + 64 * 256


def test_experts_below_each_other_that_a_token_meets() -> None:
    """DBRX says in a config of its MLPs how many, and keeps its experts in two dimensions."""
    config = transformers.DbrxConfig(
        vocab_size=96,
        d_model=32,
        n_heads=4,
        n_layers=2,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    )
    figures = figures_of(config)
    layer = 32 * (32 + 2 * 16) + 32 * 32 + 4 * 32 + 2 * 3 * 48 * 32
    assert figures["active_parameters"] == 2 * layer + 96 * 32
    assert not figures["notes"]


def mistral(window: int) -> Any:
    return transformers.MistralConfig(**SIZES, sliding_window=window)


def llama4() -> Any:
    sizes = {**SIZES, "intermediate_size_mlp": 128, "num_local_experts": 2, "attention_chunk_size": 8}
    return transformers.Llama4TextConfig(**sizes, layer_types=["chunked_attention", "full_attention"])


def gemma2() -> Any:
    return transformers.Gemma2Config(
        **SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=64
    )


def modernbert() -> Any:
    sizes = {**SIZES, "local_attention": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return transformers.ModernBertConfig(**sizes, **dict.fromkeys(["pad_token_id", "cls_token_id", "sep_token_id"], 0))


def falcon_h1() -> Any:
    return transformers.FalconH1Config(**SIZES, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8)


def zamba2() -> Any:
    sizes = {**SIZES, "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "adapter_rank": 4}
    del sizes["head_dim"]
    return transformers.Zamba2Config(**sizes)


def encoder_decoder() -> Any:
    encoder, decoder = transformers.BertConfig(**SIZES), transformers.BertConfig(**SIZES)
    return transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)


CAUSAL = [token + 0.5 for token in range(LENGTH)]
"""Tokens that each sees, itself by half, as the masked half counts."""
IN_WINDOW = [min(seen, 8) for seen in CAUSAL]
IN_CHUNK = [token % 8 + 0.5 for token in range(LENGTH)]
ATTENTION: dict[str, tuple[Any, list[float]]] = {
    "llama": (llama(), [*CAUSAL, *CAUSAL]),
    "mistral": (mistral(8), [*IN_WINDOW, *IN_WINDOW]),
    "a longer window": (mistral(4096), [*CAUSAL, *CAUSAL]),
    "gemma2": (gemma2(), [*IN_WINDOW, *CAUSAL]),
    "llama4": (llama4(), [*IN_CHUNK, *CAUSAL]),
    "modernbert": (modernbert(), [8.0] * LENGTH + [float(LENGTH)] * LENGTH),
    "an encoder": (encoder_decoder(), [float(LENGTH)] * LENGTH * 4 + [*CAUSAL, *CAUSAL]),  # seen by itself and 2 layers
    "falcon_h1": (falcon_h1(), [*CAUSAL, *CAUSAL]),
    "zamba2": (zamba2(), [2 * seen for seen in CAUSAL]),  # one of two layers attends, with heads twice as wide
}


@pytest.mark.parametrize("name", ATTENTION)
def test_which_tokens_each_sees(name: str) -> None:
    """12 FLOPs a hidden unit, a token and a token that it sees, of all layers."""
    config, seen = ATTENTION[name]
    figures = figures_of(config)
    assert figures["forward_backward"]["attention_flops"] == pytest.approx(12 * 256 * BATCH * sum(seen), rel=1e-6)
    assert not figures["notes"]


def test_layers_of_a_kind_that_is_not_known() -> None:
    config = llama()
    config.layer_types = ["full_attention", "indexed_attention"]
    figures = figures_of(config)
    assert figures["forward_backward"]["attention_flops"] == 12 * 256 * BATCH * sum([*CAUSAL, *CAUSAL])
    assert figures["notes"] == ["layers of indexed_attention were counted as if each token saw all"]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("vit", 197),
        ("videomae", 1568),  # 8 frames of 196 patches each, two at a time
        ("audio-spectrogram-transformer", 1214),  # patches that overlap
        ("siglip", 196),  # a classifier of images: its text tower is not built
        ("clip", 50),
        ("beit", 197),  # has no table of positions
        ("bert", 512),
    ],
)
def test_tokens_of_a_default_config(name: str, tokens: int) -> None:
    figures = costs_of(build_model(load_config(name)), batch=1)[1]
    assert figures["tokens"] == tokens and not figures["notes"]
    assert costs_of(build_model(load_config(name)), batch=1, length=10)[1]["tokens"] == 10


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("wav2vec2", "convolutions were counted at one position a token"),
        ("encodec", "convolutions were counted at one position a token"),
        ("whisper", "convolutions were counted at one position a token"),
        ("timesformer", "one of its 8 frames was counted"),
        ("gpt_neo", "its windows of attention were not counted"),
        ("swin", "its attention was not counted"),
        ("switch_transformers", "how many experts a token goes to"),
        ("resnet", "convolutions were counted at one position a token"),
        ("swin", "its stages were all counted at the positions of the first"),
    ],
)
def test_what_a_config_does_not_say_is_said(name: str, note: str) -> None:
    notes = costs_of(build_model(load_config(name)))[1]["notes"]
    assert any(note in each for each in notes)


def test_parts_of_other_lengths() -> None:
    config = transformers.CLIPConfig(architectures=["CLIPModel"])
    assert any("its parts were all counted at 77 tokens" in note for note in costs_of(build_model(config))[1]["notes"])


def test_a_length_that_the_config_has_no_positions_for() -> None:
    assert (
        "a length of 4,096 is more than the 2,048 positions of its config" in figures_of(llama(), length=4096)["notes"]
    )
    assert not figures_of(llama())["notes"]


@pytest.mark.skipif(is_before("transformers", "5.23"), reason=NO_EMBEDDING)
def test_tensor_parallelism_by_the_plan_of_transformers() -> None:
    """Every matrix is cut in half, the output projections along their columns; norms are not."""
    config = llama()
    alone, halved = figures_of(config), figures_of(config, layout=Layout("tp", 1, 2))
    norms = 5 * 256 * 8 + 5 * 4
    counts = 4 * (len(list(build_model(config).parameters())) - 5)
    assert halved["steps"][0]["state_bytes"] - norms - counts == (alone["steps"][0]["state_bytes"] - norms - counts) / 2
    assert halved["gradients_bytes_sent"] == 0
    assert step_at(halved, 0.25)["submatrices_bytes_sent"] > 0
    assert halved["forward_backward"]["flops_per_rank"] == alone["forward_backward"]["flops"] / 2


def test_experts_that_stay_whole_send_nothing() -> None:
    """FSDP2 cuts a stack along its first axis; a stack of fewer experts than ranks leaves some without any."""
    parameter = nn.Parameter(torch.empty(4, 64, 32, device="meta"))
    group = build_optimizer(build_model(mixtral())).param_groups[1]
    stack = Placed(parameter, group, 0)
    assert group["batched"] and step_costs([stack], Layout("fsdp2", 1, 8)).sent == 0
    one, four = (step_costs([stack], Layout("fsdp2", 1, ranks)).flops for ranks in (1, 4))
    assert one == 4 * four


def test_blocks_of_a_fused_weight_are_held_where_they_lie() -> None:
    """Rows of q, k and v one after the other: of two ranks the first holds all of q, and half of k."""
    parameter = nn.Parameter(torch.empty(192, 64, device="meta"))
    group = build_optimizer(nn.Linear(64, 192).to("meta")).param_groups[0]
    placed, layout = Placed(parameter, {**group, "splits": "q 80 | k 32 | v 40 | gate 2*20"}, 0), Layout("fsdp2", 1, 2)
    held = [[spans for _, spans, is_rows in placed.held(each.matrices, layout) if is_rows] for each in placed.observed]
    assert held == [[((0, 80), (80, 80))], [((0, 16), (16, 32))], [((0, 0), (0, 40))], [((0, 0), (0, 20))] * 2]


def test_gradients_of_each_layout() -> None:
    """A ring sends 2 (n - 1) / n of what it averages, a reduce-scatter half of that."""
    placed = [Placed(nn.Parameter(torch.empty(64, 8, device="meta")), {"algorithm": "adamw"}, 0)]
    assert gradient_bytes(placed, Layout("ddp", 4, 1)) == 2 * 3 * 64 * 8 * 4 // 4
    assert gradient_bytes(placed, Layout("fsdp2", 1, 4)) == 3 * 64 * 8 * 4 // 4
    assert gradient_bytes(placed, Layout("hsdp", 2, 4)) == (3 + 1) * 64 * 8 * 4 // 4
    assert gradient_bytes(placed, Layout("tp", 1, 4)) == 0


@pytest.mark.parametrize("layout", ["fsdp2=2", "fsdp2=5", "hsdp=2x2", "ddp=2"])
def test_low_rank_updates_of_convolutions_on_several_ranks(layout: str) -> None:
    """Whose channels are cut evenly or not."""
    figures = figures_of(load_config("resnet"), algorithm="dion", layout=Layout.read(layout), length=None)
    assert figures["steps"][0]["flops"] > 0 < figures["steps"][0]["state_bytes"]


class TestCommand:
    def test_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The report first; last a row for each fraction, and one for AdamW."""
        assert main(["gpt2", "--layout", "fsdp2=8", "--fraction", "0.3", "--batch", "4"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("group ") and any("transformer.h.*.attn.c_attn.weight" in line for line in lines)
        rows = [line for line in lines if line.startswith("dion2 at ") and "FLOP" in line]
        assert [row.split()[2] for row in rows] == ["1", "0.5", "0.3", "0.25", "0.125"]
        assert lines[-1].startswith("torch's AdamW")
        assert "4,096 tokens of each" in " ".join(lines)  # 4 sequences of GPT-2's 1,024 positions

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["gpt2", "--algorithm", "dion", "--dtype", "bfloat16", "--overrides", '{"*.c_fc.*": "adamw"}']
        assert main([*arguments, "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["dtype"] == "bfloat16" and figures["algorithm"] == "dion" and figures["fraction"] == 0.25
        assert set(figures["state_bytes"]) == {"dion", "adamw"}
        assert set(figures["steps"][0]) == {
            "label",
            "fraction",
            "state_bytes",
            "state_bytes_per_parameter",
            "products_flops",
            "factorizations_flops",
            "elementwise_flops",
            "flops",
            "share_of_forward_backward",
            "sums_bytes_sent",
            "submatrices_bytes_sent",
            "bytes_sent",
        }
        assert figures["steps"][0]["factorizations_flops"] > 0

    @pytest.mark.parametrize("as_file", [True, False], ids=["file", "folder"])
    def test_a_model_on_disk(self, as_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        llama().save_pretrained(tmp_path)
        path = tmp_path / "config.json" if as_file else tmp_path
        assert main([str(path), "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["model"] == "LlamaForCausalLM"
        assert figures["parameters"] == sum(each.numel() for each in make_model(llama()).parameters())

    def test_groups_are_those_of_the_optimizer(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Four stages have their q, k and v in four sizes."""
        assert main(["hiera", "--json"]) == 0
        groups = json.loads(capsys.readouterr().out)["groups"]
        built = build_optimizer(build_model(load_config("hiera"))).param_groups
        assert [each["name"] for each in groups] == [each["name"] for each in built]
        assert len({each["name"] for each in groups}) == len(groups) > 4
        assert [each.get("splits") for each in groups] == [each.get("splits") for each in built]

    def test_adapters_leave_the_dtype_of_the_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Adapters are in float32, as peft makes them."""
        assert main(["gpt2", "--dtype", "bfloat16", "--lora-rank", "8", "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["dtype"] == "bfloat16" and figures["model"] == "GPT2LMHeadModel"
        assert figures["adamw"]["state_bytes_per_parameter"] == pytest.approx(8, rel=0.01)

    def test_the_class_that_a_config_names(self) -> None:
        config = transformers.BertConfig(**{**SIZES, "architectures": ["BertForSequenceClassification"]})
        assert type(build_model(config)) is transformers.BertForSequenceClassification

    def test_whole_matrices_and_the_control_have_one_row(self, capsys: pytest.CaptureFixture[str]) -> None:
        for algorithm in ("muon", "adamw"):
            assert main(["gpt2", "--algorithm", algorithm, "--json"]) == 0
            assert [each["fraction"] for each in json.loads(capsys.readouterr().out)["steps"]] == [None]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["no/such-model"],
                "is not a folder, a file or a model type such as 'llama', and was not found in the cache",
            ),
            (
                ["gpt2", "--algorithm", "muon", "--fraction", "0.5"],
                "--fraction 0.5 has no effect with --algorithm muon",
            ),
            (["gpt2", "--fraction", "2"], "fraction must lie in (0, 1], got 2.0"),
            (["gpt2", "--fraction", "0"], "fraction must lie in (0, 1], got 0.0"),
            (["gpt2", "--batch", "0"], "--batch must be at least 1, got 0"),
            (["gpt2", "--length", "0"], "--length must be at least 1, got 0"),
            (["gpt2", "--lora-rank", "0"], "--lora-rank must be at least 1, got 0"),
            (["gpt2", "--layout", "tp=2"], "plan of tensor parallelism for GPT2LMHeadModel cuts none of the matrices"),
            (["gpt_oss", "--layout", "tp=2"], "for GptOssForCausalLM cuts none of the matrices that are trained"),
            (["llama", "--layout", "tp=2", "--lora-rank", "8"], "cuts none of the matrices that are trained"),
            (
                ["align_vision_model"],
                "transformers has no model class for AlignVisionConfig; give the config of",
            ),
            (["gpt2", "--overrides", '{"nothing": "adamw"}'], "nothing"),
        ],
    )
    def test_errors(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(arguments) == 1
        printed = capsys.readouterr()
        line = next(each for each in printed.err.splitlines() if each.startswith("dion2-routes: error: "))
        assert message in line and len(line) < 400 and not printed.out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--layout", "fsdp=8"], "layout 'fsdp=8' is unknown; write fsdp2=8, ddp=8, hsdp=4x8"),
            (["--layout", "hsdp=8"], "layout 'hsdp=8' is unknown"),
            (["--overrides", "adamw"], "'adamw' is no JSON object"),
        ],
    )
    def test_wrong_arguments(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["gpt2", *arguments])
        assert ended.value.code == 2 and message in capsys.readouterr().err

    def test_files_that_are_no_config(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "config.json"
        refused = "transformers cannot build this config: "
        for content, message in (
            ("{", "is no JSON file"),
            ("[]", "has the model_type None"),
            ('{"a": 1}', "has the model_type None"),
            ('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 5}', f"{refused}Strict"),
            ('{"model_type": "llama", "hidden_size": "big"}', f"{refused}Strict"),
            ('{"model_type": "dbrx", "attn_config": {}}', f"{refused}AttributeError: "),
        ):
            path.write_text(content)
            assert main([str(path)]) == 1
            assert message in capsys.readouterr().err.splitlines()[-1]
        path.unlink()
        assert main([str(tmp_path)]) == 1 and "has no config.json" in capsys.readouterr().err

    def test_without_transformers(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        assert main(["gpt2"]) == 1
        assert "pip install transformers" in capsys.readouterr().err

    def test_the_console_script_is_the_command(self) -> None:
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
        assert EntryPoint("dion2-routes", project["scripts"]["dion2-routes"], "console_scripts").load() is main

    def test_the_command_is_a_module_too(self) -> None:
        command = [sys.executable, "-m", "dion2_lightning.integrations.routes", "gpt2", "--json"]
        result = subprocess.run(command, capture_output=True, timeout=100, check=True)
        assert json.loads(result.stdout)["model"] == "GPT2LMHeadModel"
