"""Pixel-adaptive refinement and its pseudo labels against the reference, on the torch path and the Triton kernels."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsr_fast import reference
from fsr_fast.kernels.refinement import (
    pixel_adaptive_refinement,
    pixel_adaptive_refinement_op,
    refine_pseudo_labels,
    refine_pseudo_labels_op,
)
from fsr_fast.kernels.refinement_kernels import launch_affinity, place_weights
from tests.kernels.helpers import assert_close, compile_backend, permuted

SHAPES = [(2, 3, 20, 17), (1, 1, 1, 9), (1, 80, 9, 1), (3, 2, 30, 31)]
SMALL = [(2, 3, 5, 7), (1, 1, 1, 9), (1, 80, 9, 1), (1, 20, 11, 13)]  # the interpreter takes its time
FEW: dict[str, Any] = {"iterations": 2, "dilations": (1, 3)}
IMAGES = ["noise", "smooth", "constant", "two colours"]
DEFAULT_DILATIONS = (1, 2, 4, 8, 12, 24)


def draw_images(kind: str, B: int, h: int, w: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(B, 3, h, w, generator=generator, dtype=dtype)
    if kind == "smooth":
        coarse = torch.rand(B, 3, 3, 3, generator=generator, dtype=dtype)
        return F.interpolate(coarse, size=(h, w), mode="bilinear") + 0.02 * noise
    return {"noise": noise, "constant": torch.full_like(noise, 0.4), "two colours": noise.gt(0.5).to(dtype)}[kind]


def draw_slots(B: int, M: int, h: int, w: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """CAMs in [0, 1] that are not smooth, classes in no order, slots live here and there."""
    generator = torch.Generator().manual_seed(M)
    cams = torch.rand(B, M, h, w, generator=generator, dtype=dtype) ** 2
    classes = torch.stack([torch.randperm(M + 5, generator=generator)[:M] for _ in range(B)])
    live = torch.rand(B, M, generator=generator) < 0.6
    live[0] = True  # an image with every class
    return cams, classes, live


def share_equal(actual: Tensor, expected: Tensor) -> float:
    assert actual.dtype == torch.uint8
    assert actual.shape == expected.shape
    return (actual.cpu() == expected.cpu()).float().mean().item()


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_path_refines_like_the_reference(torch_path, shape, dtype, kind) -> None:
    B, _, h, w = shape
    images = draw_images(kind, B, h, w, dtype)
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    assert_close(pixel_adaptive_refinement(images, maps), reference.pixel_adaptive_refinement(images, maps))


@pytest.mark.parametrize(("shape", "kind"), list(zip(SMALL, IMAGES, strict=True)))
def test_kernels_refine_like_the_reference(triton_device, shape, kind) -> None:
    B, _, h, w = shape
    images, maps = draw_images(kind, B, h, w), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    refined = pixel_adaptive_refinement(images.to(triton_device), maps.to(triton_device), **FEW)
    assert_close(refined.cpu(), reference.pixel_adaptive_refinement(images, maps, **FEW))


def test_kernels_refine_with_the_default_neighbours(triton_device) -> None:
    images, maps = draw_images("smooth", 1, 10, 12), torch.randn(1, 1, 10, 12)
    refined = pixel_adaptive_refinement(images.to(triton_device), maps.to(triton_device), iterations=3)
    assert_close(refined.cpu(), reference.pixel_adaptive_refinement(images, maps, iterations=3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_refined_in_float32(triton_device, dtype) -> None:
    images, maps = draw_images("smooth", 1, 6, 7).to(dtype), torch.rand(1, 2, 6, 7).to(dtype)
    refined = pixel_adaptive_refinement(images.to(triton_device), maps.to(triton_device), **FEW)
    assert refined.dtype == torch.float32
    assert_close(refined.cpu(), reference.pixel_adaptive_refinement(images.float(), maps.float(), **FEW))


def test_affinities_of_a_pixel_sum_to_1_01(triton_device) -> None:
    affinity = launch_affinity(draw_images("smooth", 1, 6, 7).to(triton_device), DEFAULT_DILATIONS)
    assert_close(affinity.sum(dim=1).cpu(), torch.full((1, 42), 1.01))
    assert sum(place_weights(DEFAULT_DILATIONS)) == pytest.approx(0.01, rel=1e-12)


@pytest.mark.parametrize("kind", IMAGES)
def test_a_constant_map_grows_by_one_per_cent_an_iteration(torch_path, kind) -> None:
    refined = pixel_adaptive_refinement(draw_images(kind, 1, 13, 9), torch.ones(1, 1, 13, 9), iterations=7)
    assert_close(refined, torch.full((1, 1, 13, 9), 1.01**7))


def test_no_gradient_flows_through_the_refinement(torch_path) -> None:
    maps = torch.rand(1, 2, 5, 5, requires_grad=True)
    assert not pixel_adaptive_refinement(draw_images("noise", 1, 5, 5).requires_grad_(), maps).requires_grad


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_path_labels_like_the_reference(torch_path, shape, kind) -> None:
    B, M, h, w = shape
    images = draw_images(kind, B, h, w, torch.float64)
    arguments = (images, *draw_slots(B, M, h, w, torch.float64))
    size = (2 * h + 1, 2 * w)
    # with 80 classes a softmax of scores in [0, 1] is flat: other backgrounds let each label occur
    backgrounds = {"high": 1.2, "low": 0.6} if M == 80 else {}
    expected = reference.refine_pseudo_labels(*arguments, size=size, **backgrounds)
    assert share_equal(refine_pseudo_labels(*arguments, size=size, **backgrounds), expected) == 1


@pytest.mark.parametrize("shape", SMALL)
def test_kernels_label_like_the_reference(triton_device, shape) -> None:
    B, M, h, w = shape
    arguments = (draw_images("smooth", B, h, w), *draw_slots(B, M, h, w))
    size = (2 * h + 1, 2 * w)
    expected = reference.refine_pseudo_labels(*arguments, size=size, high=0.6, low=0.4, **FEW)
    labels = refine_pseudo_labels(*(a.to(triton_device) for a in arguments), size=size, high=0.6, low=0.4, **FEW)
    assert share_equal(labels, expected) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_label_like_the_reference_at_full_size(dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    coarse = torch.rand(2, 4, 14, 14, generator=torch.Generator().manual_seed(0))
    cams = F.interpolate(coarse, size=(224, 223), mode="bilinear").to(dtype).cuda()
    images = draw_images("smooth", 2, 224, 223).to(dtype).cuda()
    _, classes, live = (one.cuda() for one in draw_slots(2, 4, 1, 1))
    expected = reference.refine_pseudo_labels(images.float(), cams.float(), classes, live, size=(448, 447))
    assert share_equal(refine_pseudo_labels(images, cams, classes, live, size=(448, 447)), expected) >= 0.9999


def test_each_kind_of_label_occurs_in_these_tests() -> None:
    found: set[int] = set()
    for B, M, h, w in SMALL:
        arguments = (draw_images("smooth", B, h, w), *draw_slots(B, M, h, w))
        size = (2 * h + 1, 2 * w)
        found |= set(reference.refine_pseudo_labels(*arguments, size=size, high=0.6, low=0.4, **FEW).unique().tolist())
    assert {0, 1, 255} <= found
    assert len(found) > 20


def test_dead_slots_are_never_read(path) -> None:
    images, (cams, classes, live) = draw_images("smooth", 2, 6, 5), draw_slots(2, 4, 6, 5)
    live = torch.tensor([[True, False, True, False], [False, True, False, False]])
    clean = refine_pseudo_labels(images.to(path), cams.to(path), classes.to(path), live.to(path), size=(12, 10), **FEW)
    cams[~live] = float("nan")
    classes[~live] = 250
    dirty = refine_pseudo_labels(images.to(path), cams.to(path), classes.to(path), live.to(path), size=(12, 10), **FEW)
    assert torch.equal(clean, dirty)
    assert clean.unique().numel() > 1


def label_constant_cams(device: torch.device, score: float, live: bool, **options: Any) -> Tensor:
    images = draw_images("noise", 1, 7, 8).to(device)
    cams = torch.full((1, 2, 7, 8), score, device=device)
    classes, alive = torch.tensor([[7, 3]], device=device), torch.full((1, 2), live, device=device)
    return refine_pseudo_labels(images, cams, classes, alive, size=(11, 10), **FEW, **options)


def test_of_equal_channels_the_lowest_wins(path) -> None:
    assert (label_constant_cams(path, 0.9, live=False) == 0).all(), "no class is present"
    assert (label_constant_cams(path, 0.5, live=True) == 255).all(), "between the thresholds"
    assert (label_constant_cams(path, 0.5, live=True, ignore_index=99) == 99).all(), "between the thresholds"
    assert (label_constant_cams(path, 0.9, live=True) == 8).all(), "of equal classes the first slot"
    assert (label_constant_cams(path, 0.7, live=True, low=0.7) == 0).all(), "equal to the background"
    assert (label_constant_cams(path, 0.7, live=True) == 255).all(), "equal to the high background"


def photographs(names: Sequence[str], folder: Path, crop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre crops of photographs, halved, and CAM-like maps: their blurred segmentations at a patch grid."""
    image_module = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")

    def read(path: Path, mode: str) -> Tensor:
        with image_module.open(path) as file:
            picture = file.convert(mode) if mode == "RGB" else file
            left, top = (picture.width - crop) // 2, (picture.height - crop) // 2
            return torch.from_numpy(numpy.array(picture.crop((left, top, left + crop, top + crop))))

    half, M = crop // 2, 3
    images, cams = torch.zeros(len(names), 3, half, half), torch.zeros(len(names), M, half, half)
    classes, live = torch.zeros(len(names), M, dtype=torch.int64), torch.zeros(len(names), M, dtype=torch.bool)
    for index, name in enumerate(names):
        colours = read(folder / "JPEGImages" / f"{name}.jpg", "RGB").permute(2, 0, 1)[None] / 255
        images[index] = F.interpolate(colours, size=half, mode="bilinear")[0]
        truth = read(folder / "SegmentationClassAug" / f"{name}.png", "P")
        present = [label for label in truth.unique().tolist() if 0 < label < 255][:M]
        for slot, label in enumerate(present):
            coarse = F.interpolate((truth == label).float()[None, None], size=max(2, crop // 16), mode="area")
            blurred = F.avg_pool2d(coarse, 3, stride=1, padding=1)
            cams[index, slot] = F.interpolate(blurred / blurred.max(), size=half, mode="bilinear")[0, 0]
            classes[index, slot], live[index, slot] = label - 1, True
    return images, cams, classes, live


@pytest.fixture
def voc_animals() -> tuple[Path, list[str]]:
    folder = os.environ.get("FSR_VOC_ANIMALS")
    if folder is None:
        pytest.skip("FSR_VOC_ANIMALS is not set: give a folder of photographs in the layout of VOC")
    names = sorted(path.stem for path in (Path(folder) / "SegmentationClassAug").glob("*.png"))
    return Path(folder), names


def test_torch_path_labels_photographs_like_the_reference(torch_path, voc_animals) -> None:
    folder, names = voc_animals
    arguments = photographs(names[:: max(1, len(names) // 6)][:6], folder, crop=192)
    expected = reference.refine_pseudo_labels(*arguments, size=(192, 192))
    assert {0, 255} < set(expected.unique().tolist())
    assert share_equal(refine_pseudo_labels(*arguments, size=(192, 192)), expected) >= 0.9999


def test_kernels_label_photographs_like_the_reference(triton_device, voc_animals) -> None:
    folder, names = voc_animals
    crop, count = (192, 6) if triton_device.type == "cuda" else (22, 1)
    arguments = photographs(names[:: max(1, len(names) // 6)][:count], folder, crop)
    expected = reference.refine_pseudo_labels(*arguments, size=(crop, crop), iterations=2)
    labels = refine_pseudo_labels(*(a.to(triton_device) for a in arguments), size=(crop, crop), iterations=2)
    assert share_equal(labels, expected) >= 0.9999


def test_operators_pass_opcheck(path) -> None:
    images = permuted(draw_images("noise", 1, 4, 5)).to(path)
    cams, classes, live = (one.to(path) for one in draw_slots(1, 2, 4, 5))
    torch.library.opcheck(pixel_adaptive_refinement_op, (images, permuted(cams), 1, [1]))
    settings = ([0.7, 0.25], [8, 11], 1, [1], 255)
    torch.library.opcheck(refine_pseudo_labels_op, (images, permuted(cams), classes, live, *settings))


def test_compiles_without_graph_breaks(triton_device) -> None:
    arguments = [a.to(triton_device) for a in (draw_images("noise", 1, 5, 6), *draw_slots(1, 2, 5, 6))]

    def run(images: Tensor, cams: Tensor, classes: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        labels = refine_pseudo_labels(images * 2, cams, classes, live, size=(10, 12), **FEW)
        return labels, pixel_adaptive_refinement(images, cams, **FEW) + 1

    for ours, plain in zip(
        torch.compile(run, fullgraph=True, backend=compile_backend(triton_device))(*arguments),
        run(*arguments),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)


BAD_REFINEMENT = [
    ({"images": torch.rand(1, 4, 5, 5)}, ValueError, r"images has shape \(1, 4, 5, 5\)"),
    ({"images": torch.rand(3, 5, 5)}, ValueError, "images has shape"),
    ({"images": torch.zeros(1, 3, 5, 5, dtype=torch.uint8)}, TypeError, "images is uint8"),
    ({"cams": torch.rand(1, 2, 5, 6)}, ValueError, r"cams has shape \(1, 2, 5, 6\)"),
    ({"cams": torch.zeros(1, 2, 5, 5, dtype=torch.int64)}, TypeError, "cams is int64"),
    ({"classes": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, r"classes \(1, 3\)"),
    ({"classes": torch.zeros(1, 2)}, TypeError, "classes is float32"),
    ({"live": torch.ones(1, 2)}, TypeError, "live is float32"),
    ({"size": (0, 4)}, ValueError, r"size is \(0, 4\)"),
    ({"iterations": -1}, ValueError, "iterations is -1"),
    ({"dilations": ()}, ValueError, "dilations is"),
    ({"dilations": (1, 0)}, ValueError, "dilations is"),
    ({"ignore_index": 256}, ValueError, "ignore_index is 256"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_REFINEMENT)
def test_bad_input_is_refused(change, error, message) -> None:
    arguments: dict[str, Any] = {
        "images": torch.rand(1, 3, 5, 5),
        "cams": torch.rand(1, 2, 5, 5),
        "classes": torch.zeros(1, 2, dtype=torch.int64),
        "live": torch.ones(1, 2, dtype=torch.bool),
        "size": (10, 10),
    }
    with pytest.raises(error, match=message):
        refine_pseudo_labels(**(arguments | change))


def test_float64_is_refused_by_the_kernels(triton_device) -> None:
    images = draw_images("noise", 1, 5, 5, torch.float64).to(triton_device)
    with pytest.raises(TypeError, match="images is float64"):
        pixel_adaptive_refinement(images, images)
