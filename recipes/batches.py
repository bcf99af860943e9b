"""Batches of one run in an order that is fixed beforehand, for Lightning, which goes on in the middle of it."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Sampler


class RemainingBatches(Sampler[list[int]]):
    """Batches of row numbers, each given once.

    Args:
        batches: Of a whole run.

    Attributes:
        position: How many have been given.
    """

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]


class TrainingLoader(DataLoader[Any]):
    """The batches of one run. Lightning keeps the position in checkpoints, so a resumed run sees only what is left.

    Args:
        rows: Anything with numbered rows.
        order: Which rows make the batches.
        collate: Makes tensors of some rows.
    """

    def __init__(self, rows: Any, order: RemainingBatches, collate: Callable[[list[Any]], dict[str, Tensor]]) -> None:
        self.order = order
        super().__init__(rows, batch_sampler=order, collate_fn=collate)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.order.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.order.position = state["position"]
