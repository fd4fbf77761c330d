"""Selection of the patches of view 2 that are masked (paper, Section 3.2, Eq. 2-4 and Table 3)."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fsr_fast.config import Config, MaskConfig
from fsr_fast.errors import UserError
from fsr_fast.kernels import PatchSelection, top_k_mask, uncertain_mask, uncertain_mask_from_cam
from fsr_fast.method.cam import dense_cams, merge_passes, multi_scale_passes, normalise_cam
from fsr_fast.method.draws import Draws
from fsr_fast.models import Network
from fsr_fast.models.encoder import Features
from fsr_fast.models.network import activate
from fsr_fast.models.work import TrunkPass


@dataclass(frozen=True)
class MaskedPatches:
    """The masked patches of a batch, as the distillation loss reads them."""

    mask: Tensor
    """(B, N), bool, True where masked."""
    index: Tensor
    """(B, k), int64, patches to compare; k is the same for all images."""
    weight: Tensor | None
    """(B, k), float32, weight of each of them in the batch mean; None: equal weights."""
    passes: tuple[TrunkPass, ...] = ()
    """Of the trunk, made to choose them."""


@dataclass(frozen=True)
class MaskShape:
    """Sizes of the mask for one grid."""

    grid: tuple[int, int]
    """h and w, patches."""
    blocks: int
    """Number of blocks to choose from."""
    count: int
    """Number of blocks that are masked."""


def mask_shape(config: MaskConfig, grid: tuple[int, int]) -> MaskShape:
    """Count blocks and masked blocks: ⌊N·r⌋ patches, or ⌈blocks·r⌉ where blocks are larger than a patch.

    Raises:
        UserError: the blocks do not fill the grid.
    """
    height, width = grid
    if height % config.block or width % config.block:
        raise UserError(f"mask.block: {config.block} does not divide the grid of {height} by {width} patches")
    blocks = (height // config.block) * (width // config.block)
    share = blocks * config.ratio
    return MaskShape(grid, blocks, math.floor(share + 1e-6) if config.block == 1 else math.ceil(share - 1e-6))


class MaskSelector:
    """Chooses view 2's masked patches by the student's map that the recipe names.

    Args:
        student: the network whose CAM guides.
        config: strategy and source, scales and precision of the CAM.
        max_classes: largest number of classes that an image has.

    Raises:
        UserError: the blocks do not fill the grid.
    """

    def __init__(self, student: Network, config: Config, max_classes: int) -> None:
        self.student = student
        self.config = config
        self.max_classes = max_classes
        self.shape = mask_shape(config.mask, student.encoder.grid)

    @torch.no_grad()
    def select(
        self, view2: Tensor, unmasked: Features | None, labels: Tensor, draws: Draws, *, random: bool
    ) -> MaskedPatches:
        """Choose the patches of a batch.

        Args:
            view2: (B, 3, H, W), normalised.
            unmasked: its features, where already known.
            labels: (B, C), 0 or 1.
            draws: of the step.
            random: whether the iteration is one of those that mask at random.
        """
        mask, shape, student = self.config.mask, self.shape, self.student
        if random or mask.strategy == "random":
            return mask_randomly(draws.uniform, shape, mask)
        if mask.strategy == "edge_strict":
            return mask_edges(find_edges(student.denormalise(view2), mask), shape)
        if mask.multi_scale:
            return self._by_all_scales(view2, unmasked, labels, draws)
        top = mask.source == "top"
        classifier = student.top_classifier if top else student.aux_classifier
        drop_path = None if draws.mask_cam is None else draws.mask_cam[0][..., : len(view2)]
        features = unmasked or student.encoder(view2, drop_path=drop_path, aux_only=not top)
        guide = student.encoder.norm(features.tokens) if top else features.aux  # (B, N, D)
        if mask.strategy == "uncertain" and mask.block == 1:
            masked = mask_from_features(guide, classifier.weight.flatten(1), labels, draws.uniform, shape, mask)
        else:
            cam = normalise_cam(activate(guide, classifier, features.grid))  # (B, C, h, w)
            masked = mask_from_cam(cam, labels, draws.uniform, shape, mask)
        return replace(masked, passes=(features.source,))

    def _by_all_scales(self, view2: Tensor, unmasked: Features | None, labels: Tensor, draws: Draws) -> MaskedPatches:
        source, cam = self.config.mask.source, self.config.cam
        passes = multi_scale_passes(
            self.student.encoder,
            view2,
            cam.scales,
            first=unmasked,
            drop_path=draws.mask_cam,
            aux_only=source == "aux" and unmasked is None,
            float8=cam.fp8,
        )
        size = (view2.shape[-2], view2.shape[-1])
        cams = merge_passes(self.student, passes, labels, classifier=source, max_classes=self.max_classes, size=size)
        dense = dense_cams(cams, labels.shape[1])  # (B, C, H, W)
        masked = mask_from_cam(dense, labels, draws.uniform, self.shape, self.config.mask)
        return replace(masked, passes=tuple(one.source for pair in passes for one in pair))


def mask_randomly(uniform: Tensor, shape: MaskShape, config: MaskConfig) -> MaskedPatches:
    """Mask k blocks at random.

    Args:
        uniform: (B, blocks), u of Eq. 3.
        shape: from `mask_shape`.
        config: size of a block.
    """
    return _compare_masked(top_k_mask(uniform, k=shape.count, grid=shape.grid, block=config.block))


def mask_from_features(
    features: Tensor, weight: Tensor, labels: Tensor, uniform: Tensor, shape: MaskShape, config: MaskConfig
) -> MaskedPatches:
    """Mask the most uncertain patches by the single-scale CAM.

    Args:
        features: (B, N, D), feature map of the classifier that guides.
        weight: (C, D), the classifier.
        labels: (B, C), 0 or 1.
        uniform: (B, N), u of Eq. 3.
        shape: from `mask_shape`.
        config: thresholds.
    """
    thresholds = {"low": config.low, "high": config.high}
    return _compare_masked(uncertain_mask(features, weight, labels, uniform, k=shape.count, **thresholds))


def mask_from_cam(cam: Tensor, labels: Tensor, uniform: Tensor, shape: MaskShape, config: MaskConfig) -> MaskedPatches:
    """Mask by a given normalised CAM: the most uncertain blocks, or exactly the uncertain patches (`cam_strict`).

    Args:
        cam: (B, C, H, W), normalised.
        labels: (B, C), 0 or 1.
        uniform: (B, blocks), u of Eq. 3.
        shape: from `mask_shape`.
        config: strategy, thresholds, block.
    """
    if config.strategy == "cam_strict":
        value = F.interpolate((cam * labels[..., None, None]).amax(1, keepdim=True), size=shape.grid, mode="nearest")
        value = value.flatten(1)
        return _compare_exactly((config.low < value) & (value < config.high))
    selection = uncertain_mask_from_cam(
        cam,
        labels,
        uniform,
        grid=shape.grid,
        k=shape.count,
        low=config.low,
        high=config.high,
        block=config.block,
    )
    return _compare_masked(selection)


def find_edges(images: Tensor, config: MaskConfig) -> Tensor:
    """Find edges by Canny's detector.

    Args:
        images: (B, 3, H, W), grey levels 0…255.
        config: smoothing and thresholds.

    Returns:
        (B, H, W), bool. The paper only names the detector; smoothing and thresholds are this project's.
    """
    from kornia.filters import canny  # slow to import

    low, high = config.edge_low / 255, config.edge_high / 255
    sigma = config.edge_sigma
    grey = images.float().mean(1, keepdim=True) / 255
    _, edges = canny(grey, low, high, kernel_size=2 * math.ceil(2 * sigma) + 1, sigma=(sigma, sigma))
    return edges[:, 0] > 0


def mask_edges(edges: Tensor, shape: MaskShape) -> MaskedPatches:
    """Mask exactly the patches that hold an edge (`edge_strict`).

    Args:
        edges: (B, H, W), bool, from `find_edges`.
        shape: from `mask_shape`.
    """
    return _compare_exactly(F.adaptive_max_pool2d(edges.float()[:, None], shape.grid).flatten(1) > 0)


def _compare_masked(selection: PatchSelection) -> MaskedPatches:
    return MaskedPatches(selection.mask, selection.masked, None)


def _compare_exactly(mask: Tensor) -> MaskedPatches:
    # The number of masked patches differs between images: all are compared, the unmasked with weight 0.
    index = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    weight = mask / (mask.sum(1, keepdim=True).clamp(min=1) * len(mask))
    return MaskedPatches(mask, index, weight)
