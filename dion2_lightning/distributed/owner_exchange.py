"""Submatrices of shared matrices to their owners, and results back to every rank that holds a part.

For each bucket of matrices two all-to-alls where ranks hold parts, and one all-gather where ranks hold replicas,
however many matrices it has. Every rank knows every other rank's rectangle and which slices are sent, so everyone knows
how much everyone sends, and no sizes are exchanged.
"""

from collections.abc import Callable, Iterable, Sequence
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

Receive = Callable[[], list[Tensor]]
"""Waits for what is in flight and returns it."""


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
        return self.own_shape[0] * self.own_shape[1]

    def size_on(self, rank: int) -> int:
        """Return the number of entries that a rank holds."""
        (start, stop), (left, right) = self._rows[rank], self.columns[rank]
        return (stop - start) * (right - left)

    def part(self, submatrix: Tensor, rank: int) -> Tensor:
        """View the part of the (k, m) submatrix that a rank holds."""
        (start, stop), (left, right) = self._rows[rank], self.columns[rank]
        return submatrix.narrow(0, start, stop - start).narrow(1, left, right - left)

    @cached_property
    def _rows(self) -> Sequence[Span]:
        return [(0, self.shape[0])] * len(self.columns) if self.edges is None else self.edges.tolist()


class OwnerExchange:
    """Submatrices of one precision to their owners and back: each method sends, and returns how to receive.

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

        ``group`` are the ranks that hold parts, ``replicas`` those that hold the same parts; None where there are none.
        """
        self._submatrices, self._group, self._replicas = submatrices, group, replicas
        self._nothing = torch.empty(0, dtype=dtype, device=device)
        own_replica = None if replicas is None else replicas.number
        owners = [
            (index, each.owner.rank)
            for index, each in enumerate(submatrices)
            if each.owner.replica in (None, own_replica)
        ]
        size = 1 if group is None else group.size()
        self._by_owner = _by_rank(owners, size)
        self.owned = self._by_owner[0 if group is None else dist.get_rank(group)]
        self._to_owners = [sum(submatrices[index].own_size for index in owned) for owned in self._by_owner]
        self._from_ranks = [sum(submatrices[index].size_on(rank) for index in self.owned) for rank in range(size)]

    def to_owners(self, parts: Sequence[Tensor]) -> Receive:
        """Send this rank's part of every submatrix; receive the whole ones that it owns, in the order of ``owned``."""
        if self._group is None:
            # In row-major order, as what comes from other ranks is.
            return lambda: [parts[index].reshape(-1).view(parts[index].shape) for index in self.owned]
        sent = [parts[index] for owned in self._by_owner for index in owned]
        received = self._all_to_all(sent, self._to_owners, self._from_ranks)

        def receive() -> list[Tensor]:
            submatrices = [self._submatrices[index] for index in self.owned]
            whole = [self._nothing.new_empty(each.shape) for each in submatrices]
            for rank, from_rank in enumerate(received()):
                pieces = torch.split(from_rank, [each.size_on(rank) for each in submatrices])
                for each, submatrix, piece in zip(submatrices, whole, pieces, strict=True):
                    part = each.part(submatrix, rank)
                    part.copy_(piece.view(part.shape))
            return whole

        return receive

    def from_owners(self, results: Sequence[Tensor]) -> Receive:
        """Send every rank its part of the results, given in the order of ``owned``.

        Receive this rank's part of every result of its replica, in the order of the submatrices.
        """
        if self._group is None:
            return lambda: list(results)
        sent = [
            self._submatrices[index].part(result, rank)
            for rank in range(self._group.size())
            for index, result in zip(self.owned, results, strict=True)
        ]
        received = self._all_to_all(sent, self._from_ranks, self._to_owners)

        def receive() -> list[Tensor]:
            parts = {}
            for owned, from_owner in zip(self._by_owner, received(), strict=True):
                pieces = torch.split(from_owner, [self._submatrices[index].own_size for index in owned])
                for index, piece in zip(owned, pieces, strict=True):
                    parts[index] = piece.view(self._submatrices[index].own_shape)
            return [parts[index] for index in sorted(parts)]

        return receive

    def to_replicas(self, receive: Receive) -> Receive:
        """Send this rank's parts to the other replicas, where these share the work; receive those of every result."""
        if self._replicas is None or all(each.owner.replica is None for each in self._submatrices):
            return receive
        position_of = self._replicas.position_of
        sources = [position_of[each.owner.replica or 0] for each in self._submatrices]
        shapes = [each.own_shape for each in self._submatrices]
        return all_gather(receive(), self._replicas.group, sources, shapes, self._nothing)

    def _all_to_all(self, sent: Sequence[Tensor], send: list[int], receive: list[int]) -> Receive:
        """Send and receive as many entries to and from each rank; what is received is split by rank."""
        buffer = torch.cat([self._nothing, *(each.reshape(-1) for each in sent)])
        output = buffer.new_empty(sum(receive))
        work = dist.all_to_all_single(output, buffer, receive, send, group=self._group, async_op=True)
        return lambda: list(torch.split(_after(work, output, buffer), receive))


def all_gather(
    results: Sequence[Tensor],
    group: "ProcessGroup",
    sources: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    nothing: Tensor,
) -> Receive:
    """Send the results that this rank has to all others of the group, in one all-gather, padded to one length.

    ``sources`` and ``shapes`` say of all results which rank of the group has each, and its shape; ``nothing`` is an
    empty tensor of their dtype and device.
    """
    by_source = _by_rank(enumerate(sources), group.size())
    sizes = [rows * columns for rows, columns in shapes]
    width = max(sum(sizes[index] for index in held) for held in by_source)
    padded = nothing.new_zeros(width)
    if results:
        own = torch.cat([result.reshape(-1) for result in results])
        padded.narrow(0, 0, len(own)).copy_(own)
    output = nothing.new_empty(width * len(by_source))
    work = all_gather_single(output, padded, group=group, async_op=True)

    def receive() -> list[Tensor]:
        gathered = _after(work, output, padded)
        parts = {}
        for rank, held in enumerate(by_source):
            start = rank * width
            for index in held:
                parts[index] = gathered.narrow(0, start, sizes[index]).view(shapes[index])
                start += sizes[index]
        return [parts[index] for index in range(len(shapes))]

    return receive


def _after(work: "dist.Work | None", output: Tensor, sent: Tensor) -> Tensor:
    """Wait for a collective and return its output; ``sent`` is here so that what it sends lives until then."""
    assert work is not None
    work.wait()
    return output


def _by_rank(ranks: Iterable[tuple[int, int]], size: int) -> list[list[int]]:
    """Of each of ``size`` ranks what it has, given pairs of what and whose."""
    by_rank: list[list[int]] = [[] for _ in range(size)]
    for index, rank in ranks:
        by_rank[rank].append(index)
    return by_rank
