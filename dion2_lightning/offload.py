"""State on the host: a step brings it to the device, that of some parameters at a time, and takes it back.

Two streams carry it, one each way, beside the one that computes. While a step works on the state of some parameters,
that of the next ones arrives and that of the last ones leaves; the host waits for none of it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from dion2_lightning.algorithms.algorithm import Member, StateTensor
from dion2_lightning.lists import bounded, group_by
from dion2_lightning.matrices.layout import local, number_of_parts, placed

HOST: Final = torch.device("cpu")


def kept(tensor: StateTensor) -> StateTensor:
    """Return a tensor of the state with the device that keeps it between steps.

    Numbers stay: a count of steps takes next to no memory, and some steps read it on the device.
    """
    return tensor._replace(device=HOST) if tensor.shape else tensor


def is_away(tensor: Tensor, device: torch.device) -> bool:
    """Return whether a tensor of the state is to be fetched to the device of its parameter."""
    return tensor.ndim > 0 and tensor.device != device


def refuse_device(parameter: Tensor, label: str) -> None:
    """Raise an error about a parameter on a device that does not copy while it computes, or has the host's memory."""
    if parameter.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{label} is on {parameter.device.type!r}, from where offload='cpu' moves no state; it does so from CUDA. "
            "Leave offload at None"
        )


class OffloadedTensor:
    """A tensor of a parameter's state, which the state has on the host, or on the parameter's device during a visit.

    Attributes:
        device: The parameter's.
        on_host: Where it is kept, in pinned memory, so that copies need not wait.
    """

    def __init__(self, member: Member, name: str) -> None:
        self._state, self._name = member.state, name
        self.device = member.parameter.device
        self.on_host = self._state[name]
        if not is_pinned(local(self.on_host)):  # new, loaded or copied
            self.on_host = self._state[name] = placed(pinned(local(self.on_host)), self.on_host)

    def arrive(self) -> None:
        """Begin a copy to the device, which the state has from now on."""
        copy = local(self.on_host).to(self.device, non_blocking=True)
        self._state[self._name] = placed(copy, self.on_host)

    def leave(self) -> None:
        """Begin a copy to the host, and let go of what is on the device."""
        local(self.on_host).copy_(local(self._state[self._name]), non_blocking=True)
        self._state[self._name] = self.on_host


class Lanes:
    """The streams of a device on which state arrives and leaves, beside the one that computes.

    What arrives takes the memory of what has left: that is of the stream on which it came, which waits for the other.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._incoming, self._outgoing = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def fetch(self, tensors: Sequence[OffloadedTensor]) -> torch.Event:
        """Begin to bring state to the device; return the event that it is there."""
        self._incoming.wait_stream(self._outgoing)
        with torch.cuda.stream(self._incoming):
            for tensor in tensors:
                tensor.arrive()
        arrived: torch.Event = self._incoming.record_event()
        return arrived

    def use(self, arrived: torch.Event) -> None:
        """Have what is computed from now on wait for the event."""
        torch.cuda.current_stream(self.device).wait_event(arrived)

    def take_back(self, tensors: Sequence[OffloadedTensor]) -> None:
        """Begin to bring state to the host, once all is computed that has been launched."""
        self._outgoing.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._outgoing):
            for tensor in tensors:
                tensor.leave()


class Visit:
    """Parameters that a step works on together.

    Attributes:
        members: The parameters.
        size: Bytes of their state that is kept on the host, the same on every rank that shares them.
    """

    def __init__(self, members: Sequence[Member], size: int) -> None:
        self.members, self.size = members, size
        self._present: list[tuple[Lanes, list[OffloadedTensor], torch.Event]] = []

    def fetch(self, lanes_of: Callable[[torch.device], Lanes]) -> None:
        """Begin to bring the state to the parameters' devices, unless that has begun or all of it is there."""
        if self._present or not self.size:
            return
        tensors = [OffloadedTensor(member, name) for member in self.members for name in offloaded_entries(member)]
        for device, its_tensors in group_by(tensors, lambda tensor: tensor.device).items():
            lanes = lanes_of(device)
            self._present.append((lanes, its_tensors, lanes.fetch(its_tensors)))

    def begin(self) -> None:
        """Have what is computed from now on wait for the state."""
        for lanes, _, arrived in self._present:
            lanes.use(arrived)

    def end(self) -> None:
        """Begin to take the state back."""
        while self._present:
            lanes, tensors, _ = self._present.pop()
            lanes.take_back(tensors)


class Offloading:
    """Brings state from the host to the devices, and back."""

    def __init__(self) -> None:
        self._lanes: dict[torch.device, Lanes] = {}

    def in_turn(self, visits: Sequence[Visit], limit: int) -> Iterator[Visit]:
        """Yield visits, each with its state on the devices until the next one is asked for.

        The state of the next one is fetched meanwhile, where both together have at most ``limit`` bytes.
        """
        for visit, following in zip(visits, [*visits[1:], None], strict=True):
            visit.fetch(self._lanes_of)
            if following is not None and visit.size + following.size <= limit:
                following.fetch(self._lanes_of)
            visit.begin()
            yield visit
            visit.end()

    def wait(self) -> None:
        """Wait until all state has come back: before anything but a step reads or changes it."""
        for device in self._lanes:
            torch.cuda.synchronize(device)

    def _lanes_of(self, device: torch.device) -> Lanes:
        if device not in self._lanes:
            self._lanes[device] = Lanes(device)
        return self._lanes[device]


def cut_into_visits(members: Sequence[Member], limit: int) -> list[Visit]:
    """Cut the parameters of a step so that the state of a visit and that of the next one have at most ``limit`` bytes.

    Those of one algorithm and shape are next to each other. A parameter whose state has more than half of the limit is
    visited alone.
    """
    alike = group_by(members, lambda member: (member.group["algorithm"], member.parameter.shape)).values()
    in_order = [member for each in alike for member in each]
    visits = bounded(in_order, offloaded_bytes, limit // 2)
    return [Visit(some, sum(map(offloaded_bytes, some))) for some in visits]


def offloaded_bytes(member: Member) -> int:
    """Return how many bytes of a parameter's state are kept on the host, of what one of its ranks has."""
    tensors = [member.state[name] for name in offloaded_entries(member)]
    return sum(-(-tensor.nbytes // number_of_parts(tensor)) for tensor in tensors)


def offloaded_entries(member: Member) -> list[str]:
    """Return which entries of a parameter's state are kept on the host."""
    return [name for name, tensor in member.state.items() if is_away(tensor, member.parameter.device)]


def is_pinned(tensor: Tensor) -> bool:
    """Return whether a device can copy a tensor without the host."""
    return tensor.is_pinned()


def pinned(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor from and to which a device can copy without the host."""
    return tensor.pin_memory()
