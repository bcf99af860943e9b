"""What differs between the versions of torch that the package supports, each with the version that brought it."""

from typing import Any

import torch.distributed as dist

__all__ = ["all_gather_single", "reduce_scatter_single"]

# 2.13 renamed these, and warns of the old names. A torch built without distributed has neither.
all_gather_single: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))
