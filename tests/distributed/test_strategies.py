"""Which ranks hold replicas, according to a framework's strategy: real objects of every kind."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import lightning as L
import pytest
import torch.distributed as dist
import transformers
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from lightning.fabric import strategies as fabric_strategies
from lightning.pytorch import strategies
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from dion2_lightning.distributed.strategies import process_group_of
from tests.integrations.conftest import fresh_accelerator_state  # noqa: F401  a fixture

FLATTENS = r"flattens matrices into vectors, so no matrix is left to update; use FSDP2 \(fully_shard\) instead"


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """A fake group of four ranks, of which this process is the first."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trainer(**settings: Any) -> L.Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about GPUs that are not used
        return L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, **settings)


def attached_module() -> L.LightningModule:
    module = L.LightningModule()
    module.trainer = trainer()
    return module


def arguments(**settings: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(use_cpu=True, report_to=[], **settings)


def without_init(kind: type) -> Any:
    """An object of a class whose constructor needs a package that is not installed here."""
    return object.__new__(kind)


SINGLE: dict[str, Callable[[], Any]] = {
    "Trainer": trainer,
    "LightningModule": attached_module,
    "Strategy": lambda: trainer().strategy,
    "DDPStrategy": strategies.DDPStrategy,
    "ModelParallelStrategy": strategies.ModelParallelStrategy,
    "Fabric": lambda: L.Fabric(accelerator="cpu", devices=1),
    "Fabric's DDPStrategy": fabric_strategies.DDPStrategy,
    "Accelerator": lambda: accelerate.Accelerator(cpu=True),
    "TrainingArguments": arguments,
}


@pytest.mark.parametrize("kind", SINGLE)
def test_one_rank_has_no_replicas(kind: str) -> None:
    assert process_group_of(SINGLE[kind]()) is None


def test_no_strategy() -> None:
    assert process_group_of(None) is None


@pytest.mark.parametrize("kind", SINGLE)
def test_a_group_of_one_rank_is_none(one_rank: None, kind: str) -> None:
    """Launched by torchrun with one process."""
    assert process_group_of(SINGLE[kind]()) is None


def test_process_groups_and_meshes(one_rank: None) -> None:
    assert process_group_of(dist.group.WORLD) is dist.group.WORLD
    mesh = init_device_mesh("cpu", (1,))
    assert process_group_of(mesh) is mesh.get_group()


def test_a_mesh_of_two_dimensions_means_all_its_ranks(four_ranks: None) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("nodes", "devices"))
    assert dist.get_process_group_ranks(process_group_of(mesh)) == [0, 1, 2, 3]
    assert dist.get_process_group_ranks(process_group_of(mesh["devices"])) == [0, 1]


# Several ranks


def test_ddp_holds_replicas(four_ranks: None) -> None:
    class Custom(strategies.DDPStrategy):
        pass

    for strategy in (strategies.DDPStrategy(), fabric_strategies.DDPStrategy(), Custom()):
        assert process_group_of(strategy) is dist.group.WORLD


@pytest.mark.parametrize("kind", [strategies.DDPStrategy, fabric_strategies.DDPStrategy], ids=["Lightning", "Fabric"])
def test_ddp_over_some_of_the_ranks(four_ranks: None, kind: Any) -> None:
    pair, alone = dist.new_group([0, 1]), dist.new_group([0])
    assert process_group_of(kind(process_group=pair)) is pair
    assert process_group_of(kind(process_group=alone)) is None
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("nodes", "devices"))["devices"]
    assert process_group_of(kind(device_mesh=mesh)) is mesh.get_group()


def wrapped_by_ddp(group: Any, hooks: list[Any]) -> strategies.DDPStrategy:
    """A strategy with a model wrapped for a group that only the wrapper knows, as in a user's subclass."""
    strategy, wrapper = strategies.DDPStrategy(), without_init(DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.process_group, wrapper._comm_hooks = group, hooks
    strategy.model = wrapper
    return strategy


def test_group_of_a_ddp_wrapper(four_ranks: None) -> None:
    pair = dist.new_group([0, 1])
    assert process_group_of(wrapped_by_ddp(pair, [])) is pair


def hook(state: object, bucket: dist.GradBucket) -> None:
    """A hook may leave different gradients on every rank."""


@pytest.mark.parametrize(
    "option", [{"ddp_comm_hook": hook}, {"model_averaging_period": 4}], ids=lambda option: next(iter(option))
)
def test_ddp_whose_gradients_may_differ_between_ranks_has_no_replicas(four_ranks: None, option: dict[str, Any]) -> None:
    assert process_group_of(strategies.DDPStrategy(**option)) is None
    assert process_group_of(wrapped_by_ddp(dist.group.WORLD, [(hook, None)])) is None


@pytest.mark.parametrize(
    "strategy",
    [
        strategies.ModelParallelStrategy(),
        fabric_strategies.ModelParallelStrategy(parallelize_fn=lambda module, mesh: module),
        strategies.SingleDeviceStrategy(),
    ],
    ids=lambda strategy: type(strategy).__module__,
)
def test_strategies_that_need_no_group(four_ranks: None, strategy: Any) -> None:
    assert process_group_of(strategy) is None


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        (strategies.FSDPStrategy(), r"FSDPStrategy \(FSDP1\)"),
        (fabric_strategies.FSDPStrategy(), r"FSDPStrategy \(FSDP1\)"),
        (without_init(strategies.DeepSpeedStrategy), "DeepSpeedStrategy"),
        (without_init(fabric_strategies.DeepSpeedStrategy), "DeepSpeedStrategy"),
    ],
)
def test_strategies_that_flatten_are_refused(strategy: Any, name: str) -> None:
    """On one rank too, where a script is usually tried first."""
    with pytest.raises(ValueError, match=f"^strategy {name} {FLATTENS}: ModelParallelStrategy$"):
        process_group_of(strategy)


def test_unknown_lightning_strategies_are_refused_on_several_ranks(four_ranks: None) -> None:
    class Custom(strategies.ParallelStrategy):
        pass

    Custom.__abstractmethods__ = frozenset()
    with pytest.raises(
        ValueError, match=r"^strategy Custom is not supported on several ranks; use DDPStrategy or Model"
    ):
        process_group_of(without_init(Custom))


def test_a_module_without_trainer_is_refused() -> None:
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        process_group_of(L.LightningModule())


# Accelerate


@pytest.fixture
def accelerator() -> accelerate.Accelerator:
    """One whose state the test may change."""
    return accelerate.Accelerator(cpu=True)


@pytest.mark.parametrize("kind", [kind for kind in DistributedType if kind.name.startswith("MULTI_")])
def test_accelerators_that_hold_replicas(four_ranks: None, accelerator: Any, kind: DistributedType) -> None:
    accelerator.state.distributed_type = kind
    assert process_group_of(accelerator) is dist.group.WORLD


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_accelerators_that_flatten_are_refused(accelerator: Any, kind: DistributedType) -> None:
    accelerator.state.distributed_type = kind
    with pytest.raises(ValueError, match=f"^strategy Accelerator with {kind.name} {FLATTENS}$"):
        process_group_of(accelerator)


def test_accelerator_with_fsdp(four_ranks: None, accelerator: Any) -> None:
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    assert process_group_of(accelerator) is None
    accelerator.state.fsdp_plugin.fsdp_version = 1
    with pytest.raises(ValueError, match=rf"^strategy Accelerator with FSDP1 {FLATTENS}: .*\(fsdp_version=2\)$"):
        process_group_of(accelerator)


# Transformers


def test_training_arguments_on_several_ranks(four_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", 4)
    assert process_group_of(arguments()) is dist.group.WORLD
    assert process_group_of(transformers.Seq2SeqTrainingArguments(use_cpu=True, report_to=[])) is dist.group.WORLD


@pytest.mark.parametrize("config", [None, {}, {"version": 2}, {"version": "2"}, {"fsdp_version": 2}], ids=str)
def test_training_arguments_with_fsdp2(config: dict[str, Any] | None) -> None:
    """The Trainer defaults to version 2."""
    assert process_group_of(arguments(fsdp=True, fsdp_config=config)) is None


@pytest.mark.parametrize("config", [{"version": 1}, {"fsdp_version": 1}], ids=str)
def test_training_arguments_with_fsdp1(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^strategy TrainingArguments with FSDP1 {FLATTENS}: fsdp_config="):
        process_group_of(arguments(fsdp=True, fsdp_config=config))


def test_training_arguments_with_deepspeed() -> None:
    using_deepspeed = arguments()
    using_deepspeed.deepspeed = "zero3.json"
    with pytest.raises(ValueError, match=f"^strategy TrainingArguments with deepspeed {FLATTENS}$"):
        process_group_of(using_deepspeed)


# Other objects


class Trainer:
    """Named like Lightning's, but of no framework."""

    strategy = strategies.DDPStrategy()


@pytest.mark.parametrize(
    "strategy",
    ["ddp", 4, Trainer(), nn.Linear(2, 2), strategies.DDPStrategy],
    ids=["str", "int", "namesake", "module", "class"],
)
def test_other_objects_are_refused(strategy: Any) -> None:
    kinds = "a Lightning Trainer, Strategy or LightningModule, a Fabric, an Accelerator, TrainingArguments, a Process"
    with pytest.raises(TypeError, match=f"^strategy must be {kinds}.* got {type(strategy).__name__}$"):
        process_group_of(strategy)
