"""Non-finite steps: detected and skipped on the device, without a host sync."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fsr_fast.errors import UserError
from fsr_fast.runtime.distributed import sum_over_ranks

LIMIT = 3
"""Bad iterations in a row after which a run stops."""


class NonFiniteGuard:
    """Leaves everything unchanged in an iteration whose loss or gradient is not finite in some process.

    AdamW's fused kernel reads `found_inf`: weights, moments and step counts stay. `judge` restores the centres, and its
    result tells the teacher to stay. After `LIMIT` bad iterations in a row all later ones are skipped, too, until
    `counts` is read: the last good state is then still there.

    Args:
        optimiser: with fused kernels.
        centres: buffers that the forward pass moves.
    """

    def __init__(self, optimiser: torch.optim.Optimizer, centres: Iterable[Tensor]) -> None:
        self._optimiser = optimiser
        self._centres = list(centres)
        self._held: list[Tensor] = []
        self.counts = torch.zeros(2, device=self._centres[0].device)
        """Bad iterations in a row, and of the whole run."""

    def hold(self) -> None:
        """Remember the centres; call it before the forward pass."""
        self._held = [centre.clone() for centre in self._centres]

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Decide on this iteration; call it between the backward pass and the optimiser's step.

        Args:
            loss: scalar, of this process.
            norm: scalar, of the whole gradient.

        Returns:
            Scalar, bool, on the device: whether the step is skipped. The same in all processes.
        """
        sound = torch.isfinite(torch.stack([loss.detach(), norm])).all()
        bad = (sum_over_ranks((~sound).float()) > 0) | (self.counts[0] >= LIMIT)
        self.counts.add_(bad)
        self.counts[0].mul_(bad)
        for centre, held in zip(self._centres, self._held, strict=True):
            torch.where(bad, held, centre, out=centre)
        self._optimiser.found_inf = bad.float()  # type: ignore[attr-defined]
        return bad

    def state_dict(self) -> dict[str, Tensor]:
        """Return the number of skipped iterations."""
        return {"skipped": self.counts[1]}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the number of skipped iterations; the count in a row restarts at 0."""
        self.counts.copy_(torch.stack([torch.zeros(()), state["skipped"]]))


def gradient_norm(parameters: Iterable[torch.nn.Parameter], limit: float | None) -> Tensor:
    """Return the norm of the whole gradient before clipping; clip it to `limit`, if one is given."""
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def not_finite(iteration: int, output: Path) -> UserError:
    """Build the error that ends a run after `LIMIT` bad iterations in a row.

    Args:
        iteration: iterations done.
        output: run folder.
    """
    return UserError(
        f"the loss or its gradient is not finite in {LIMIT} iterations in a row, found at iteration {iteration}; the "
        f"last good state is the newest checkpoint of {output}. The same command tries again from there, on the "
        "images that follow; if it stops again, start over in another run.output with a lower "
        "optim.learning_rate or with optim.clip_norm"
    )
