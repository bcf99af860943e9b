"""Shared by the tests of Accelerate, the Trainer and TRL."""

import functools
import warnings
from typing import Any, Final

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig, state
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from dion2_lightning import Dion2

STATE_DICTS: Final = {"FSDP2, sharded": "SHARDED_STATE_DICT", "FSDP2, full": "FULL_STATE_DICT"}
"""Accelerate's type of state dict, by layout."""


def fsdp2_on_cpu() -> None:
    """Let Accelerate prepare FSDP2 on several CPU processes, in this process from here on.

    Accelerate turns FSDP on for several GPUs only, and falls back to DDP on CPUs without a warning. So the distributed
    type is set to GPUs while the state is built; device and backend remain those of the CPU.
    """
    build = state.AcceleratorState.__init__

    @functools.wraps(build)
    def build_with_fsdp(self: Any, *arguments: Any, **settings: Any) -> None:
        if not state.AcceleratorState._shared_state:
            state.PartialState(settings.get("cpu", True))
            if state.PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
                state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        build(self, *arguments, **settings)

    state.AcceleratorState.__init__ = build_with_fsdp


def make_accelerator(layout: str, **settings: Any) -> Accelerator:
    """Make an Accelerator for ``"one device"``, ``"DDP"``, one of ``STATE_DICTS``, or ``"HSDP"`` of two times two.

    On the CPU, unless ``settings`` say otherwise.
    """
    settings = {"cpu": True, **settings}
    if layout in ("one device", "DDP"):
        return Accelerator(**settings)
    fsdp2_on_cpu()
    if layout == "HSDP":
        settings.setdefault("parallelism_config", ParallelismConfig(dp_replicate_size=2, dp_shard_size=2))
    if "fsdp_plugin" not in settings:
        settings["fsdp_plugin"] = fsdp_plugin(state_dict_type=STATE_DICTS.get(layout, "SHARDED_STATE_DICT"))
    return Accelerator(**settings)


def fsdp_plugin(**settings: Any) -> FullyShardedDataParallelPlugin:
    """FSDP2 by decoder layers, unless ``settings`` say otherwise."""
    chosen: dict[str, Any] = {
        "fsdp_version": 2,
        "reshard_after_forward": True,
        "cpu_ram_efficient_loading": False,
        "auto_wrap_policy": "transformer_based_wrap",
        "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names that FSDP1 has for arguments
        return FullyShardedDataParallelPlugin(**{**chosen, **settings})


def whole(model: nn.Module, optimizer: Dion2 | None = None) -> dict[str, Tensor]:
    """Copies of all weights and of all their state, the same under every layout. All ranks call it."""
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        found[name] = parameter
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        found |= {f"{name}: {entry}": value for entry, value in state.items()}
    return {name: _gathered(value) for name, value in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare two results of :func:`whole`, bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def plain_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The groups without what schedulers add, and with shapes in the place of the parameters."""
    return [
        {key: value for key, value in group.items() if key != "initial_lr"}
        | {"params": [tuple(parameter.shape) for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]


def _gathered(value: Any) -> Tensor:
    gathered: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return gathered.detach().clone()
