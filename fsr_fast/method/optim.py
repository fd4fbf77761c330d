"""AdamW with the method's four parameter groups."""

import torch

from fsr_fast.config import OptimConfig
from fsr_fast.models import Network

NO_DECAY = ("encoder.pos_embed", "encoder.cls_token", "encoder.mask_token", "encoder.prefix_tokens")


def build_optimiser(network: Network, config: OptimConfig) -> torch.optim.AdamW:
    """Group the parameters and build AdamW.

    Vectors, biases, position embedding, class and mask token have no weight decay; everything outside the encoder
    learns `head_factor` times as fast. Source: paper, implementation details.
    """
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        head = not name.startswith("encoder.")
        decay = parameter.ndim > 1 and name not in NO_DECAY
        groups.setdefault((head, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": config.learning_rate * (config.head_factor if head else 1.0),
                "weight_decay": config.weight_decay if decay else 0.0,
            }
            for (head, decay), parameters in sorted(groups.items())
        ],
        betas=config.betas,
        eps=1e-8,
        fused=True,
    )


def set_learning_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's rate to `factor` times its base rate."""
    for group in optimiser.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def fill_missing_gradients(optimiser: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """Set a zero gradient on every parameter that no loss has reached, and return all parameters.

    A stage that is skipped because its weight is 0 then moves its parameters as if it had been computed:
    weight decay and AdamW's moments continue.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return parameters
