"""What some matrices bring to a step of Dion, and the lines of its box: one function each.

Every matrix is a (count, long, short) view, oriented by its shape alone: whatever the layout, it is the same matrix.
"""

import math
import warnings
import zlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from dion2_lightning.algorithms.algorithm import Member, StateTensor, StepContext
from dion2_lightning.algorithms.learning_rates import update_scale
from dion2_lightning.algorithms.matrix_update import MatrixUpdate
from dion2_lightning.algorithms.passes import shrink as decay_weights
from dion2_lightning.algorithms.working_memory import pass_bytes
from dion2_lightning.kernels.decay import decayed
from dion2_lightning.kernels.orthonormal_columns import orthonormal_columns, randomized_cholesky_qr, sketch_rows
from dion2_lightning.kernels.precision import sum_dtype
from dion2_lightning.kernels.random_numbers import normals
from dion2_lightning.kernels.rounding import HALF_PRECISION, multiply_add_, store_
from dion2_lightning.kernels.selection import selected_count
from dion2_lightning.lists import bounded, group_by
from dion2_lightning.matrices.layout import Span, held_coordinates, is_dtensor, local, placements_of_matrices
from dion2_lightning.matrices.splits import INPUT_AXIS, OUTPUT_AXIS
from dion2_lightning.matrices.views import Matrices, matrices_of

if TYPE_CHECKING:  # some builds of torch have no process groups
    from torch.distributed import ProcessGroup

EPS: Final = 1e-8
"""Added to the norms of the columns of R."""

FACTOR_COPIES: Final = 4
"""How many copies of P and R there are at once, at most: two, those of the last batch, and what a QR takes inside."""

NOISE: Final = 2.0
"""Columns of R shorter than this times the precision, sqrt(long) and the norm of R are what rounding makes of zero."""

FALLBACK: Final = "rcqr"
"""The key in ``optimizer.fallbacks`` that counts matrices for which randomized Cholesky QR failed."""


@dataclass(eq=False, kw_only=True)
class LowRankUpdate(MatrixUpdate):
    """Matrices of a parameter in a step of Dion: n is the longer axis, m the shorter one, and k the rank r.

    Attributes:
        qr: How P is orthonormalized, see :class:`~dion2_lightning.algorithms.dion.DionSettings`.
        replicas: The ranks that hold replicas, each with a gradient and a momentum of its own; None where gradients are
            averaged, or there are no others.
    """

    qr: str
    replicas: "ProcessGroup | None"

    @classmethod
    def read(cls, member: Member, context: StepContext) -> "list[LowRankUpdate]":
        """Read a parameter, its state and its settings, as they are now: its matrices, block by block."""
        group, updates = member.group, list[LowRankUpdate]()
        replicas = context.process_group if is_compressed(member.parameter, group) else None
        lr, weight_decay = context.number(group["lr"]), context.number(group["weight_decay"])
        for matrices in matrices_of(member.parameter, group):
            axis, rank, entry = long_axis(matrices), rank_of(matrices, group), entry_of(matrices)
            if member.state[entry].shape[-1] != rank:
                raise ValueError(
                    f"{member.label}: rank_fraction and rank_multiple_of ask for rank {rank}, and its state has rank "
                    f"{member.state[entry].shape[-1]}; set them back, or delete {entry!r} of the parameter in "
                    "optimizer.state, which begins anew"
                )
            scale = update_scale(
                matrices.shape, matrices.shape[1 - axis], rank, group["adjust_lr_fn"], group["scale_lr_by_fraction"]
            )
            found = MatrixUpdate.of(
                member,
                context,
                matrices=matrices,
                axis=axis,
                selected=rank,
                momentum_factor=context.number(group["momentum"]),
                step_size=lr * scale,
                shrink=1.0 - lr * weight_decay,
                dtype=local(member.state["momentum"]).dtype,
            )
            updates += [cls(**vars(each), qr=group["qr"], replicas=replicas) for each in found]
        return updates

    @property
    def taps(self) -> int:
        """1, as no slices are selected."""
        return 1

    @property
    def k(self) -> int:
        """The rank r, for the same reason."""
        return self.selected

    @property
    def is_scattered(self) -> bool:
        """False: a product is of a whole matrix."""
        return False

    @property
    def is_in_pieces(self) -> bool:
        """False, for the same reason."""
        return False

    @property
    def is_fused(self) -> bool:
        """False: the products of Dion are torch's."""
        return False

    def _read(self, tensor: Tensor) -> Tensor:
        if self.part.is_apart:  # products of a view with gaps would copy it each time
            return self.matrices.slices(self.part.copy(tensor), self.axis)
        return super()._read(tensor)

    def is_view(self, whole: Tensor) -> bool:
        """Return whether what is read out of a tensor, such as the parameter, is a view of it."""
        return not self.part.is_apart and super().is_view(whole)

    @property
    def state_knows_taps(self) -> bool:
        """Whether Q has a row for each tap."""
        return self.matrices.taps_along(1 - self.axis) > 1

    @property
    def whole_q(self) -> Tensor:
        """What this rank has of Q, (count, short or fewer, r): all rows where the parameter is split, else its own."""
        q = local(self.state[entry_of(self.matrices)])
        stack = q if q.ndim == 3 else q.unsqueeze(0)
        return stack if self.part.count is None else stack.narrow(0, self.part.first, self.part.count)

    @property
    def q(self) -> Tensor:
        """Q, this rank's part (count, own short, r), updated in place."""
        if not self.q_is_whole:
            return self.whole_q
        start, stop = self.own_columns
        return self.whole_q.narrow(1, start, stop - start)

    @property
    def q_is_whole(self) -> bool:
        """Whether every rank has all rows of Q, and works on its own."""
        return self.layout.group is not None and not _is_spread_like_weight(self.parameter, self.matrices)

    def sharing(self, share_replicas: bool | None) -> "tuple[ProcessGroup | None, ...]":
        """Return the groups of ranks with which this one takes the step; compressed ones go by themselves."""
        if self.replicas is None:
            return super().sharing(share_replicas)
        return self.layout.group, None, self.replicas

    @property
    def working_bytes(self) -> int:
        """Working memory of one matrix: its factors P and R, and copies of X, G and M where it is apart.

        It is the same on every rank, also where what one of them holds is not apart.
        """
        factors = self.rank * (self.slices + self.entries) * self.dtype.itemsize * FACTOR_COPIES
        if self.matrices.block is None or not self.matrices.block.is_apart:
            return factors
        return factors + self.slices * self.entries * (self.dtype.itemsize + 2 * self.parameter.dtype.itemsize)

    @property
    def rank(self) -> int:
        """The rank r of the update."""
        return self.k

    @property
    def own_rows(self) -> Span:
        """Which of the long rows this rank holds."""
        return self.held[self.layout.own_rank]

    @property
    def own_columns(self) -> Span:
        """Which of the short columns this rank holds."""
        return self.columns[self.layout.own_rank]

    @property
    def counts_columns(self) -> bool:
        """Whether this rank is the first of those that hold its short columns, so that a sum counts them once."""
        return self.columns.index(self.own_columns) == self.layout.own_rank

    @property
    def randomized_pays(self) -> bool:
        """Whether a sketch of P is smaller than P."""
        return sketch_rows(self.rank) < self.slices

    @property
    def left_is_whole(self) -> bool:
        """Whether all ranks get all of P: it is a sum over them, qr is "qr", or a sketch is no smaller."""
        return not self.is_split or not self.columns.are_equal or self.qr == "qr" or not self.randomized_pays


def long_axis(matrices: Matrices) -> int:
    """Return the axis of (out, in) whose slices are rows here: the longer one, the output axis at a tie."""
    return OUTPUT_AXIS if matrices.out_size >= matrices.in_size else INPUT_AXIS


def rank_of(matrices: Matrices, group: Mapping[str, Any]) -> int:
    """Return r = ceil(rank_fraction short), rounded up to a multiple of rank_multiple_of, at most short."""
    short, multiple = min(matrices.shape), int(group["rank_multiple_of"])
    return min(short, multiple * math.ceil(selected_count(short, group["rank_fraction"]) / multiple))


def entry_of(matrices: Matrices) -> str:
    """Return under which name the state has Q: ``"Q"``, or ``"Q[k]"`` for block k."""
    return f"Q[{matrices.name}]" if matrices.block is not None else "Q"


def is_compressed(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Return whether replicas average P and R, which have fewer bytes than the gradient they would average else."""
    if group["sync"] != "compressed":
        return False
    blocks = matrices_of(parameter, group)
    entries = sum(block.count * sum(block.shape) * rank_of(block, group) for block in blocks)
    return entries * state_dtype(parameter).itemsize < parameter.numel() * parameter.dtype.itemsize


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Return the precision of momentum and Q, and so of P and R."""
    return torch.promote_types(parameter.dtype, torch.float32)


def right_factor(parameter: Any, matrices: Matrices, group: Mapping[str, Any]) -> StateTensor:
    """Return the state Q: shape (short, r), of several matrices (count, short, r).

    It is spread over ranks as the shorter axis is, where placements can say so; else every rank has all rows.
    """
    sizes = min(matrices.shape), rank_of(matrices, group)
    shape = (matrices.count, *sizes) if matrices.is_stack or matrices.count > 1 else sizes
    if _is_spread_like_weight(parameter, matrices):
        placements = _right_placements(parameter, matrices)
    else:
        placements = placements_of_matrices(parameter, is_stack=matrices.is_stack)
    fill = partial(_fill_with_normals, group["rounding_seed"], matrices.name)
    return StateTensor(shape, state_dtype(parameter), parameter.device, placements, fill)


def _is_spread_like_weight(parameter: Any, matrices: Matrices) -> bool:
    """Whether ranks hold the rows of Q as they hold the shorter axis of its matrices, as placements can say.

    Not of a block, and not of kernels where ranks hold unequal numbers of channels, each with all its taps.
    """
    if matrices.block is not None:
        return False
    if not is_dtensor(parameter) or not matrices.is_kernel or not matrices.slices_are_rows(long_axis(matrices)):
        return True
    sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    ranks = math.prod(size for placement, size in sizes if not placement.is_replicate() and placement.dim == 1)
    return bool(parameter.shape[1] % ranks == 0)


def _right_placements(parameter: Any, matrices: Matrices) -> tuple[Any, ...] | None:
    """The parameter's placements, as far as they are of the shorter axis or of the axis that counts matrices."""
    if not is_dtensor(parameter):
        return None
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    rows = 1 if matrices.is_stack else 0
    columns = rows + 1
    short = columns if matrices.slices_are_rows(long_axis(matrices)) else rows

    def of_right_factor(placement: Any) -> Any:
        if placement.is_replicate() or placement.dim not in {short, *range(rows)}:
            return Replicate()
        dim = rows if placement.dim == short else placement.dim
        split_factor = getattr(placement, "split_factor", None)
        return Shard(dim) if split_factor is None else _StridedShard(dim, split_factor=split_factor)

    return tuple(of_right_factor(each) for each in parameter.placements)


def _fill_with_normals(seed: int, block: str, q: Tensor, name: str) -> None:
    """Q starts as standard normals, a function of the seed, the name and the place in Q alone."""
    part, name = local(q), f"{name}[{block}]" if block else name
    part.copy_(normals(*held_coordinates(q), zlib.crc32(f"Q {seed} {name}".encode())).view(part.shape))


def batches(updates: Sequence[LowRankUpdate], context: StepContext) -> Iterator[list[LowRankUpdate]]:
    """Group updates whose P can be orthonormalized together, as many at a time as half the working memory allows.

    The other half is for the weights, see :func:`_move`. A stack of matrices is taken as a whole.
    """

    def key(update: LowRankUpdate) -> Hashable:
        # Of what is the same on every rank: ranks that share matrices form the same batches.
        shape = update.slices, update.entries, update.held, update.columns, update.q_is_whole
        momentum = local(update.state["momentum"])
        return shape, update.rank, update.qr, momentum.device, momentum.dtype

    for batch in group_by(updates, key).values():
        yield from bounded(batch, lambda update: update.count * update.working_bytes, context.working_memory // 2)


def left_products(batch: Sequence[LowRankUpdate]) -> Tensor:
    """B Q, one update after the other: (counts, long, r). B is read where it is, never copied."""
    return _products([(update.momentum, update.q) for update in batch])


def right_products(batch: Sequence[LowRankUpdate], left: Tensor) -> Tensor:
    """R <- B^T P, one update after the other: (counts, short, r)."""
    parts = left.split([update.count for update in batch])
    return _products([(update.momentum.mT, part) for update, part in zip(batch, parts, strict=True)])


def _products(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Products of stacks, one after the other. Autocast rounds none that is written to where it is told."""
    first, second = factors[0]
    products = second.new_empty(sum(len(each) for each, _ in factors), first.shape[1], second.shape[2])
    for (one, other), product in zip(factors, products.split([len(each) for each, _ in factors]), strict=True):
        torch.bmm(one, other, out=product)
    return products


def orthonormal(left: Tensor, update: LowRankUpdate, context: StepContext) -> Tensor:
    """P <- orth(B Q), for whole matrices (batch, long, r); ``update`` is one of those they belong to."""
    if update.qr != "rcqr" or not update.randomized_pays:
        return orthonormal_columns(left)
    result, failed = randomized_cholesky_qr(left)
    if failed.any():
        count_failures(failed, context)
        result[failed] = orthonormal_columns(left[failed])
    return result


def count_failures(failed: Tensor, context: StepContext) -> None:
    """Count for which matrices of a batch an exact QR takes the place of randomized Cholesky QR, and warn."""
    context.fallbacks[FALLBACK] += int(failed.sum())
    warnings.warn(
        "a randomized Cholesky QR has failed and an exact QR took its place: a momentum has a lower rank than its "
        f'update, or holds NaN. optimizer.fallbacks["{FALLBACK}"] counts the matrices; if it grows at every step, '
        'qr="qr" or a smaller rank_fraction saves the attempts',
        stacklevel=2,
    )


def column_norms(right: Tensor) -> Tensor:
    """The norms of the columns of R, (batch, 1, r), in float64 where there is one."""
    norms: Tensor = torch.linalg.vector_norm(right, dim=1, keepdim=True, dtype=sum_dtype(right.device))
    return norms


def present_columns(norms: Tensor, update: LowRankUpdate) -> Tensor:
    """Return which columns of R are more than what rounding makes of zero, given their norms (batch, 1, r)."""
    floor = NOISE * torch.finfo(update.dtype).eps * math.sqrt(update.slices)
    is_present: Tensor = norms > floor * torch.linalg.vector_norm(norms, dim=-1, keepdim=True)
    return is_present


def apply(
    batch: Sequence[LowRankUpdate],
    left: Tensor,
    right: Tensor,
    norms: Tensor,
    own_right: Tensor,
    context: StepContext,
    whole_right: Tensor | None = None,
) -> None:
    """M <- B - (1 - mu) P R^T, Q <- the columns of R over their norms, and X <- (1 - lr decay) X - lr scale P Q^T.

    A column of R that is zero, up to rounding, is a direction that B does not have: nothing is applied along it, and
    Q keeps its own column, which finds another one when B has more.

    Args:
        batch: The updates.
        left: P, this rank's rows, one update after the other.
        right: R, this rank's rows.
        norms: Of the columns of the whole R, (batch, 1, r).
        own_right: R of this replica's own B, which is what M loses; R itself, unless that is a mean over replicas.
        context: Of the step.
        whole_right: All rows of R, where this rank has all of Q (default: None, they are ``right``).
    """
    is_present = present_columns(norms, batch[0])
    decay_weights(batch)
    counts = [update.count for update in batch]
    everything = right if whole_right is None else whole_right
    parts = (each.split(counts) for each in (left, own_right, right, everything, is_present, norms))
    for update, p, r, its_right, its_whole, present, its_norms in zip(batch, *parts, strict=True):
        _add_product(update.momentum, p, r * update.number(update.momentum_factor - 1.0, 0.0, r))
        is_taken = present if update.own_gate is None else present & update.own_gate.is_open
        q = update.whole_q
        q.copy_(torch.where(is_taken, _columns(its_whole, its_norms, present), q))
        _move(update, p, _columns(its_right, its_norms, present), context)
        update.write_back()


def _columns(right: Tensor, norms: Tensor, present: Tensor) -> Tensor:
    """The columns of R over their norms, zero where there are none."""
    return torch.where(present, right / (norms + EPS).to(right.dtype), 0)


def _move(update: LowRankUpdate, left: Tensor, right: Tensor, context: StepContext) -> None:
    """X <- X - lr scale P Q^T, after X <- (1 - lr decay) X; both at once in half precision, and where it is cautious.

    Half precision is then rounded once, and the decay knows P Q^T.
    """
    if update.parameter.dtype not in HALF_PRECISION and not update.is_cautious:
        right = right * update.number(-update.step_size, 0.0, right)
        if update.part.is_apart and "weight" not in vars(update):  # then it need not be copied
            rows, columns = (left, right) if update.matrices.slices_are_rows(update.axis) else (right, left)
            update.part.add_product(local(update.parameter), rows, columns)
        else:
            _add_product(update.weight, left, right)
        return
    weight, bits = update.weight, update.bits.get("apply")
    size, first = max(1, context.working_memory // 2 // max(1, weight.shape[1:].numel() * pass_bytes(weight.dtype))), 0
    for part, p, q in zip(weight.split(size), left.split(size), right.split(size), strict=True):
        its_bits = None if bits is None else bits.of_matrices(first, len(part))
        factor, step = update.number(update.shrink, 1.0, part, first), update.number(-update.step_size, 0.0, q, first)
        first += len(part)
        if not update.is_cautious:
            multiply_add_(part, factor, _products([(p, (q * step).mT)]), its_bits)
            continue
        direction = _products([(p, q.mT)])
        new = decayed(part, direction, factor).add_(direction.mul_(step))
        if part.dtype in HALF_PRECISION:
            store_(part, new, its_bits)
        else:
            part.copy_(new)


def _add_product(matrices: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left right^T to (count, n, m) matrices in place, in their memory order."""
    if matrices.stride(-1) != 1:
        matrices, left, right = matrices.mT, right, left
    matrices.baddbmm_(left, right.mT)
