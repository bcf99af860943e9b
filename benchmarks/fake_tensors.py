"""Tensors of any device without data, on a machine without that device: what runs on them is what would be launched."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

_LISTS_OF_KINDS = ("torch.optim.optimizer", "torch.utils._foreach_utils")
"""Modules with a list of the kinds of tensors that multi-tensor kernels take; fake tensors are a kind of their own."""


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make every tensor of the block a fake one; torch chooses its kernels as it does for real CUDA tensors."""
    modules: list[Any] = [sys.modules[name] for name in _LISTS_OF_KINDS]
    before = [module._foreach_supported_types for module in modules]
    for module in modules:
        module._foreach_supported_types = [Tensor, nn.Parameter, FakeTensor]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), WithoutCuda():
            yield
    finally:
        for module, kinds in zip(modules, before, strict=True):
            module._foreach_supported_types = kinds


class WithoutCuda(TorchFunctionMode):
    """Replace calls that need a build of torch with CUDA, so that they run on fake tensors."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if function is torch.isfinite:
            return arguments[0].abs() < math.inf
        if function is Tensor.__invert__:
            return arguments[0].logical_not()
        if function is torch._fused_adamw_ and isinstance(keywords["lr"], Tensor):
            lr = keywords["lr"]  # which the kernel reads on the device, where it takes it for float32
            assert (lr.device.type, lr.dtype, lr.ndim) == ("cuda", torch.float32, 0)
            keywords = {**keywords, "lr": 0.1}
        if function is Tensor.contiguous and not arguments[0].is_contiguous():
            return aten.clone.default(arguments[0], memory_format=torch.contiguous_format)
        if function is Tensor.copy_:
            return aten.copy_.default(*arguments, **keywords)
        if function is Tensor.to:
            device = next((each for each in arguments if isinstance(each, torch.device)), None)
            dtype = next((each for each in arguments if isinstance(each, torch.dtype)), None)
            if device not in (None, arguments[0].device):
                return aten._to_copy.default(arguments[0], device=device, dtype=dtype, **keywords)
        return function(*arguments, **keywords)
