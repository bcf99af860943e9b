"""A twin of offloading for a CPU: its memory is that of host and device, and its streams are as late as they may be.

What a stream copies is copied when another one, or the host, waits for it, and no earlier; until then a copy on the
device is NaN. So a wait that is missing shows in the results. What a GPU's allocator does it does not show.
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


class PresentStream(Stream):
    """The stream that computes: all its work is done at once."""

    def do(self, work: Callable[[], Any]) -> None:
        work()


class SecondDevice(TorchFunctionMode):
    """Put the copies of streams off.

    Attributes:
        streams: All that were made.
        fetched: How many entries were asked for, in the order of the copies to the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.present = PresentStream()
        self.stream: Stream = self.present
        self.streams: list[Stream] = []
        self.fetched: list[int] = []

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if self.stream is self.present or not keywords.get("non_blocking"):
            return function(*arguments, **keywords)
        source = arguments[0]
        if function is Tensor.to:
            copy = torch.full_like(source, math.nan)
            self.fetched.append(source.numel())
            self.stream.do(lambda: copy.copy_(source))
            return copy
        assert function is Tensor.copy_, function
        self.stream.do(lambda: source.copy_(arguments[1]))
        return source

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
    monkeypatch.setattr("dion2_lightning.offload.is_pinned", lambda _: True)
    for name, replaced in (
        ("Stream", device.make_stream),
        ("stream", device.use),
        ("current_stream", lambda _: device.present),
        ("synchronize", device.synchronize),
    ):
        monkeypatch.setattr(torch.cuda, name, replaced)
    with device:
        yield device
