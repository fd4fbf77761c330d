"""Where mixed precision applies."""

import torch


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Context in which matrix products run in bfloat16, where the configuration wants it.

    Enter it anew for passes with and without gradient: weights that are cast inside stay cached until it ends,
    and a cast that was made without gradient would cut the weight off.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp == "bf16")
