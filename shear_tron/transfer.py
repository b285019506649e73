"""From the host to a device, without a wait of the host."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. To a GPU it goes through pinned memory, which the host need not wait for; a tensor that
    is there already is itself."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
