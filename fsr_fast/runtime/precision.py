"""Where mixed precision applies."""

import torch


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Context in which matrix products run in bfloat16, where `run.amp` wants it.

    Args:
        device: of the passes.
        amp: `auto` (bfloat16 on a GPU alone), `off` or `bf16`.

    Enter it anew for passes with and without gradient: weights that are cast inside stay cached until it ends,
    and a cast that was made without gradient would cut the weight off.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_half(device, amp))


def uses_half(device: torch.device, amp: str) -> bool:
    """Tell whether matrix products run in bfloat16, as `autocast` decides it."""
    return amp == "bf16" or (amp == "auto" and device.type == "cuda")
