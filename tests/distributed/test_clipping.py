"""Clipping where gradients lie on different meshes, and beside them, against one process."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dion2_lightning import clip_grad_norm_
from tests.distributed.ranks import run_on_ranks
from tests.distributed.test_layouts import part_of, place


def check_mixed_meshes() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    placed = [
        (mesh, (_StridedShard(0, split_factor=2), Shard(0))),
        (mesh, (Shard(0), Shard(1))),
        (mesh, (Replicate(), Shard(0))),
        (mesh["data"], (Shard(0),)),
        (mesh["tensor"], (Shard(1),)),
        (mesh["data"], (Replicate(),)),
        (None, ()),
    ]
    for norm_type in (2.0, float("inf")):
        generator = torch.Generator().manual_seed(0)
        whole, parts = [], []
        for its_mesh, placements in placed:
            value = torch.randn(7, 5, generator=generator)
            whole.append(nn.Parameter(torch.zeros(7, 5)))
            whole[-1].grad = value
            zeros = torch.zeros(7, 5) if its_mesh is None else place(torch.zeros(7, 5), its_mesh, placements)
            parts.append(nn.Parameter(zeros))
            parts[-1].grad = value.clone() if its_mesh is None else place(value, its_mesh, placements)
        summed = torch.randn(7, 5, generator=generator)  # comes as two parts that are still to be summed up
        whole.append(nn.Parameter(torch.zeros(7, 5)))
        whole[-1].grad = summed
        parts.append(nn.Parameter(place(torch.zeros(7, 5), mesh["tensor"], (Replicate(),))))
        parts[-1].grad = DTensor.from_local(summed / 2, mesh["tensor"], (Partial(),), run_check=False)
        whole.append(nn.Parameter(torch.zeros(7, 5)))
        whole[-1].grad = summed.clone()
        parts.append(nn.Parameter(place(torch.zeros(7, 5), mesh, (Replicate(), Replicate()))))
        parts[-1].grad = DTensor.from_local(summed / 4, mesh, (Partial(), Partial()), run_check=False)
        expected = nn.utils.clip_grad_norm_(whole, 0.7, norm_type)
        norm = clip_grad_norm_(parts, 0.7, norm_type)
        torch.testing.assert_close(norm, expected)
        for a, b in zip(whole, parts, strict=True):
            found = b.grad
            if isinstance(found, DTensor):
                found = found.redistribute(placements=b.placements).to_local()
            torch.testing.assert_close(found, part_of(a.grad, b))


def test_gradients_on_different_meshes() -> None:
    run_on_ranks(4, check_mixed_meshes)
