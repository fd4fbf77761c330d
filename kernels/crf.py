"""Mean field of the fully connected CRF with exact Gaussian kernels (Krähenbühl and Koltun; evaluation protocol).

The spatial kernel is separable: two matrix products. The bilateral kernel runs over the tiles of
:mod:`gaussian`, which are built once and serve the normalisation and every iteration. Two
approximations, both far below 1e-3 in the marginals: pairs of tiles all of whose weights are below exp(-16) = 1e-7 are
skipped, and a pixel only sends the change of its belief in a class once that exceeds 1e-4. After a few iterations few
beliefs change, which the CPU's filter exploits.
"""

import torch
from torch import Tensor

from .dispatch import require_dtype, require_same_device
from .gaussian import TiledPixels, bilateral_features

_CUTOFF = 16.0
_NEGLIGIBLE = 1e-4
_FLOOR = 1e-5  # of the unary probabilities, as in pydensecrf


# --- both paths


class _Appearance:
    """The bilateral kernel of one image, symmetrically normalised."""

    def __init__(self, image: Tensor, sigma_xy: float, sigma_rgb: float) -> None:
        self.tiles = TiledPixels(bilateral_features(image[None], sigma_rgb=sigma_rgb, sigma_xy=sigma_xy), _CUTOFF)
        self.scale = self.tiles.filter(image.new_ones(1, 1, image[0].numel())).rsqrt()

    def __call__(self, sent: Tensor) -> Tensor:
        return (self.tiles.filter(sent.flatten(1) * self.scale) * self.scale).view_as(sent)


def _smoothing(like: Tensor, length: int, sigma: float) -> Tensor:
    """The normalised spatial kernel along one axis, (length, length)."""
    places = torch.arange(length, dtype=torch.float64, device=like.device) / sigma
    kernel = torch.exp(-0.5 * (places[:, None] - places).square())
    scale = kernel.sum(1).rsqrt()
    return (scale[:, None] * kernel * scale).to(like.dtype)


# --- registration


@torch.library.custom_op("fsr::dense_crf", mutates_args=())
def dense_crf_op(
    probabilities: Tensor, images: Tensor, iterations: int, gaussian: list[float], bilateral: list[float]
) -> Tensor:
    """Run the mean field on checked tensors; gaussian is (weight, sigma), bilateral (weight, sigma_xy, sigma_rgb)."""
    _, _, H, W = probabilities.shape
    smooth_rows, smooth_columns = (_smoothing(probabilities, length, gaussian[1]) for length in (H, W))
    marginals = []
    for unary, image in zip(probabilities.clamp(min=_FLOOR).log(), images, strict=True):
        appearance = _Appearance(image.to(unary.dtype), *bilateral[1:]) if bilateral[0] else None
        beliefs = unary.softmax(0)
        sent, received = torch.zeros_like(beliefs), torch.zeros_like(beliefs)
        for _ in range(iterations):
            if appearance is not None:
                change = beliefs - sent
                change.masked_fill_(change.abs() <= _NEGLIGIBLE, 0)
                changed = change.flatten(1).any(1).nonzero().flatten()
                sent += change
                received[changed] += bilateral[0] * appearance(change[changed])
            beliefs = (unary + received + gaussian[0] * (smooth_rows @ beliefs @ smooth_columns)).softmax(0)
        marginals.append(beliefs)
    return torch.stack(marginals)


@dense_crf_op.register_fake
def _(probabilities, images, iterations, gaussian, bilateral):
    return probabilities.new_empty(probabilities.shape)


# --- public function


def dense_crf(
    probabilities: Tensor,
    images: Tensor,
    *,
    iterations: int = 10,
    gaussian_weight: float = 1.0,
    gaussian_sigma: float = 1.0,
    bilateral_weight: float = 4.0,
    bilateral_sigma_xy: float = 121.0,
    bilateral_sigma_rgb: float = 5.0,
) -> Tensor:
    """Run mean-field inference of a CRF with Potts potentials between every two pixels.

    Q ← softmax(log P + w_g N(K_g) Q + w_b N(K_b) Q), where K_g and K_b are the Gaussian kernels of place and of place
    and colour, i = j included, and N(K) = D^-½ K D^-½ with D the row sums of K (pydensecrf's symmetric normalisation).

    Args:
        probabilities: (B, C + 1, H, W) float32, or float64 on the CPU; values below 1e-5 count as 1e-5.
        images: (B, 3, H, W) uint8 or floating, RGB in 0..255.
        iterations: of the mean field, 0 or more.
        gaussian_weight: weight w_g of the smoothness term, 0 or more.
        gaussian_sigma: its standard deviation in pixels, above 0.
        bilateral_weight: weight w_b of the appearance term, 0 or more.
        bilateral_sigma_xy: its standard deviation in place, in pixels, above 0.
        bilateral_sigma_rgb: its standard deviation in colour, in grey levels, above 0.

    Returns:
        (B, C + 1, H, W), dtype of the probabilities: marginals, which sum to 1 at every pixel. No gradient.

    Raises:
        ValueError: a shape or a parameter does not fit, or devices differ.
        TypeError: a dtype does not fit.

    Source: paper, evaluation protocol; Krähenbühl and Koltun 2011, Algorithm 1, with exact message passing.
    """
    if probabilities.dim() != 4 or 0 in probabilities.shape:
        raise ValueError(f"probabilities has shape {tuple(probabilities.shape)}; expected (B, C + 1, H, W), none 0")
    B, _, H, W = probabilities.shape
    if images.shape != (B, 3, H, W):
        raise ValueError(f"images has shape {tuple(images.shape)}; expected (B, 3, H, W) = {(B, 3, H, W)}")
    require_dtype("probabilities", probabilities, (torch.float32, torch.float64))
    require_dtype("images", images, (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64))
    require_same_device(probabilities=probabilities, images=images)
    if not gaussian_sigma > 0 or min(iterations, gaussian_weight, bilateral_weight) < 0:
        raise ValueError(
            f"iterations {iterations}, gaussian_weight {gaussian_weight}, bilateral_weight {bilateral_weight} must be "
            f"0 or more, gaussian_sigma {gaussian_sigma} above 0"
        )
    return dense_crf_op(
        probabilities.detach(),
        images.detach(),
        iterations,
        [gaussian_weight, gaussian_sigma],
        [bilateral_weight, bilateral_sigma_xy, bilateral_sigma_rgb],
    )
