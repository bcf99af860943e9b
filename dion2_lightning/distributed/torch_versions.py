"""What differs between the versions of torch that the package supports, each with the version that brought it."""

from typing import Any

import torch.distributed as dist

__all__ = ["all_gather_single"]

# 2.13 renamed all_gather_into_tensor, and warns of the old name. A torch built without distributed has neither.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
