"""Arithmetic of the passes through the trunk."""

from collections.abc import Sequence
from typing import NamedTuple

from fsr_fast.models.attention import Groups


class TrunkPass(NamedTuple):
    """One pass of packed images through the trunk."""

    groups: Groups
    """(Images, tokens per image) of each size."""
    blocks: int
    """Number of blocks that were run."""
    gradient: bool
    """Whether it has a backward pass."""


class Work(NamedTuple):
    """The trunk's arithmetic in a step."""

    passes: tuple[TrunkPass, ...]
    """In the order in which they ran."""
    flops: float
    """Of all passes, gradients included."""
    units: float
    """The same per image of the batch, in passes of one image at scale 1.0 without gradient."""


class TrunkShape(NamedTuple):
    """Sizes that determine the arithmetic."""

    width: int
    """D."""
    weights: int
    """Number of weights in the matrices of a block; 4·D² + 8·D² in a plain one."""
    patch_values: int
    """Number of values in a patch, 3·p²."""
    depth: int
    """Number of blocks."""
    patches: int
    """N, of an image at scale 1.0."""
    prefix: int = 0
    """Class and register tokens that pass with the patches."""

    def work(self, passes: Sequence[TrunkPass], *, images: int) -> Work:
        """Add up the passes of a step on `images` images; one that is listed twice ran once."""
        passes = list({id(one): one for one in passes}.values())
        unit = TrunkPass(((images, self.patches + self.prefix),), self.depth, gradient=False)
        flops = self.flops(passes)
        return Work(tuple(passes), flops, flops / self.flops([unit]))

    def flops(self, passes: Sequence[TrunkPass]) -> float:
        """Count floating-point operations: multiplication and addition are two; a gradient costs twice its pass."""
        total = 0.0
        for groups, blocks, gradient in passes:
            tokens = sum(images * count for images, count in groups)
            pairs = sum(images * count**2 for images, count in groups)
            patches = tokens - self.prefix * sum(images for images, _ in groups)
            block = 2 * tokens * self.weights + 4 * pairs * self.width
            total += (blocks * block + 2 * patches * self.patch_values * self.width) * (3 if gradient else 1)
        return total
