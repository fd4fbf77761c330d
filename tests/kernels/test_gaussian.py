"""The exact Gaussian filter against the matrix of all pairs, on the torch path and on the Triton kernels."""

import pytest
import torch
from torch import Tensor

from fsr_fast.kernels.gaussian import _Weights, bilateral_features, gaussian_filter, gaussian_filter_op
from tests.kernels.helpers import assert_close, permuted

TF32 = 2.0**-10  # both factors of a product are rounded, by at most 2⁻¹¹, and nothing cancels


def tolerance(device: torch.device) -> float:
    return TF32 if device.type == "cuda" else 1e-5


def draw(B: int, axes: int, V: int, P: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Features that spread over several standard deviations, values of one sign."""
    generator = torch.Generator().manual_seed(P)
    features = 5 * torch.randn(B, axes, P, generator=generator, dtype=torch.float64)
    return features.to(dtype), torch.rand(B, V, P, generator=generator, dtype=torch.float64).to(dtype)


def filter_all_pairs(features: Tensor, values: Tensor) -> Tensor:
    points = features.double().mT
    squared = (points[:, :, None] - points[:, None]).square().sum(dim=-1)
    return values.double() @ torch.exp(-0.5 * squared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 5, 3, 1), (2, 2, 21, 130), (1, 5, 81, 700), (2, 3, 4, 1000)])
def test_torch_path_sums_over_all_pairs(torch_path, shape, dtype) -> None:
    features, values = draw(*shape, dtype)
    assert_close(gaussian_filter(features, values), filter_all_pairs(features, values).to(dtype))


@pytest.mark.parametrize("senders", [0, 1, 150])
def test_torch_path_meets_the_pixels_that_have_a_value_alone(torch_path, monkeypatch, senders) -> None:
    features, values = draw(1, 5, 3, 1000)
    values[:, :, torch.randperm(1000, generator=torch.Generator().manual_seed(1))[senders:]] = 0
    computed = []
    weigh = _Weights.__call__
    monkeypatch.setattr(_Weights, "__call__", lambda *arguments: computed.append(weigh(*arguments)) or computed[-1])
    assert_close(gaussian_filter(features, values), filter_all_pairs(features, values).float())
    assert sum(weights.numel() for weights in computed) <= 1024 * -(-senders // 128) * 128


@pytest.mark.parametrize("shape", [(2, 5, 3, 1), (1, 2, 21, 130), (1, 5, 81, 70), (2, 5, 130, 257)])
def test_kernels_sum_over_all_pairs(triton_device, shape) -> None:
    features, values = draw(*shape)
    filtered = gaussian_filter(features.to(triton_device), values.to(triton_device)).cpu()
    assert_close(filtered, filter_all_pairs(features, values).float(), relative=tolerance(triton_device))


@pytest.mark.gpu
def test_kernels_sum_over_all_pairs_of_an_image(triton_device) -> None:
    if triton_device.type != "cuda":
        pytest.skip("too large for the interpreter")
    images = 255 * torch.rand(2, 3, 70, 61, generator=torch.Generator().manual_seed(0))
    features = bilateral_features(images, sigma_rgb=15, sigma_xy=50)
    values = torch.rand(2, 21, 70 * 61, generator=torch.Generator().manual_seed(1))
    filtered = gaussian_filter(features.to(triton_device), values.to(triton_device)).cpu()
    assert_close(filtered, filter_all_pairs(features, values).float(), relative=TF32)


def check_far_clusters(device: torch.device, size: int) -> None:
    """Two clusters 40 standard deviations apart: the values of one never meet the other."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(1, 5, 2 * size, generator=generator)
    values = torch.rand(1, 2, 2 * size, generator=generator)
    shuffled = torch.randperm(2 * size, generator=generator)
    far = shuffled[:size]
    features[:, :3, far] += 40
    values[:, :, far] = float("nan")
    near = shuffled[size:]
    filtered = gaussian_filter(features.to(device), values.to(device)).cpu()[:, :, near]
    expected = filter_all_pairs(features[:, :, near], values[:, :, near]).float()
    assert_close(filtered, expected, relative=tolerance(device))


def test_torch_path_skips_tiles_that_are_far_apart(torch_path) -> None:
    check_far_clusters(torch.device("cpu"), 384)


def test_kernels_skip_tiles_that_are_far_apart(triton_device) -> None:
    check_far_clusters(triton_device, 128)


def test_result_is_the_same_every_time(triton_device) -> None:
    features, values = (tensor.to(triton_device) for tensor in draw(1, 5, 3, 140))
    assert torch.equal(gaussian_filter(features, values), gaussian_filter(features, values))


@pytest.mark.parametrize("spread", [0.0, 300.0])
def test_extreme_features_stay_exact(torch_path, spread) -> None:
    features, values = draw(1, 5, 2, 700)
    features = features * spread
    assert_close(gaussian_filter(features, values), filter_all_pairs(features, values).float())


def test_no_gradient_flows_through_the_filter(torch_path) -> None:
    features, values = draw(1, 2, 1, 9)
    assert not gaussian_filter(features.requires_grad_(), values.requires_grad_()).requires_grad


def test_features_are_colour_and_place_in_standard_deviations() -> None:
    images = torch.arange(18.0).view(1, 3, 2, 3)
    features = bilateral_features(images, sigma_rgb=2, sigma_xy=4)
    assert features.shape == (1, 5, 6)
    # pixel 5 is row 1, column 2: colours 5, 11, 17
    assert features[0, :, 5].tolist() == [2.5, 5.5, 8.5, 0.25, 0.5]


def test_operator_passes_opcheck(path) -> None:
    features, values = (permuted(tensor).to(path) for tensor in draw(2, 5, 3, 20))
    torch.library.opcheck(gaussian_filter_op, (features, values))


BAD = [
    ((torch.rand(5, 9), torch.rand(1, 2, 9)), ValueError, r"features has shape \(5, 9\)"),
    ((torch.rand(1, 5, 0), torch.rand(1, 2, 0)), ValueError, "features has shape"),
    ((torch.rand(1, 5, 9), torch.rand(1, 2, 8)), ValueError, r"values has shape \(1, 2, 8\)"),
    ((torch.rand(1, 5, 9).half(), torch.rand(1, 2, 9).half()), TypeError, "features is float16"),
    ((torch.rand(1, 5, 9), torch.rand(1, 2, 9).double()), TypeError, "values is float64"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input_is_refused(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        gaussian_filter(*arguments)


@pytest.mark.parametrize(
    ("images", "deviations", "error", "message"),
    [
        (torch.rand(3, 4, 4), (1, 1), ValueError, "images has shape"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (1, 1), TypeError, "images is uint8"),
        (torch.rand(1, 3, 4, 4), (0, 1), ValueError, "sigma_rgb is 0"),
        (torch.rand(1, 3, 4, 4), (1, float("nan")), ValueError, "sigma_xy is nan"),
    ],
)
def test_bad_images_are_refused(images, deviations, error, message) -> None:
    with pytest.raises(error, match=message):
        bilateral_features(images, sigma_rgb=deviations[0], sigma_xy=deviations[1])


def test_kernels_refuse_what_they_cannot_do(triton_device) -> None:
    features, values = (tensor.to(triton_device) for tensor in draw(1, 3, 1, 9))
    with pytest.raises(ValueError, match="features has 3 channels"):
        gaussian_filter(features, values)
    features, values = (tensor.double().to(triton_device) for tensor in draw(1, 5, 1, 9))
    with pytest.raises(TypeError, match="features is float64"):
        gaussian_filter(features, values)
