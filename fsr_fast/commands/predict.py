"""Segment pictures: `fsr-fast predict --checkpoint RUN PICTURES… --output DIR`.

Writes masks (palette PNG: the pixel value is the class), overlays, a heat map for each class that is taken to be
there, and scores.json.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fsr_fast.cli import run_command
from fsr_fast.dataloading.palette import save_palette_png
from fsr_fast.dataloading.pictures import find_pictures
from fsr_fast.errors import UserError
from fsr_fast.evaluation.crf import dense_crf
from fsr_fast.evaluation.inference import Prediction, read_picture, segment_batch
from fsr_fast.evaluation.journal import fingerprint
from fsr_fast.models import Network, load_network
from fsr_fast.options import Parser
from fsr_fast.reporting.figures import heatmap, overlay, with_legend
from fsr_fast.runtime.distributed import start_process
from fsr_fast.runtime.files import write_json, write_png
from fsr_fast.runtime.outputs import output_folder
from fsr_fast.runtime.terminal import track


def main(arguments: Sequence[str]) -> None:
    """Predict as the arguments say."""
    options = build_parser().parse_args(arguments)
    if not 0 <= options.opacity <= 1:
        raise UserError(f"--opacity: {options.opacity}; expected 0 to 1")
    if options.batch < 1:
        raise UserError(f"--batch: {options.batch}; expected 1 or more")
    pictures = find_pictures(options.images, options.output)
    network = load_network(options.checkpoint).to(start_process(options.device).device)
    with output_folder(options.output, "predict", fingerprint(network)):
        failed = _write_all(network, pictures, options)
    print(f"{len(pictures) - len(failed)} pictures: masks, overlays, cams and scores.json in {options.output}")
    if failed:
        raise UserError(f"{len(failed)} of {len(pictures)} pictures have no mask; the first: {failed[0]}")


def _write_all(network: Network, pictures: dict[str, Path], options: argparse.Namespace) -> list[UserError]:
    """Write all results; scores.json, the last of them, says that they are complete.

    Returns:
        What kept pictures from being read.

    Raises:
        UserError: none of them could be read.
    """
    failed: list[UserError] = []
    scores: dict[str, dict[str, float]] = {}
    legend = network.classes if options.legend else None
    results = _predict(network, pictures, options.batch, failed)
    for name, picture, prediction in track(results, "predicting", len(pictures)):
        if not scores:
            (options.output / "scores.json").unlink(missing_ok=True)  # of an earlier run, whose results go now
        image, mask = np.asarray(picture), prediction.mask
        if options.crf:
            mask = dense_crf(image, prediction.probabilities).argmax(0).astype(np.uint8)
        write_prediction(options.output, name, image, mask, prediction, opacity=options.opacity, legend=legend)
        scores[str(pictures[name])] = prediction.scores
    if not scores:
        raise failed[0]
    write_json(options.output / "scores.json", scores)
    return failed


def write_prediction(
    folder: Path,
    name: str,
    image: np.ndarray,
    mask: np.ndarray,
    prediction: Prediction,
    *,
    opacity: float = 0.6,
    legend: Sequence[str] | None = None,
) -> None:
    """Write mask (palette PNG), overlay and the CAM of each class that was found.

    Args:
        folder: results go to its `masks`, `overlays` and `cams`.
        name: of the files, without suffix.
        image: (H, W, 3), uint8.
        mask: (H, W), uint8.
        prediction: with the CAMs.
        opacity: of mask and CAM over the picture, 0 to 1.
        legend: names of the classes, to be put below the overlay; none: no legend.
    """
    save_palette_png(mask, folder / "masks" / f"{name}.png")
    shown = overlay(image, mask, opacity)
    labels = [int(label) for label in np.unique(mask) if label]
    picture = Image.fromarray(shown) if legend is None else with_legend(shown, labels, legend)
    write_png(folder / "overlays" / f"{name}.png", picture)
    for class_name, cam in prediction.cams.items():
        shown = heatmap(image, cam, opacity)
        write_png(folder / "cams" / f"{name}_{class_name.replace('/', '_')}.png", Image.fromarray(shown))


def _predict(
    network: Network, pictures: dict[str, Path], batch: int, failed: list[UserError]
) -> Iterator[tuple[str, Image.Image, Prediction]]:
    for group in _batches(pictures, batch, failed):
        predictions = segment_batch(network, [picture for _, picture in group])
        for (name, picture), prediction in zip(group, predictions, strict=True):
            yield name, picture, prediction


def _batches(
    pictures: dict[str, Path], largest: int, failed: list[UserError]
) -> Iterator[list[tuple[str, Image.Image]]]:
    """Gather neighbours of one size."""
    batch: list[tuple[str, Image.Image]] = []
    for name, path in pictures.items():
        try:
            picture = read_picture(path)
        except UserError as error:
            failed.append(error)
            continue
        if batch and (len(batch) == largest or batch[0][1].size != picture.size):
            yield batch
            batch = []
        batch.append((name, picture))
    if batch:
        yield batch


def build_parser() -> Parser:
    """Build the parser of this verb."""
    parser = Parser("predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="pictures, folders of pictures, or patterns such as 'trip/*.jpg'")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="run folder, checkpoint, exported folder, official student.pth"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--crf", action="store_true", help="refine the masks by the dense CRF")
    parser.add_argument("--opacity", type=float, default=0.6, help="of the colours over the pictures, 0 to 1")
    parser.add_argument("--legend", action="store_true", help="name the colours below the overlays")
    parser.add_argument("--batch", type=int, default=4, help="largest number of pictures of one size in one pass")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


if __name__ == "__main__":
    run_command(main)
