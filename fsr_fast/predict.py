"""Segment pictures: `fsr-fast predict --checkpoint RUN_OR_FILE IMAGES_OR_FOLDER… --output DIR`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fsr_fast.cli import run_command
from fsr_fast.errors import UserError
from fsr_fast.evaluation.crf import dense_crf
from fsr_fast.evaluation.inference import Prediction, read_picture, segment
from fsr_fast.models import load_network
from fsr_fast.options import Parser
from fsr_fast.reporting.figures import heatmap, overlay, save_palette_png
from fsr_fast.reporting.progress import track
from fsr_fast.reporting.tracking import write_json
from fsr_fast.runtime.distributed import start_process

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def main(arguments: Sequence[str]) -> None:
    """Predict as the arguments say."""
    options = build_parser().parse_args(arguments)
    pictures = find_pictures(options.images)
    network = load_network(options.checkpoint).to(start_process(options.device).device)
    scores = {}
    for name, path in track(pictures.items(), "predicting", len(pictures)):
        picture = read_picture(path)
        prediction = segment(network, picture)
        image = np.asarray(picture)
        mask = dense_crf(image, prediction.probabilities).argmax(0).astype(np.uint8) if options.crf else prediction.mask
        write_prediction(options.output, name, image, mask, prediction)
        scores[str(path)] = prediction.scores
    write_json(options.output / "scores.json", scores)
    print(f"{len(pictures)} pictures: masks, overlays, cams and scores.json in {options.output}")


def find_pictures(paths: Sequence[Path]) -> dict[str, Path]:
    """Give the pictures of files and folders by the name that their results get.

    Raises:
        UserError: a path is missing, a folder holds no picture, or two pictures have one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path}: no picture in this folder; expected {', '.join(SUFFIXES)}")
        for file in files:
            if file.stem in found:
                raise UserError(f"{file}: its results would overwrite those of {found[file.stem]}; rename one")
            found[file.stem] = file
    return found


def write_prediction(folder: Path, name: str, image: np.ndarray, mask: np.ndarray, prediction: Prediction) -> None:
    """Write mask (palette PNG), overlay and the CAM of each class that was found.

    Args:
        folder: results go to its `masks`, `overlays` and `cams`.
        name: of the files, without suffix.
        image: (H, W, 3), uint8.
        mask: (H, W), uint8.
        prediction: with the CAMs.
    """
    for part in ("masks", "overlays", "cams"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    save_palette_png(mask, folder / "masks" / f"{name}.png")
    Image.fromarray(overlay(image, mask)).save(folder / "overlays" / f"{name}.png")
    for class_name, cam in prediction.cams.items():
        Image.fromarray(heatmap(image, cam)).save(folder / "cams" / f"{name}_{class_name}.png")


def build_parser() -> Parser:
    """Give the parser of this verb."""
    parser = Parser("predict", description=__doc__)
    parser.add_argument("images", type=Path, nargs="+", help="pictures, or folders of pictures")
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder, checkpoint, official student.pth")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--crf", action="store_true", help="refine the masks by the dense CRF")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


if __name__ == "__main__":
    run_command(main)
