"""Segment pictures: `fsr-fast predict --checkpoint RUN PICTURES… --output DIR`.

Writes masks (palette PNG: the pixel value is the class), overlays, a heat map for each class that is found, and the
probability and area of each class as scores.json and results.csv. The mask of a GeoTIFF is also written as GeoTIFF.
"""

import argparse
import csv
import hashlib
import io
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from fsr_fast.cli import run_command
from fsr_fast.commands import parsers
from fsr_fast.commands.outputs import default_output
from fsr_fast.commands.predict_large import Large, open_large, write_large
from fsr_fast.config import Config
from fsr_fast.dataloading.images import LONGEST
from fsr_fast.dataloading.label_files import write_rows
from fsr_fast.dataloading.pictures import find_pictures
from fsr_fast.dataloading.tiff import geo_tags
from fsr_fast.errors import UserError
from fsr_fast.evaluation.crf import dense_crf
from fsr_fast.evaluation.inference import Prediction, read_picture, segment_batch
from fsr_fast.evaluation.journal import fingerprint
from fsr_fast.models import Network
from fsr_fast.models.build import open_trained
from fsr_fast.options import given
from fsr_fast.reporting.figures import heatmap, outline, overlay, with_legend
from fsr_fast.runtime.distributed import start_process
from fsr_fast.runtime.files import write_json, write_png, write_text
from fsr_fast.runtime.outputs import output_folder
from fsr_fast.runtime.terminal import track


def main(arguments: Sequence[str]) -> None:
    """Predict as the arguments say."""
    options = parsers.predict().parse_args(arguments)
    if not 0 <= options.opacity <= 1:
        raise UserError(f"--opacity: {options.opacity}; expected 0 to 1")
    if options.batch < 1:
        raise UserError(f"--batch: {options.batch}; expected 1 or more")
    options.output = options.output or default_output(options.checkpoint, "predictions")
    pictures = find_pictures(options.images, options.output)
    network, config, *_ = open_trained(options.checkpoint, given(options), options.config)
    network.to(start_process(config.run.device).device)
    with output_folder(options.output, "predict", fingerprint(network)):
        failed = _write_all(network, pictures, options, config)
    count = len(pictures) - len(failed)
    results = f"masks, overlays, cams, scores.json, results.csv in {options.output}"
    print(f"{count} picture{'s' * (count != 1)}: {results}")
    if failed:
        raise UserError(f"{len(failed)} of {len(pictures)} pictures have no mask; the first: {failed[0]}")
    print(f"next: look at {options.output / 'overlays'}")


def _write_all(
    network: Network, pictures: dict[str, Path], options: argparse.Namespace, config: Config
) -> list[UserError]:
    """Write all results; scores.json, written last, marks them as complete.

    Returns:
        Why pictures could not be read.

    Raises:
        UserError: none of them could be read.
    """
    failed: list[UserError] = []
    scores: dict[str, dict[str, dict[str, float]]] = {}
    rows = [["picture", "class", "score", "pixels"]]
    legend = network.classes if options.legend else None
    results = _predict(network, pictures, options.batch, config, failed)
    for name, picture, prediction in track(results, "predicting", len(pictures)):
        if not scores:
            (options.output / "scores.json").unlink(
                missing_ok=True
            )  # of an earlier run, whose results are replaced now
        map_of = partial(map_name, name, pictures=pictures, classes=network.classes)
        draw = partial(write_views, options.output, name, map_of=map_of, opacity=options.opacity, legend=legend)
        if isinstance(picture, Large):
            found, areas = write_large(options.output, name, picture, network, config, crf=options.crf, draw=draw)
        else:
            assert prediction is not None
            image, found, mask = network.reading.colours(picture), prediction.scores, prediction.mask
            if options.crf:
                backend, device = config.evaluate.crf_backend, network.top_classifier.weight.device
                refined = dense_crf(image, prediction.probabilities, backend=backend, device=device)
                mask = refined.argmax(0).astype(np.uint8)
            ground = geo_tags(pictures[name])
            write_rows(options.output / "masks" / name, mask.shape, [mask], colours=True, tags=ground)
            draw(image, mask, prediction.cams)
            areas = np.bincount(mask.ravel(), minlength=len(network.classes) + 1)
        pixels = dict(zip(["background", *network.classes], areas.tolist(), strict=True))
        scores[str(pictures[name])] = {"scores": found, "pixels": pixels}
        for class_name, area in pixels.items():
            score = found.get(class_name)
            rows.append([str(pictures[name]), class_name, "" if score is None else f"{score:.6f}", str(area)])
    if not scores:
        raise failed[0]
    write_text(options.output / "results.csv", _table(rows))
    write_json(options.output / "scores.json", scores)
    return failed


def write_views(
    folder: Path,
    name: str,
    image: np.ndarray,
    mask: np.ndarray,
    cams: dict[str, np.ndarray],
    *,
    map_of: Callable[[str], str],
    opacity: float = 0.6,
    legend: Sequence[str] | None = None,
) -> None:
    """Write the overlay, and the CAM of each class that was found.

    Args:
        folder: results go to its `overlays` and `cams`.
        name: of the files, without suffix.
        image: (H, W, 3), uint8.
        mask: (H, W), uint8.
        cams: (H, W), float32, by name of the class.
        map_of: returns the name of a class's CAM, without suffix.
        opacity: of mask and CAM over the picture, 0 to 1.
        legend: names of the classes, for a legend above the overlay; None: no legend.
    """
    shown = overlay(image, mask, opacity)
    shown = outline(shown, mask) if opacity else shown
    labels = [int(label) for label in np.unique(mask) if label]
    picture = Image.fromarray(shown) if legend is None else with_legend(shown, labels, legend)
    write_png(folder / "overlays" / f"{name}.png", picture)
    for class_name, cam in cams.items():
        shown = heatmap(image, cam, opacity)
        write_png(folder / "cams" / f"{map_of(class_name)}.png", Image.fromarray(shown))


def map_name(name: str, class_name: str, pictures: Collection[str], classes: Iterable[str]) -> str:
    """Return the name of a heat map's file, without suffix: `NAME_CLASS`.

    If that is too long or ambiguous, such as for the classes `a/b` and `a_b`, or the pictures `a` and `a_b` with the
    classes `b_c` and `c`, it ends with a digest of both.

    Args:
        name: of the picture.
        class_name: of the class.
        pictures: names of all pictures.
        classes: of the network.
    """
    plain = f"{name}_{_in_one_name(class_name)}"
    endings = [f"_{_in_one_name(other)}" for other in classes]
    meanings = sum(plain.endswith(ending) and plain.removesuffix(ending) in pictures for ending in endings)
    folder, _, last = plain.rpartition("/")
    content = last.encode()
    if meanings < 2 and len(content) <= LONGEST:
        return plain
    digest = hashlib.sha256(f"{name}\n{class_name}".encode()).hexdigest()[:8]
    return str(Path(folder) / f"{content[: LONGEST - 9].decode(errors='ignore')}-{digest}")


def _in_one_name(class_name: str) -> str:
    return class_name.replace("/", "_")


def _table(rows: Iterable[Sequence[str]]) -> str:
    """Format rows as CSV, for spreadsheets."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _predict(
    network: Network, pictures: dict[str, Path], batch: int, config: Config, failed: list[UserError]
) -> Iterator[tuple[str, np.ndarray | Large, Prediction | None]]:
    """Return the pictures with their predictions; those that are written in bands, without."""
    for group in _batches(network, pictures, batch, config, failed):
        if isinstance(group[0][1], Large):
            yield from ((name, picture, None) for name, picture in group)
            continue
        small = [picture for _, picture in group if isinstance(picture, np.ndarray)]
        for (name, picture), prediction in zip(group, segment_batch(network, small, config), strict=True):
            yield name, picture, prediction


def _alike(first: np.ndarray | Large, second: np.ndarray | Large) -> bool:
    """Return whether two pictures can pass together."""
    return isinstance(first, np.ndarray) and isinstance(second, np.ndarray) and first.shape == second.shape


def _batches(
    network: Network, pictures: dict[str, Path], largest: int, config: Config, failed: list[UserError]
) -> Iterator[list[tuple[str, np.ndarray | Large]]]:
    """Gather neighbours of one size; large pictures alone."""
    batch: list[tuple[str, np.ndarray | Large]] = []
    for name, path in pictures.items():
        try:
            picture: np.ndarray | Large | None = open_large(path, network, config)
            picture = read_picture(path, reading=network.reading) if picture is None else picture
        except UserError as error:
            failed.append(error)
            continue
        if batch and (len(batch) == largest or not _alike(batch[0][1], picture)):
            yield batch
            batch = []
        batch.append((name, picture))
    if batch:
        yield batch


if __name__ == "__main__":
    run_command(main)
