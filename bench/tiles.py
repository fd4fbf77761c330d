"""Large pictures in tiles: how far the labels differ from those of the whole picture, and the cost.

``python -m bench.tiles quality --checkpoint RUN`` composes pictures from the demonstration's creatures, or uses the
photographs of ``--pictures FOLDER``, and segments each as a whole and in tiles of several sizes and overlaps. It counts
the pixels whose label differs: of all, of those beside a seam, of those where the whole picture's own two likeliest
classes are a tenth or more apart, and in the pseudo labels. Of creatures, it scores both against the masks.
``--show FOLDER`` writes pictures to look at. ``FSR_RECORD=1`` writes ``bench/results/<device>/tiles.json``.

``python -m bench.tiles cost --megapixels N`` segments one picture and prints seconds and peak memory as JSON; memory is
the process's, so each measurement is a process. ``bench/test_evaluation.py`` runs it.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.harness import record
from fsr_fast import load_network, segment
from fsr_fast.cli import run_command
from fsr_fast.config import CONFIG_FOLDER, CamConfig, Config, EvaluateConfig, build_config, read_yaml
from fsr_fast.dataloading.creatures import KINDS, SIZE, draw_scene
from fsr_fast.dataloading.palette import voc_palette
from fsr_fast.evaluation.inference import inference_settings
from fsr_fast.evaluation.large import Cut, LargePicture, plan_picture
from fsr_fast.evaluation.metrics import ConfusionMatrix, scores
from fsr_fast.evaluation.tiling import plan_tiles
from fsr_fast.models import Network, build_network

SCENES = 60  # drawn once; a mosaic repeats them
SURE = 0.1  # difference of the two likeliest classes' probabilities
BESIDE = 4  # pixels


def mosaic(rows: int, columns: int, seed: int = 11) -> tuple[np.ndarray, np.ndarray]:
    """Compose a picture of creatures, and its mask, from rows and columns of the data set's pictures."""
    scenes = [draw_scene(seed, number) for number in range(min(SCENES, rows * columns))]
    places = np.random.default_rng(seed).integers(len(scenes), size=(rows, columns))
    if rows * columns <= SCENES:
        places = np.arange(rows * columns).reshape(rows, columns)
    image, mask = (
        np.concatenate([np.concatenate([getattr(scenes[place], part) for place in row], 1) for row in places])
        for part in ("image", "mask")
    )
    return image, mask


def pictures_of(folder: Path | None, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Return the pictures, and their masks if known."""
    if folder is None:
        yield from (mosaic(6, 8, seed) for seed in range(limit))
        return
    for path in sorted(folder.glob("*.jpg"))[:limit]:
        with Image.open(path) as picture:
            yield np.asarray(picture.convert("RGB")), None


def seams(size: tuple[int, int], side: int, overlap: float, patch: int) -> np.ndarray:
    """Return where a tile ends within the picture, with the pixels beside it."""
    plan, found = plan_tiles(size, side, overlap, patch), np.zeros(size, bool)
    for spans, lines in ((plan.rows, found), (plan.columns, found.T)):
        for start in spans.starts:
            for edge in (start, start + spans.side):
                if 0 < edge < spans.length:
                    lines[max(0, edge - BESIDE) : edge + BESIDE] = True
    return found


def pseudo_labels(network: Network, image: np.ndarray, cut: Cut, shown: Tensor) -> np.ndarray:
    """Label a picture by the CAMs of the classes that it shows."""
    options = {"cam_scales": CamConfig().scales, "scales": (), "flip": True, "amp": "auto"}
    picture = LargePicture(network, image, cut, shown, cams="all", **options)
    return np.concatenate([strip.map.labels for strip in picture.strips(["pseudo"], 0.5)])


def compare_tilings(
    network: Network,
    folder: Path | None,
    limit: int,
    sides: Sequence[int],
    overlaps: Sequence[float],
    show: Path | None,
) -> dict[str, Any]:
    """Segment pictures whole and in tiles."""
    patch = network.encoder.patch_size
    rows: dict[tuple[int, float], list[list[float]]] = {}
    matrices = {"whole": ConfusionMatrix(len(network.classes))}
    for number, (image, truth) in enumerate(pictures_of(folder, limit)):
        whole = segment(network, image, side=None, tile=None)
        shown = torch.tensor([float(name in whole.cams) for name in network.classes])
        one = plan_tiles(image.shape[:2], max(image.shape), 0.0)
        labels = pseudo_labels(network, image, Cut(one, one, 1.0), shown)
        if truth is not None:
            matrices["whole"].update(whole.mask, truth)
        best = np.sort(whole.probabilities, 0)
        sure = best[-1] - best[-2] >= SURE
        for side in (side for side in sides if side < max(image.shape[:2])):
            for overlap in overlaps:
                tiled = segment(network, image, side=None, tile=side, overlap=overlap)
                differ = tiled.mask != whole.mask
                beside = seams(image.shape[:2], -(-side // patch) * patch, overlap, patch)
                cut = plan_picture(EvaluateConfig(side=None, tile=side, overlap=overlap), network, image.shape[:2])
                assert cut is not None
                found = pseudo_labels(network, image, cut, shown)
                parts = [differ.mean(), differ[beside].mean(), differ[~beside].mean(), differ[sure].mean()]
                parts.append((found != labels).mean())
                rows.setdefault((side, overlap), []).append([100 * float(part) for part in parts])
                if truth is not None:
                    matrix = matrices.setdefault(f"{side} {overlap}", ConfusionMatrix(len(network.classes)))
                    matrix.update(tiled.mask, truth)
                if show is not None and number == 0:
                    panels = [image, voc_palette()[whole.mask], voc_palette()[tiled.mask]]
                    show.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(np.concatenate(panels, 1)).save(show / f"tile_{side}_{overlap}.png")
    columns = ("differ", "beside_seams", "elsewhere", "where_sure", "pseudo_differ")
    return {
        "whole_mean_iou": _mean_iou(matrices["whole"], network),
        "tilings": [
            {
                "tile": side,
                "overlap": overlap,
                "pictures": len(parts),
                **dict(zip(columns, np.mean(parts, 0).tolist(), strict=True)),
                "mean_iou": _mean_iou(matrices.get(f"{side} {overlap}"), network),
            }
            for (side, overlap), parts in sorted(rows.items())
        ],
    }


def _mean_iou(matrix: ConfusionMatrix | None, network: Network) -> float | None:
    if matrix is None or not matrix.counts.any():
        return None
    return float(scores(matrix, network.classes)["mean_iou"])


def demonstration() -> tuple[Network, Config]:
    """Build the demonstration's network from random weights: the cost does not depend on them."""
    config = build_config(read_yaml(CONFIG_FOLDER / "synthetic.yaml"), "the bench")
    torch.manual_seed(0)
    classes = tuple(kind.name for kind in KINDS)
    return build_network(config.model, classes, config.data.image_size).eval(), config


def measure_cost(megapixels: float, tile: int | None, overlap: float) -> dict[str, float]:
    """Segment one picture of creatures, in 4:3, discarding its labels."""
    network, config = demonstration()
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    width = round(megapixels * 1e6 / height)
    image = mosaic(-(-height // SIZE), -(-width // SIZE))[0][:height, :width]
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cut = plan_picture(EvaluateConfig(side=None, tile=tile, overlap=overlap), network, (height, width))
    if cut is None:  # whole, but read off alike
        one = plan_tiles((height, width), width, 0.0)
        cut = Cut(one, one, 1.0)
    began = time.perf_counter()
    picture = LargePicture(network, image, cut, None, **inference_settings(config))
    for _ in picture.strips(["seg"], 0.5):
        pass
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"megapixels": height * width / 1e6, "seconds": seconds, "start_mib": start, "peak_mib": peak}


def main(arguments: Sequence[str]) -> None:
    """Run the requested measurement."""
    parser = argparse.ArgumentParser(prog="python -m bench.tiles", description=__doc__)
    parser.add_argument("what", choices=("quality", "cost"))
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--tiles", type=int, nargs="+", default=[128, 192, 256, 384])
    parser.add_argument("--overlaps", type=float, nargs="+", default=[0.0, 0.25, 0.5])
    parser.add_argument("--show", type=Path)
    parser.add_argument("--megapixels", type=float, default=1.0)
    parser.add_argument("--tile", type=int, help="default: whole")
    parser.add_argument("--overlap", type=float, default=0.25)
    options = parser.parse_args(arguments)
    if options.what == "cost":
        torch.set_num_threads(1)
        print(json.dumps(measure_cost(options.megapixels, options.tile, options.overlap)))
        return
    network = load_network(options.checkpoint)
    chosen = options.pictures, options.limit, options.tiles, options.overlaps
    found = compare_tilings(network, *chosen, options.show)
    kind = "photographs" if options.pictures else "creatures"
    for row in found["tilings"]:
        print(
            ", ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    print(f"whole: mean IoU {found['whole_mean_iou']}")
    record(f"tiles {kind}", torch.device("cpu"), found)


if __name__ == "__main__":
    run_command(main)
