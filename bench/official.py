"""The official code beside ours, from your own clone: `python -m bench.official --path CLONE`.

Network, operations and training loop of the clone run in this process, as they are, on a CPU and in float64. Nothing
of them is kept. What they import but do not use here (a GPU, data sets, downloads, libraries for pictures and tables)
is replaced by stand-ins. The energy's lattice is compared if the clone's extension for it is built; the loop sums
exact Gaussians on both sides.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bench.clone import BATCH, CLASSES, PATCH, SIDE, build_official, float64, image_labels, official_code, relative
from bench.harness import present_commit, record
from bench.markdown import table
from bench.official_loop import compare_loops, read_recipe
from fsr_fast import reference
from fsr_fast.cli import run_command
from fsr_fast.errors import UserError
from fsr_fast.kernels import MergedCams
from fsr_fast.method.cam import merge_passes, merged_labels, multi_scale_passes, resize_images
from fsr_fast.method.losses import affinity_loss, energy_loss, segmentation_loss
from fsr_fast.method.pseudo_labels import generate_pseudo_labels, half_size
from fsr_fast.models import Network, load_network

SCALES = (1.0, 0.5, 1.5)


def main(arguments: list[str]) -> None:
    """Compare and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.official", description=__doc__.partition("\n")[0])
    parser.add_argument("--path", type=Path, required=True, help="clone of the official code")
    parser.add_argument("--pictures", type=Path, nargs=2 * BATCH, help=f"{2 * BATCH} pictures; else coloured noise")
    parser.add_argument("--iterations", type=int, default=12, help="of the training loop (12)")
    parser.add_argument("--json", type=Path, help="also write the differences to this file")
    options = parser.parse_args(arguments)
    if options.iterations < 1:
        raise UserError(f"--iterations: {options.iterations}; expected 1 or more")
    with float64(), official_code(options.path) as (code, lattice):
        differences = compare(code, draw_views(options.pictures), options.iterations)
    energy = (
        "the clone's lattice, in the loop exact Gaussians" if lattice else "exact Gaussians in place of the lattice"
    )
    print(f"Largest difference, relative to the largest value; energy: {energy}\n")
    print(table(("what", "difference"), ((name, f"{value:.1e}") for name, value in differences.items()), right=1))
    content = {"energy": energy, "iterations": options.iterations, "differences": differences}
    if options.json:
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    pictures = "photographs" if options.pictures else "coloured noise"
    setting = {"official_commit": present_commit(options.path), "pictures": pictures}
    record("official", torch.device("cpu"), {**setting, **content})


def compare(code: SimpleNamespace, views: tuple[Tensor, Tensor], iterations: int) -> dict[str, float]:
    """Return the largest relative difference of every quantity, by its name."""
    torch.manual_seed(0)
    student, teacher = build_official(code), build_official(code)
    ours = to_ours(student)
    differences = {f"network: {name}": value for name, value in compare_networks(student, ours, views[0]).items()}
    differences |= {f"operation: {name}": relative(*pair) for name, pair in operations(code, student, ours, views)}
    teacher.load_state_dict(student.state_dict())
    loops = compare_loops(code, student, teacher, views, iterations)
    return differences | {f"loop: {name}": value for name, value in loops.items()}


# --- the two sides


def to_ours(network: Any) -> Network:
    """Convert an official network as if from its checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(network.state_dict(), Path(folder) / "student.pth")
        return load_network(Path(folder) / "student.pth").double()


def read_picture(file: Path) -> np.ndarray[Any, Any]:
    """Return a picture (SIDE, SIDE, 3), uint8."""
    try:
        return np.asarray(Image.open(file).convert("RGB").resize((SIDE, SIDE)))
    except OSError as error:
        raise UserError(f"--pictures: {file} cannot be read: {error}; give JPEG or PNG files") from None


def draw_views(pictures: list[Path] | None) -> tuple[Tensor, Tensor]:
    """Return two normalised views (B, 3, H, W) of pictures, or of coloured noise."""
    if pictures:
        images = [read_picture(file) for file in pictures]
        levels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).double() / 255
    else:
        noise = torch.rand(2 * BATCH, 3, 7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        levels = F.interpolate(noise, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    # half a grey level away from whole ones, where the last bit would decide
    first, second = (((levels * 255).floor() + 0.5) / 255 - mean).div(std).chunk(2)
    return first, second


# --- network and operations


@torch.no_grad()
def compare_networks(theirs: Any, ours: Network, images: Tensor) -> dict[str, float]:
    """Compare all outputs of one pass."""
    found, expected = ours(images), theirs(images)
    head = F.normalize(ours.projector.head, dim=-1)
    tokens = torch.cat([found.class_token[:, None], found.patch_features.flatten(2).transpose(1, 2)], dim=1)
    pairs = {
        "class logits": (found.class_logits, expected["top_cls_out"]),
        "auxiliary class logits": (found.aux_class_logits, expected["aux_cls_out"]),
        "segmentation logits": (found.seg_logits, expected["seg_out"]),
        "CAM": (found.cam, expected["top_cam"]),
        "auxiliary CAM": (found.aux_cam, expected["aux_cam"]),
        "prototype logits of all tokens": (ours.projector(tokens) @ head.T, expected["project_out"]),
    }
    return {name: relative(*pair) for name, pair in pairs.items()}


def operations(
    code: SimpleNamespace, student: Any, ours: Network, views: tuple[Tensor, Tensor]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yield operations by name: ours, theirs."""
    train, labels, size = code.train, image_labels(), (SIDE, SIDE)
    every = torch.ones(BATCH, CLASSES)
    with torch.no_grad():
        passes = multi_scale_passes(ours.encoder, views[0], SCALES)
        cam, aux_cam = train.multi_scale_cam(student, views[0], scales=SCALES)
        for name, expected in (("top", cam), ("aux", aux_cam)):
            found = merge_passes(ours, passes, every, classifier=name, max_classes=CLASSES, size=size).values  # type: ignore[arg-type]
            yield f"multi-scale CAM, {name}", (found, expected)
        pictures = train.imutils.denormalize_img2(views[0].clone())
        yield "picture, denormalised", (ours.denormalise(views[0]) / 255, pictures)
        labelled, _ = train.cam_to_label(cam, labels, ignore_mid=True, high_thre=0.7, low_thre=0.25, ignore_index=255)
        expected_labels = train.refine_cams_with_bkg_v2(
            train.PAR(num_iter=10, dilations=[1, 2, 4, 8, 12, 24]).double(),
            pictures.double(),
            cams=labelled,
            cls_labels=labels,
            high_thre=0.7,
            low_thre=0.25,
            ignore_index=255,
        )
        classes, live = reference.present_classes(labels, max_classes=2)
        index = classes[:, :, None, None].expand(-1, -1, *half_size(size))
        values = resize_images(cam, half_size(size)).gather(1, index) * live[:, :, None, None]
        recipe = read_recipe(ours.state_dict())
        found_labels = generate_pseudo_labels(
            ours.denormalise(views[0]), MergedCams(values, classes, live), recipe.pseudo_label
        )
        yield "pseudo labels", (found_labels, expected_labels)
        low = (SIDE // PATCH,) * 2
        _, patch_labels = train.cam_to_label(
            F.interpolate(aux_cam, size=low, mode="bilinear", align_corners=False),
            labels,
            ignore_mid=True,
            high_thre=0.7,
            low_thre=0.25,
            ignore_index=255,
        )
        spread = torch.gather(resize_images(aux_cam, low), 1, classes[:, :, None, None].expand(-1, -1, *low))
        own = merged_labels(MergedCams(spread * live[:, :, None, None], classes, live), high=0.7, low=0.25)
        yield "labels of patches", (own, patch_labels)
        output = student(views[0])
    features, logits = output["top_fmap"], output["seg_out"]
    yield from with_gradient(
        "affinity loss",
        features,
        lambda one: affinity_loss(one.flatten(2).transpose(1, 2), patch_labels.flatten(1)),
        lambda one: train.get_masked_ptc_loss(one, train.label_to_aff_mask(patch_labels)),
    )

    def full(one: Tensor) -> Tensor:
        return F.interpolate(one, size=size, mode="bilinear", align_corners=False)

    yield from with_gradient(
        "segmentation loss",
        logits,
        lambda one: segmentation_loss(one, expected_labels.to(torch.uint8)),
        lambda one: train.get_seg_loss(full(one), expected_labels.long(), ignore_index=255),
    )
    layer = train.DenseEnergyLoss(weight=1e-7, sigma_rgb=15, sigma_xy=100, scale_factor=0.5)
    yield from with_gradient(
        "dense energy",
        logits,
        lambda one: energy_loss(one, ours.grey_levels(views[0]), expected_labels.to(torch.uint8)),
        lambda one: train.get_energy_loss(
            img=views[0], logit=full(one), label=expected_labels, img_box=None, loss_layer=layer
        ).double(),
    )


def with_gradient(
    name: str, values: Tensor, ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yield a loss and its gradient."""
    mine, their = (values.detach().clone().requires_grad_() for _ in range(2))
    losses = ours(mine).sum(), theirs(their).sum()
    for loss in losses:
        loss.backward()
    assert mine.grad is not None
    assert their.grad is not None
    yield name, losses
    yield f"{name}, gradient", (mine.grad, their.grad)


if __name__ == "__main__":
    run_command(lambda arguments: main(list(arguments)))
