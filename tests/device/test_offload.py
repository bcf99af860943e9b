"""``offload="cpu"`` gives the same bits, and the host waits for nothing; on a CPU it changes nothing.

tests/test_offload.py does the same on a CPU that plays two devices.
"""

import copy
from unittest import mock

import torch
from torch import Tensor

from dion2_lightning import Dion2
from dion2_lightning.algorithms.matrix_update import MatrixUpdate
from tests.device.host_sync import no_host_sync
from tests.device.test_checkpoint import assert_same, weights_and_state
from tests.every_kind import fill, groups_of_every_kind, parameters_of

STEPS = 4
MEMORY = 2**17
"""So little that a step visits its parameters in several turns."""


def optimizer_of(device: str, offload: str | None) -> Dion2:
    memory = MEMORY if offload is None else 2 * MEMORY  # half of it is for the state
    return Dion2(groups_of_every_kind(device), lr=0.1, working_memory=memory, offload=offload)


def train(device: str, offload: str | None) -> list[Tensor]:
    """Return weights and state after some steps, with a resume in the middle."""
    optimizer = optimizer_of(device, offload)
    fill(optimizer, weights=100)
    for step in range(STEPS):
        fill(optimizer, gradients=step)
        with no_host_sync(device if step % 2 else "cpu"):  # the first step makes the state, the third pins it anew
            optimizer.step()
        if step == 1:
            resumed = optimizer_of(device, offload)
            for old, new in zip(parameters_of(optimizer), parameters_of(resumed), strict=True):
                new.data.copy_(old)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer = resumed
    kept = {tensor.device.type for state in optimizer.state.values() for tensor in state.values() if tensor.ndim}
    assert kept == {"cpu" if offload == "cpu" else device}
    optimizer.state_dict()  # waits for what is on its way
    return [tensor.to(device) for tensor in weights_and_state(optimizer)]


def test_the_bits_are_those_without_offloading(device: str) -> None:
    """Visits make other batches, so matrices are orthonormalized one by one."""
    with mock.patch.object(MatrixUpdate, "goes_alone", True):
        assert_same(train(device, "cpu"), train(device, None))


def test_nothing_is_left_on_the_device(gpu: str) -> None:
    """Beside weights, gradients, counts of steps and what was selected."""
    optimizer_of(gpu, "cpu").step()  # cuBLAS keeps what it allocates for its first product
    optimizer = optimizer_of(gpu, "cpu")
    before = torch.cuda.memory_allocated()
    state = sum(4 * parameter.numel() for parameter in parameters_of(optimizer))
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < state / 2
