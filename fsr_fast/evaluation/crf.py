"""The fully connected CRF (Krähenbühl and Koltun) that sharpens the decoder's result at test time."""

from __future__ import annotations

import numpy as np

from fsr_fast.errors import UserError


def dense_crf(
    image: np.ndarray,
    probabilities: np.ndarray,
    *,
    iterations: int = 10,
    gaussian_weight: float = 1.0,
    gaussian_sigma: float = 1.0,
    bilateral_weight: float = 4.0,
    bilateral_sigma_xy: float = 121.0,
    bilateral_sigma_rgb: float = 5.0,
) -> np.ndarray:
    """Run mean-field inference of a CRF whose edges join every pair of pixels.

    Args:
        image: (H,W,3) uint8, RGB.
        probabilities: (C+1,H,W) float32, softmax over the classes; values below 1e-5 count as 1e-5.
        iterations: mean-field iterations.
        gaussian_weight: weight of the smoothness term.
        gaussian_sigma: its width, pixels.
        bilateral_weight: weight of the appearance term.
        bilateral_sigma_xy: its width in space, pixels.
        bilateral_sigma_rgb: its width in colour, of 0 to 255.

    Returns:
        (C+1,H,W) float32, probabilities that sum to 1 at every pixel.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes that do not fit each other.
        UserError: pydensecrf is not installed.

    Source: paper, evaluation protocol; parameters of the official code.
    """
    _check(image, probabilities)
    try:
        from pydensecrf.densecrf import DenseCRF2D
        from pydensecrf.utils import unary_from_softmax
    except ImportError:
        raise UserError(
            "the dense CRF needs the package pydensecrf2, which is not installed: `pip install pydensecrf2`, "
            "or evaluate without it (--evaluate.crf false)"
        ) from None

    classes, height, width = probabilities.shape
    field = DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probabilities)))
    field.addPairwiseGaussian(sxy=gaussian_sigma, compat=gaussian_weight)
    field.addPairwiseBilateral(
        sxy=bilateral_sigma_xy,
        srgb=bilateral_sigma_rgb,
        rgbim=np.array(image, order="C"),  # a copy: a read-only array is refused
        compat=bilateral_weight,
    )
    return np.array(field.inference(iterations), dtype=np.float32).reshape(classes, height, width)


def _check(image: np.ndarray, probabilities: np.ndarray) -> None:
    if image.dtype != np.uint8:
        raise TypeError(f"image is {image.dtype}; expected uint8")
    if probabilities.dtype != np.float32:
        raise TypeError(f"probabilities are {probabilities.dtype}; expected float32")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.shape}; expected (H,W,3)")
    if probabilities.ndim != 3 or probabilities.shape[1:] != image.shape[:2]:
        raise ValueError(f"probabilities are {probabilities.shape}; expected (C+1,{image.shape[0]},{image.shape[1]})")
