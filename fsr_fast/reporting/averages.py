"""Mean losses between two log lines: summed on the device, read once."""

import torch
from torch import Tensor

from fsr_fast.runtime.distributed import sum_over_ranks, world_size


class Averages:
    """Means of the losses since they were last read, over iterations that were not skipped and over all processes."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, losses: dict[str, Tensor], skipped: Tensor) -> None:
        """Count one iteration. Never waits for the device.

        Args:
            losses: scalars by name.
            skipped: scalar, bool: the iteration does not count.
        """
        values = torch.stack([*(loss.detach().float() for loss in losses.values()), torch.ones_like(skipped).float()])
        names = tuple(losses)
        values = values.masked_fill(skipped, 0)
        self._sums[names] = self._sums[names] + values if names in self._sums else values

    def take(self, counts: Tensor) -> tuple[dict[str, float], list[float]]:
        """Read the means and other counts from the device in one go; then start over.

        Args:
            counts: (n,), the same in all processes.

        Returns:
            Means by name, NaN where every iteration was skipped; the counts.
        """
        read = iter((sum_over_ranks(torch.cat([*self._sums.values(), counts])) / world_size()).tolist())
        totals: dict[str, float] = {}
        numbers: dict[str, float] = {}
        for names in self._sums:
            values = [next(read) for _ in names]
            number = next(read)
            for name, value in zip(names, values, strict=True):
                totals[name] = totals.get(name, 0.0) + value
                numbers[name] = numbers.get(name, 0.0) + number
        self._sums.clear()
        means = {name: total / numbers[name] if numbers[name] else float("nan") for name, total in totals.items()}
        return means, list(read)
