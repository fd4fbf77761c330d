"""Write label maps of a whole list, for multi-stage methods or the PASCAL VOC test server: `fsr-fast pseudo-labels`.

    OUTPUT/labels/NAME.png        PNG with VOC's palette; its values are the labels: 0 background, 1… the classes
    OUTPUT/confidence/NAME.png    8-bit greyscale, how certain each label is: 0 to 255 for 0 to 1
    OUTPUT/classes.txt            names of the labels from 0 on, one per line

With `--layout mmseg`, mmsegmentation and lightly-train can train on the folder as it is: the pictures are in
img_dir/LIST, the labels in ann_dir/LIST, as greyscale PNG; the lines for their configuration are printed.

Repeating an interrupted command resumes it, given the same weights and settings.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fsr_fast.cli import run_command
from fsr_fast.commands import parsers
from fsr_fast.commands.outputs import default_output
from fsr_fast.config import Config
from fsr_fast.dataloading.batch import ImageSet
from fsr_fast.dataloading.class_names import VOC_CLASSES
from fsr_fast.dataloading.datasets import SegmentationDataset, build_datasets, open_split
from fsr_fast.dataloading.images import check_name
from fsr_fast.dataloading.label_files import write_rows
from fsr_fast.dataloading.layout import bare_name, list_stem
from fsr_fast.errors import UserError
from fsr_fast.evaluation import handover
from fsr_fast.evaluation.archive import write_archive
from fsr_fast.evaluation.crf import require_pydensecrf
from fsr_fast.evaluation.evaluator import in_eval_mode
from fsr_fast.evaluation.journal import Journal, fingerprint
from fsr_fast.evaluation.predictions import Kind, Labels, predict_images
from fsr_fast.evaluation.samples import Failure
from fsr_fast.models import Network
from fsr_fast.models.build import Trained, open_trained
from fsr_fast.options import given
from fsr_fast.runtime.distributed import Process, start_process, stop_process, wait_for_all
from fsr_fast.runtime.files import write_png, write_text
from fsr_fast.runtime.outputs import output_folder
from fsr_fast.runtime.terminal import track

ROWS = 1024


def main(arguments: Sequence[str]) -> None:
    """Write label maps as the arguments say."""
    options = parsers.pseudo_labels().parse_args(arguments)
    options.output = options.output or default_output(options.checkpoint, "pseudo_labels")
    trained = open_trained(options.checkpoint, given(options), options.config, with_data=True)
    network, config = trained.network, trained.config
    if options.archive is not None:
        _check_archive_options(options, network)
    if options.kind == "seg+crf" and config.evaluate.crf_backend == "pydensecrf":
        require_pydensecrf()
    if options.unlabelled and options.kind == "pseudo" and not options.found:
        raise UserError("--unlabelled: pseudo labels show the classes of the image labels; add --found, or --kind seg")
    images = _open_images(trained, labelled=not options.unlabelled)
    process = start_process(config.run.device)
    try:
        list_name = list_stem(config.data.train_list)
        part = f"{handover.MASKS}/{list_name}" if options.layout == "mmseg" else "labels"
        failed = write_labels(
            network.to(process.device),
            images,
            config,
            process,
            options.kind,
            options.output,
            found=options.found,
            part=part,
        )
        if process.is_main and options.layout == "mmseg" and not failed:
            chosen = range(min(len(images.ids), config.evaluate.limit or len(images.ids)))
            ending = handover.lay_out_pictures(images, chosen, options.output, list_name, track=track)
            print(handover.configuration(options.output.absolute(), list_name, ending, network.classes), end="")
        if process.is_main and options.archive is not None and not failed:
            _write_archive(options, images, network, config.evaluate.limit)
        if process.is_main and options.layout == "plain" and not failed:
            print(f"next: look at {options.output / part}; --layout mmseg lays them out for training another network")
        if failed and process.is_main:
            name, message = next(iter(failed.items()))
            raise UserError(f"{len(failed)} images have no label map; the first is {name!r}: {message}")
    finally:
        stop_process()


def write_labels(
    network: Network,
    images: ImageSet,
    config: Config,
    process: Process,
    kind: Kind,
    folder: Path,
    *,
    found: bool = False,
    part: str = "labels",
) -> dict[str, str]:
    """Write the label map and the confidence of each image; every process writes its share.

    Args:
        network: on the device of `process`.
        images: the list.
        config: sections `evaluate`, `cam`, `data` and `run.amp`.
        process: this process.
        kind: `pseudo`, `seg` or `seg+crf`.
        folder: for `labels`, `confidence`, `classes.txt` and the journal.
        found: pseudo labels of the classes that the classifier finds, not of the image labels.
        part: folder of the label maps inside `folder`; they have colours in `labels` and are grey elsewhere.

    Returns:
        Why images could not be labelled, by name; complete on the first process, empty on the others.

    Raises:
        UserError: two images of the list would share a file, or one's would be outside the folder.
    """
    settings = config.evaluate.model_dump(mode="json", exclude={"crf_workers", "training_limit", "limit"})
    header: dict[str, Any] = {"classes": list(network.classes), "kind": kind, "found": found, "amp": config.run.amp}
    header |= {} if part == "labels" else {"part": part}
    header |= network.reading.settings()
    header |= {
        "root": str(config.data.root),
        "weights": fingerprint(network),
        "evaluate": settings,
        "cam": config.cam.model_dump(mode="json"),
    }
    names = [images.ids[index] for index in range(min(len(images.ids), config.evaluate.limit or len(images.ids)))]
    _check_names(names)
    results = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    with output_folder(folder, "pseudo-labels", results) if process.is_main else nullcontext():
        wait_for_all()  # nobody else writes
        journal = Journal(folder, process.rank, header)
        _write_share(journal, network, images, config, process, kind, names, part, labelled=not found)
        wait_for_all()
        if not process.is_main:
            return {}
        write_text(folder / "classes.txt", "\n".join(["background", *network.classes]) + "\n")
        failed = journal.failed()
        journal.join()
    print(f"{len(names) - len(failed)} label maps: {folder / part}\nconfidence: {folder / 'confidence'}")
    return failed


def _write_share(
    journal: Journal,
    network: Network,
    images: ImageSet,
    config: Config,
    process: Process,
    kind: Kind,
    names: Sequence[str],
    part: str,
    *,
    labelled: bool,
) -> None:
    share = [index for index, name in enumerate(names) if name not in journal.found]
    share = share[process.rank :: process.world_size]
    wait_for_all()  # every process has read the journal
    journal.open()
    with in_eval_mode(network):
        stream = predict_images(
            network, images, share, config, process.device, [kind], labelled=labelled, confidence=True
        )
        for result in track(stream, "labelling", len(share)):
            if isinstance(result, Failure):
                journal.write({"name": result.name, "error": result.message})
                continue
            _write_maps(journal.folder, part, result.sample.name, result.maps[kind])
            journal.write({"name": result.sample.name})
    journal.close()


def _open_images(trained: Trained, *, labelled: bool) -> ImageSet:
    data = trained.config.data
    if not labelled:
        if data.dataset == "voc":
            data = data.model_copy(update={"labels": "masks"})  # opened on demand, which never happens here
        split = open_split(data, training=True, with_masks=False)
        classes = trained.network.classes
        labels = np.zeros((len(split.ids), len(classes)), np.float32)
        values = np.arange(len(classes) + 1, dtype=np.uint8)
        return SegmentationDataset(split.files, split.ids, classes, labels, values, reading=trained.network.reading)
    images, _ = build_datasets(data, trained.network.reading)
    trained.match_classes(images.classes)
    return images


def _write_maps(folder: Path, part: str, name: str, found: Labels) -> None:
    """Write both pictures, each whole or not at all; what mmsegmentation reads is PNG, however large."""
    assert found.confidence is not None
    place, size = bare_name(name), (found.labels.shape[0], found.labels.shape[1])
    if part == "labels":
        write_rows(folder / part / place, size, [found.labels], colours=True)
    else:
        write_png(folder / part / f"{place}.png", Image.fromarray(found.labels))
    write_rows(folder / "confidence" / place, size, _as_bytes(found.confidence), colours=False)


def _as_bytes(confidence: np.ndarray) -> Iterator[np.ndarray]:
    """Bring 0…1 to 0…255, some rows at a time."""
    for top in range(0, len(confidence), ROWS):
        yield np.rint(255 * confidence[top : top + ROWS].clip(0, 1)).astype(np.uint8)


def _check_names(names: Sequence[str]) -> None:
    first: dict[str, str] = {}
    for name in names:
        check_name(name)
        other = first.setdefault(bare_name(name), name)
        if other != name:
            raise UserError(
                f"{name!r} and {other!r}: their label maps would have the same name; rename one of the images"
            )


def _check_archive_options(options: argparse.Namespace, network: Network) -> None:
    if options.layout != "plain":
        raise UserError("--archive: needs the labels in colours; leave out --layout")
    if options.kind == "pseudo":
        raise UserError("--archive: the test server scores segmentations; add --kind seg or --kind seg+crf")
    if len(network.classes) != len(VOC_CLASSES):
        raise UserError(
            f"--archive: the network has {len(network.classes)} classes; the test server expects the "
            f"{len(VOC_CLASSES)} of PASCAL VOC"
        )
    if options.archive.suffix not in (".tar", ".tgz", ".gz"):
        raise UserError(f"--archive: {options.archive} should end in .tar, .tgz or .tar.gz")
    if options.archive.exists():
        raise UserError(f"--archive: {options.archive} exists; delete it or give another name")


def _write_archive(options: argparse.Namespace, images: ImageSet, network: Network, limit: int | None) -> None:
    count = min(len(images.ids), limit or len(images.ids))
    names = [bare_name(images.ids[index]) for index in range(count)]
    sizes = {name: images.image(index).size for index, name in enumerate(names)}
    write_archive(options.archive, options.output / "labels", sizes, len(network.classes))
    print(f"archive: {options.archive}, {count} files, read back and checked")


if __name__ == "__main__":
    run_command(main)
