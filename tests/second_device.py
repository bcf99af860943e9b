"""A twin of offloading for a CPU: its memory is that of host and device, and its streams are as late as they may be.

What a stream copies is copied when another one, or the host, waits for it, and no earlier; until then a copy on the
device is NaN. What it copies to the host before it has waited for all that was computed is NaN, too. So a wait that is
missing shows in the results. What a GPU's allocator does it does not show.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Stream:
    """A stream of copies that runs up to what somebody waits for."""

    def __init__(self, *_: Any) -> None:
        self._work: deque[Callable[[], Any]] = deque()
        self._done = self._asked = 0
        self.has_waited_for = 0
        """How many operations of the stream that computes come before what is done from now on."""

    def do(self, work: Callable[[], Any]) -> None:
        self._work.append(work)
        self._asked += 1

    def record_event(self) -> Callable[[], None]:
        """Return what waits for all work so far."""
        asked = self._asked

        def wait() -> None:
            while self._done < asked:
                self._done += 1
                self._work.popleft()()

        return wait

    def wait_event(self, event: Callable[[], None]) -> None:
        self.do(event)

    def wait_stream(self, other: "Stream") -> None:
        self.do(other.record_event())
        if isinstance(other, PresentStream):
            self.has_waited_for = other.launched


class PresentStream(Stream):
    """The stream that computes: all its work is done at once."""

    launched = 0
    """How many operations, at least."""

    def do(self, work: Callable[[], Any]) -> None:
        work()


class SecondDevice(TorchFunctionMode):
    """Put the copies of streams off.

    Attributes:
        streams: All that were made.
        fetched: How many entries were asked for, in the order of the copies to the device.
        pinned: The memory of the host that copies need not wait for, by its address.
    """

    def __init__(self) -> None:
        super().__init__()
        self.present = PresentStream()
        self.stream: Stream = self.present
        self.streams: list[Stream] = []
        self.fetched: list[int] = []
        self.pinned: dict[int, torch.UntypedStorage] = {}

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if self.stream is self.present:
            self.present.launched += 1
            return function(*arguments, **keywords)
        if not keywords.get("non_blocking"):
            return function(*arguments, **keywords)
        source = arguments[0]
        assert self.is_pinned(source)
        if function is Tensor.to:
            copy = torch.full_like(source, math.nan)
            self.fetched.append(source.numel())
            self.stream.do(lambda: copy.copy_(source))
            return copy
        assert function is Tensor.copy_, function
        is_computed = self.stream.has_waited_for == self.present.launched
        self.stream.do(lambda: source.copy_(arguments[1]) if is_computed else source.fill_(math.nan))
        return source

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def pin(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        storage = copy.untyped_storage()
        self.pinned[storage.data_ptr()] = storage
        return copy

    def make_stream(self, *_: Any) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        self.stream = stream
        yield
        self.stream = self.present

    def synchronize(self, *_: Any) -> None:
        for stream in self.streams:
            stream.record_event()()


@contextlib.contextmanager
def offloading_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SecondDevice]:
    """Have optimizers with ``offload="cpu"`` move the state of parameters on the CPU, as from one memory to another."""
    device = SecondDevice()
    monkeypatch.setattr("dion2_lightning.offload.is_away", lambda tensor, _: tensor.ndim > 0)
    monkeypatch.setattr("dion2_lightning.offload.is_pinned", device.is_pinned)
    monkeypatch.setattr("dion2_lightning.offload.pinned", device.pin)
    for name, replaced in (
        ("Stream", device.make_stream),
        ("stream", device.use),
        ("current_stream", lambda _: device.present),
        ("synchronize", device.synchronize),
    ):
        monkeypatch.setattr(torch.cuda, name, replaced)
    with device:
        yield device
