"""How much arithmetic the passes through the trunk are."""

from collections.abc import Sequence
from typing import NamedTuple

from fsr_fast.models.attention import Groups


class TrunkPass(NamedTuple):
    """One pass of packed images through the trunk."""

    groups: Groups
    """(Images, tokens an image) of each size."""
    blocks: int
    """Number of blocks that were run."""
    gradient: bool
    """Whether it is differentiated, too."""


class Work(NamedTuple):
    """The trunk's share of a step."""

    passes: tuple[TrunkPass, ...]
    """In the order in which they were made."""
    flops: float
    """Of all passes, gradients included."""
    units: float
    """The same an image of the batch, in passes of one image at scale 1.0 without gradient."""


class TrunkShape(NamedTuple):
    """Sizes that decide the arithmetic."""

    width: int
    """D."""
    hidden: int
    """Channels within the MLP."""
    patch_values: int
    """Values of a patch, 3·p²."""
    depth: int
    """Number of blocks."""
    tokens: int
    """N, patches of an image at scale 1.0."""

    def work(self, passes: Sequence[TrunkPass], *, images: int) -> Work:
        """Add up the passes of a step on `images` images; one that is named twice was made once."""
        passes = list({id(one): one for one in passes}.values())
        unit = TrunkPass(((images, self.tokens),), self.depth, gradient=False)
        flops = self.flops(passes)
        return Work(tuple(passes), flops, flops / self.flops([unit]))

    def flops(self, passes: Sequence[TrunkPass]) -> float:
        """Count floating-point operations: multiplication and addition are two; a gradient costs twice its pass."""
        total = 0.0
        for groups, blocks, gradient in passes:
            tokens = sum(images * count for images, count in groups)
            pairs = sum(images * count**2 for images, count in groups)
            block = tokens * (8 * self.width**2 + 4 * self.width * self.hidden) + 4 * pairs * self.width
            total += (blocks * block + 2 * tokens * self.patch_values * self.width) * (3 if gradient else 1)
        return total
