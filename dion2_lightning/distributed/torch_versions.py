"""What differs between the versions of torch that the package supports, each with the version that brought it."""

import torch.distributed as dist

__all__ = ["all_gather_single"]

if dist.is_available():
    # 2.13 renamed all_gather_into_tensor, and warns of the old name.
    all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
