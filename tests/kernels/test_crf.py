"""The mean field with tiles against the matrices of all pairs in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsr_fast.kernels import dense_crf as public
from fsr_fast.kernels.crf import dense_crf, dense_crf_op
from tests.kernels.helpers import permuted

MARGINALS = 1e-3
SMALL = {"bilateral_sigma_xy": 12.0, "bilateral_sigma_rgb": 20.0}


def draw(B: int, classes: int, h: int, w: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Blurred blobs of colour, and beliefs that follow other blobs with noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(B, 3 + classes, 4, 5, generator=generator)
    fine = F.interpolate(coarse, size=(h, w), mode="bilinear")
    images = (255 * fine[:, :3] + 6 * torch.randn(B, 3, h, w, generator=generator)).clamp(0, 255)
    logits = 6 * fine[:, 3:] + 0.7 * torch.randn(B, classes, h, w, generator=generator)
    return logits.softmax(1), images.to(torch.uint8)


def all_pairs(features: Tensor) -> Tensor:
    return torch.exp(-0.5 * (features[:, None] - features[None]).square().sum(-1))


def to_tf32(values: Tensor) -> Tensor:
    """Round float64 to the nearest number of 11 significant bits."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def mean_field(
    probabilities: Tensor, images: Tensor, iterations=10, weights=(1.0, 4.0), sigmas=(1.0, 121.0, 5.0), tf32=False
) -> Tensor:
    """Algorithm 1 written out, in float64, on one image; tf32: all factors of the filters rounded."""
    rounded = to_tf32 if tf32 else lambda values: values
    classes, h, w = probabilities.shape
    rows, columns = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
    places = torch.stack([rows, columns], -1).flatten(0, 1)
    colours = images.double().flatten(1).T
    kernels = [
        rounded(all_pairs(f)) for f in (places / sigmas[0], torch.cat([places / sigmas[1], colours / sigmas[2]], 1))
    ]
    scales = [kernel.sum(1).rsqrt() for kernel in kernels]
    unary = probabilities.double().flatten(1).clamp(min=1e-5).log()
    beliefs = unary.softmax(0)
    for _ in range(iterations):
        filtered = [rounded(beliefs * scale) @ kernel * scale for kernel, scale in zip(kernels, scales, strict=True)]
        beliefs = (unary + weights[0] * filtered[0] + weights[1] * filtered[1]).softmax(0)
    return beliefs.view(classes, h, w)


def fields(probabilities: Tensor, images: Tensor, **options) -> Tensor:
    return torch.stack([mean_field(*pair, **options) for pair in zip(probabilities, images, strict=True)])


def worst(actual: Tensor, probabilities: Tensor, images: Tensor, **options) -> float:
    return (actual.cpu().double() - fields(probabilities, images, **options)).abs().max().item()


def bound(device: torch.device, probabilities: Tensor, images: Tensor, **options) -> float:
    """On a GPU, whose matrix units multiply tf32, twice the error of that rounding alone."""
    if device.type == "cpu":
        return MARGINALS / 10
    return 2 * worst(fields(probabilities, images, **options, tf32=True), probabilities, images, **options)


@pytest.mark.parametrize(("classes", "h", "w"), [(2, 1, 1), (3, 17, 23), (21, 30, 41)])
def test_torch_path_gives_the_marginals_of_all_pairs(torch_path, classes, h, w) -> None:
    beliefs, images = draw(2, classes, h, w)
    assert worst(dense_crf(beliefs, images), beliefs, images) <= MARGINALS / 10


def test_torch_path_gives_them_with_other_parameters(torch_path) -> None:
    beliefs, images = draw(1, 4, 20, 33)
    actual = dense_crf(beliefs, images, iterations=4, gaussian_weight=2, gaussian_sigma=3, bilateral_weight=3, **SMALL)
    expected = {"iterations": 4, "weights": (2, 3), "sigmas": (3, 12, 20)}
    assert worst(actual, beliefs, images, **expected) <= MARGINALS / 10


def test_kernels_give_the_marginals_of_all_pairs(triton_device) -> None:
    beliefs, images = draw(2, 3, 9, 15)
    actual = dense_crf(beliefs.to(triton_device), images.to(triton_device), iterations=3)
    assert worst(actual, beliefs, images, iterations=3) <= bound(triton_device, beliefs, images, iterations=3)


@pytest.mark.gpu
def test_kernels_give_the_marginals_of_all_pairs_of_an_image(triton_device) -> None:
    if triton_device.type != "cuda":
        pytest.skip("too large for the interpreter")
    beliefs, images = draw(1, 21, 70, 61)
    actual = dense_crf(beliefs.to(triton_device), images.to(triton_device))
    assert worst(actual, beliefs, images) <= bound(triton_device, beliefs, images)


def test_the_field_moves_the_marginals_and_keeps_their_sum(torch_path) -> None:
    beliefs, images = draw(1, 3, 20, 30)
    marginals = dense_crf(beliefs, images)
    assert marginals.dtype == torch.float32
    assert (marginals - beliefs).abs().max() > 0.3
    assert torch.allclose(marginals.sum(1), torch.ones(1, 20, 30), atol=1e-5)


def test_classes_that_are_nowhere_likely_send_nothing_and_change_nothing(torch_path, monkeypatch) -> None:
    beliefs, images = draw(1, 6, 20, 30)
    beliefs[:, :3] = beliefs[:, :3].softmax(1)
    beliefs[:, 3:] *= 5e-5
    sizes = []
    from fsr_fast.kernels.crf import _Appearance

    call = _Appearance.__call__
    monkeypatch.setattr(_Appearance, "__call__", lambda self, sent: sizes.append(len(sent)) or call(self, sent))
    marginals = dense_crf(beliefs, images)
    assert set(sizes) == {3}
    assert worst(marginals, beliefs, images) <= MARGINALS / 10


def test_a_belief_that_has_settled_sends_nothing_more(torch_path, monkeypatch) -> None:
    beliefs, images = draw(1, 3, 20, 30)
    from fsr_fast.kernels.crf import _Appearance

    call, shares = _Appearance.__call__, []
    monkeypatch.setattr(
        _Appearance, "__call__", lambda self, sent: shares.append((sent != 0).any(0).float().mean()) or call(self, sent)
    )
    marginals = dense_crf(beliefs, images)
    assert shares[0] == 1
    assert shares[-1] < 0.5 * shares[1]
    assert worst(marginals, beliefs, images) <= MARGINALS / 2


def test_beliefs_below_the_floor_count_as_the_floor(torch_path) -> None:
    beliefs, images = draw(1, 3, 8, 9)
    beliefs[:, 0, 2, 3] = 0
    marginals = dense_crf(beliefs, images, iterations=0)
    assert marginals[0, 0, 2, 3] / marginals[0, 1, 2, 3] == pytest.approx(1e-5 / beliefs[0, 1, 2, 3].item(), rel=1e-3)
    assert worst(dense_crf(beliefs, images), beliefs, images) <= MARGINALS / 10


def test_without_weights_the_beliefs_come_back(torch_path) -> None:
    beliefs, images = draw(1, 3, 8, 9)
    assert torch.allclose(dense_crf(beliefs, images, gaussian_weight=0, bilateral_weight=0), beliefs, atol=1e-4)


def test_it_is_a_public_operation() -> None:
    assert public is dense_crf


def test_operator_passes_opcheck(torch_path) -> None:
    beliefs, images = draw(1, 3, 8, 9)
    torch.library.opcheck(dense_crf_op, (permuted(beliefs), permuted(images), 2, [1.0, 1.0], [4.0, 121.0, 5.0]))


GOOD = (torch.full((1, 2, 4, 5), 0.5), torch.zeros(1, 3, 4, 5, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((GOOD[0][0], GOOD[1]), {}, ValueError, r"probabilities has shape \(2, 4, 5\)"),
        ((GOOD[0], GOOD[1].mT), {}, ValueError, r"images has shape \(1, 3, 5, 4\)"),
        ((GOOD[0].half(), GOOD[1]), {}, TypeError, "probabilities is float16"),
        ((GOOD[0], GOOD[1].long()), {}, TypeError, "images is int64"),
        (GOOD, {"iterations": -1}, ValueError, "iterations -1"),
        (GOOD, {"gaussian_sigma": 0}, ValueError, "gaussian_sigma 0"),
        (GOOD, {"bilateral_sigma_rgb": 0}, ValueError, "sigma_rgb is 0"),
    ],
)
def test_bad_input_is_refused(torch_path, arguments, options, error, message) -> None:
    with pytest.raises(error, match=message):
        dense_crf(*arguments, **options)
