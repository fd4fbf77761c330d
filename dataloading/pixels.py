"""The one way from grey levels to what the network reads."""

from torch import Tensor


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Compute (pixels / 255 - mean) / std, as one product and one sum.

    Args:
        pixels: (..., C, H, W), grey levels of 0...255, of any dtype.
        mean: (C, 1, 1), float32, for images in 0...1.
        std: (C, 1, 1), float32, likewise.

    Returns:
        (..., C, H, W), float32, a new tensor with the strides of `pixels`.
    """
    return (pixels.float() * (1 / (255 * std))).sub_(mean / std)
