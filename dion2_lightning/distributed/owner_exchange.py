"""Submatrices of shared matrices to their owners, and results back to every rank that holds a part.

For each precision two all-to-alls where ranks hold parts, and one all-gather where ranks hold replicas, however many
matrices there are. Every rank knows every other rank's rectangle and which slices are sent, so everyone knows how much
everyone sends, and no sizes are exchanged.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from dion2_lightning.distributed.owners import Owner
from dion2_lightning.distributed.torch_versions import all_gather_single
from dion2_lightning.matrices.layout import Replicas, Span

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class SharedSubmatrix:
    """A (k, m) submatrix of which every rank of a group holds a rectangle.

    Attributes:
        owner: Which rank works on it.
        shape: (k, m), of the whole submatrix.
        own_shape: Of the part that this rank holds.
        edges: By rank, where the slices that it holds start and stop among the k, on the host (ranks, 2); None where
            every rank holds a part of all.
        columns: By rank, which of the m entries of each slice it holds.
    """

    owner: Owner
    shape: tuple[int, int]
    own_shape: tuple[int, int]
    edges: Tensor | None
    columns: Sequence[Span]

    @property
    def own_size(self) -> int:
        """Entries that this rank holds."""
        rows, columns = self.own_shape
        return rows * columns

    def size_on(self, rank: int) -> int:
        """Return the number of entries that a rank holds."""
        (start, stop), (left, right) = self._rows(rank), self.columns[rank]
        return (stop - start) * (right - left)

    def part(self, submatrix: Tensor, rank: int) -> Tensor:
        """View the part of the (k, m) submatrix that a rank holds."""
        (start, stop), (left, right) = self._rows(rank), self.columns[rank]
        return submatrix.narrow(0, start, stop - start).narrow(1, left, right - left)

    def _rows(self, rank: int) -> Span:
        return (0, self.shape[0]) if self.edges is None else self._all_rows[rank]

    @cached_property
    def _all_rows(self) -> list[Span]:
        assert self.edges is not None
        return [(start, stop) for start, stop in self.edges.tolist()]


class OwnerRoundTrip:
    """Submatrices of one precision on their way to their owners and back.

    The calls follow each other: :meth:`send`, :meth:`receive`, :meth:`send_back`, :meth:`send_to_replicas`,
    :meth:`results`. Between two of them messages are in flight.

    Attributes:
        owned: Which of the submatrices this rank works on.
    """

    def __init__(
        self,
        submatrices: Sequence[SharedSubmatrix],
        group: "ProcessGroup | None",
        replicas: Replicas | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Plan it, the same on every rank.

        Args:
            submatrices: In the same order on every rank.
            group: The ranks that hold parts of each; None where every rank holds all of them whole.
            replicas: The ranks that hold the same parts; None where no others do.
            dtype: In which they travel.
            device: Where they are.
        """
        this_replica = None if replicas is None else replicas.number
        self._here = [index for index, each in enumerate(submatrices) if each.owner.replica in (None, this_replica)]
        self._to_owners = self._to_replicas = None
        self.owned = self._here
        if group is not None:
            self._to_owners = _OwnerAllToAll(group, [submatrices[index] for index in self._here], dtype, device)
            self.owned = [self._here[index] for index in self._to_owners.owned]
        if replicas is not None and any(each.owner.replica is not None for each in submatrices):
            position_of = replicas.position_of
            sources = [position_of[each.owner.replica or 0] for each in submatrices]
            shapes = [each.own_shape for each in submatrices]
            self._to_replicas = ReplicaAllGather(replicas.group, sources, shapes, dtype, device)
        self._parts: list[Tensor] = []

    def send(self, parts: Iterable[Tensor]) -> None:
        """Send this rank's part of every submatrix to its owner.

        Args:
            parts: One for each submatrix, all of the precision.
        """
        here = set(self._here)
        self._parts = [part for index, part in enumerate(parts) if index in here]
        if self._to_owners is not None:
            self._to_owners.send(self._parts)

    def receive(self) -> list[Tensor]:
        """Return the whole submatrices that this rank owns, in the order of ``owned``."""
        return self._parts if self._to_owners is None else self._to_owners.receive()

    def send_back(self, results: Sequence[Tensor]) -> None:
        """Send every rank its part of the results, given in the order of ``owned``."""
        self._parts = list(results)
        if self._to_owners is not None:
            self._to_owners.send_back(results)
        elif self._to_replicas is not None:
            self._to_replicas.send(results)

    def send_to_replicas(self) -> None:
        """Take this rank's part of every result of this replica, and send it to the other replicas."""
        if self._to_owners is not None:
            self._parts = self._to_owners.receive_back()
            if self._to_replicas is not None:
                self._to_replicas.send(self._parts)

    def results(self) -> list[Tensor]:
        """Return this rank's part of every result, in the order of the submatrices."""
        return self._parts if self._to_replicas is None else self._to_replicas.receive()


class _OwnerAllToAll:
    """Submatrices to their owners and back: an all-to-all each way."""

    def __init__(
        self, group: "ProcessGroup", submatrices: Sequence[SharedSubmatrix], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._group, self._submatrices = group, submatrices
        self._nothing = torch.empty(0, dtype=dtype, device=device)
        self._rank, ranks = dist.get_rank(group), range(group.size())
        self._by_owner = _by_rank([each.owner.rank for each in submatrices], group.size())
        self.owned = self._by_owner[self._rank]
        self._to_owners = [sum(submatrices[index].own_size for index in owned) for owned in self._by_owner]
        self._from_ranks = [sum(submatrices[index].size_on(rank) for index in self.owned) for rank in ranks]

    def send(self, parts: Sequence[Tensor]) -> None:
        """Send this rank's part of every submatrix to its owner.

        Args:
            parts: One for each submatrix.
        """
        ordered = [parts[index].reshape(-1) for owned in self._by_owner for index in owned]
        self._start(torch.cat([self._nothing, *ordered]), self._from_ranks, self._to_owners)

    def receive(self) -> list[Tensor]:
        """Return the whole submatrices that this rank owns, in the order of ``owned``."""
        by_rank = torch.split(self._finish(), self._from_ranks)
        whole = [self._nothing.new_empty(self._submatrices[index].shape) for index in self.owned]
        for rank, received in enumerate(by_rank):
            pieces = torch.split(received, [self._submatrices[index].size_on(rank) for index in self.owned])
            for index, submatrix, piece in zip(self.owned, whole, pieces, strict=True):
                part = self._submatrices[index].part(submatrix, rank)
                part.copy_(piece.view(part.shape))
        return whole

    def send_back(self, results: Sequence[Tensor]) -> None:
        """Send every rank its part of the results, given in the order of ``owned``."""
        ordered = [
            self._submatrices[index].part(result, rank).reshape(-1)
            for rank in range(self._group.size())
            for index, result in zip(self.owned, results, strict=True)
        ]
        self._start(torch.cat([self._nothing, *ordered]), self._to_owners, self._from_ranks)

    def receive_back(self) -> list[Tensor]:
        """Return this rank's part of every result, in the order of the submatrices."""
        parts = [self._nothing] * len(self._submatrices)
        for owned, received in zip(self._by_owner, torch.split(self._finish(), self._to_owners), strict=True):
            pieces = torch.split(received, [self._submatrices[index].own_size for index in owned])
            for index, piece in zip(owned, pieces, strict=True):
                parts[index] = piece.view(self._submatrices[index].own_shape)
        return parts

    def _start(self, sent: Tensor, receive: list[int], send: list[int]) -> None:
        self._sent = sent  # must live until the collective is over
        self._output = sent.new_empty(sum(receive))
        self._work = dist.all_to_all_single(self._output, sent, receive, send, group=self._group, async_op=True)

    def _finish(self) -> Tensor:
        assert self._work is not None
        self._work.wait()
        return self._output


class ReplicaAllGather:
    """Results from the rank that has each to all ranks of a group: one all-gather."""

    def __init__(
        self,
        group: "ProcessGroup",
        sources: Sequence[int],
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Plan it from the rank that has each result, and the shape of each."""
        self._group, self._shapes, self._dtype, self._device = group, shapes, dtype, device
        self._by_source = _by_rank(sources, group.size())

    def send(self, results: Sequence[Tensor]) -> None:
        """Send the results that this rank has, in their order, to all others; short ones are padded."""
        sizes = [sum(self._size(index) for index in held) for held in self._by_source]
        padded = torch.zeros(max(sizes), dtype=self._dtype, device=self._device)
        if results:
            own = torch.cat([result.reshape(-1) for result in results])
            padded.narrow(0, 0, len(own)).copy_(own)
        self._sent, self._output = padded, padded.new_empty(len(padded) * len(sizes))
        self._work = all_gather_single(self._output, padded, group=self._group, async_op=True)

    def receive(self) -> list[Tensor]:
        """Return all results, in order."""
        assert self._work is not None
        self._work.wait()
        results: list[Tensor] = [self._output] * len(self._shapes)
        width = len(self._sent)
        for rank, held in enumerate(self._by_source):
            start = rank * width
            for index in held:
                results[index] = self._output.narrow(0, start, self._size(index)).view(self._shapes[index])
                start += self._size(index)
        return results

    def _size(self, index: int) -> int:
        rows, columns = self._shapes[index]
        return rows * columns


def _by_rank(ranks: Sequence[int], size: int) -> list[list[int]]:
    """The indices of what each rank has, given the rank of each."""
    by_rank: list[list[int]] = [[] for _ in range(size)]
    for index, rank in enumerate(ranks):
        by_rank[rank].append(index)
    return by_rank
