"""Small numbers from the host to a device, without waiting for what the device still has to do."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Sequence[Any] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these values (a list, nested lists or a tensor in host memory) on the device.

    A plain `torch.tensor(values, device="cuda")` returns only when everything queued before it has run; pinned memory,
    which torch keeps until it has been read, lets the host go on.
    """
    host = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda" and host.numel():
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
