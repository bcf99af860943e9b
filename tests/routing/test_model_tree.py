"""Embeddings and what is tied to them, wrappers and sharding, and parameters that are refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dion2_lightning.routing.router import route_parameters
from tests.routing import models
from tests.routing.models import algorithms, build, decide, on_meta


class TestEmbeddings:
    def test_tied_by_identity(self) -> None:
        decisions = decide(build("llama_tied"))
        assert "lm_head.weight" not in decisions
        assert decisions["model.embed_tokens.weight"].reason == "input embedding, tied to `lm_head.weight`"

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_tied_by_storage(self, device: str) -> None:
        with torch.device(device):
            model: Any = nn.ModuleDict(
                {"embedding": nn.Embedding(8, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 8)}
            )
        model["head"].weight = nn.Parameter(model["embedding"].weight.data)
        assert model["head"].weight is not model["embedding"].weight
        decisions = decide(model)
        assert decisions["head.weight"].reason == "output embedding, tied to `embedding.weight`"
        assert decisions["body.weight"].algorithm == "dion2"

    def test_head_before_the_embedding_that_it_is_tied_to(self) -> None:
        model: Any = nn.ModuleDict({"head": nn.Linear(4, 8, bias=False), "embedding": nn.Embedding(8, 4)})
        model["embedding"].weight = model["head"].weight
        assert algorithms(model) == {"head.weight": "adamw"}

    def test_a_layer_whose_memory_begins_with_an_embedding_is_not_tied(self) -> None:
        buffer = torch.zeros(24, 8)
        model: Any = nn.ModuleDict({"embedding": nn.Embedding(12, 8), "linear": nn.Linear(8, 24, bias=False)})
        model["embedding"].weight = nn.Parameter(buffer[:12])
        model["linear"].weight = nn.Parameter(buffer)
        assert algorithms(model) == {"embedding.weight": "adamw", "linear.weight": "dion2"}

    def test_views_into_one_buffer_are_not_tied(self) -> None:
        flat = torch.zeros(2, 4, 4)
        model: Any = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "linear": nn.Linear(4, 4, bias=False)})
        model["embedding"].weight = nn.Parameter(flat[0])
        model["linear"].weight = nn.Parameter(flat[1])
        assert algorithms(model) == {"embedding.weight": "adamw", "linear.weight": "dion2"}

    def test_sparse_parameters_have_no_storage_to_share(self) -> None:
        model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3, bias=False))
        model.register_parameter("table", nn.Parameter(torch.eye(3).to_sparse()))
        assert algorithms(model) == {"0.weight": "adamw", "1.weight": "dion2", "table": "adamw"}

    def test_an_error_while_looking_for_ties_is_raised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without it, a parameter that is tied to an embedding would be trained as a matrix."""

        def fail(self: torch.Tensor) -> None:
            raise RuntimeError("storage was freed")

        monkeypatch.setattr(torch.Tensor, "untyped_storage", fail)
        with pytest.raises(RuntimeError, match="storage was freed"):
            route_parameters(nn.Linear(4, 4))

    def test_models_that_look_for_an_embedding_in_a_part_they_lack(self) -> None:
        """As transformers' SAM 3 tracker does, whose vision encoder is optional."""

        class Tracker(transformers.LlamaForCausalLM):
            def get_input_embeddings(self) -> nn.Module:
                raise AttributeError("'NoneType' object has no attribute 'get_input_embeddings'")

        model = on_meta(lambda: Tracker(models.llama().config))
        decisions = decide(model)
        assert decisions["model.embed_tokens.weight"].algorithm == "adamw"
        assert decisions["model.layers.0.mlp.up_proj.weight"].algorithm == "dion2"

    def test_nested_models_have_embeddings_too(self) -> None:
        class Captioner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.decoder = models.llama()

        decisions = decide(on_meta(Captioner))
        assert decisions["decoder.lm_head.weight"].reason == "output embedding"
        assert decisions["decoder.model.layers.0.mlp.up_proj.weight"].algorithm == "dion2"


class TestWrappers:
    def test_checkpointed_and_compiled_layers(self) -> None:
        plain, wrapped = build("mixtral"), build("mixtral")
        body: Any = wrapped.get_submodule("model")
        body.layers[0] = checkpoint_wrapper(body.layers[0])
        body.layers[1].mlp.gate = torch.compile(body.layers[1].mlp.gate)
        body.layers[1].mlp.experts = torch.compile(checkpoint_wrapper(body.layers[1].mlp.experts))
        body.embed_tokens = torch.compile(body.embed_tokens)
        assert decide(wrapped) == decide(plain)

    def test_compiled_base_model_head_and_root(self) -> None:
        plain = build("bert_classifier")
        wrapped: Any = build("bert_classifier")
        wrapped.bert = torch.compile(wrapped.bert)
        wrapped.classifier = torch.compile(wrapped.classifier)
        compiled: Any = torch.compile(wrapped)
        assert decide(compiled) == decide(plain)
        assert decide(nn.DataParallel(compiled)) == decide(plain)

    def test_a_submodule_named_module_is_no_wrapper(self) -> None:
        assert set(decide(nn.ModuleDict({"module": nn.Linear(4, 4)}))) == {"module.weight", "module.bias"}

    def test_shared_and_cyclic_modules(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model.append(model[0])
        object.__setattr__(model[1], "_modules", {"parent": model})
        assert set(decide(model)) == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_sharded_parameters() -> None:
    plain, sharded = models.llama_tied(), models.llama_tied()
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    assert decide(sharded) == decide(plain)
    assert [each.shape for each in decide(sharded).values()] == [each.shape for each in decide(plain).values()]


def test_a_module_set_up_by_fabric() -> None:
    from lightning import Fabric

    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8))
    wrapped = Fabric(accelerator="cpu", devices=1).setup_module(model)
    assert [each.name for each in route_parameters(wrapped).decisions] == ["0.weight", "1.weight", "1.bias"]
    assert route_parameters(wrapped).decisions == route_parameters(model).decisions


class TestRefused:
    @pytest.mark.parametrize(
        ("attribute", "message"),
        [("_fsdp_flattened", "FSDP1.*fully_shard"), ("ds_id", "ZeRO.*fully_shard"), ("ds_tensor", "ZeRO.*fully_shard")],
    )
    def test_flattened_parameters(self, attribute: str, message: str) -> None:
        model = models.mlp()
        setattr(model.get_parameter("2.weight"), attribute, True)
        with pytest.raises(ValueError, match=f"'2.weight' .*{message}"):
            route_parameters(model)

    def test_uninitialized_parameters(self) -> None:
        with pytest.raises(ValueError, match="'weight' has no shape yet"):
            route_parameters(nn.LazyLinear(4))

    def test_a_parameter_that_is_not_reached(self) -> None:
        class Hidden(nn.Linear):
            def named_children(self) -> Iterator[tuple[str, nn.Module]]:
                return iter(())

        model = Hidden(4, 4)
        model.add_module("extra", nn.Linear(4, 4))
        with pytest.raises(RuntimeError, match="4 trainable parameters became 2 in the groups"):
            route_parameters(model)
