"""`fsr-fast data import`: turn a labelling tool's export or a spreadsheet into the table of an own data set."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from fsr_fast.dataloading.exports import LABELMAP, match_pictures, read_export
from fsr_fast.dataloading.labels import write_csv, write_new
from fsr_fast.dataloading.masks import convert_coloured_masks
from fsr_fast.dataloading.notes import Notes
from fsr_fast.dataloading.own import read_classes, refuse_background
from fsr_fast.errors import UserError, printable
from fsr_fast.runtime.terminal import track


def import_labels(options: argparse.Namespace) -> None:
    """Turn a labelling tool's export or a spreadsheet into the table of own pictures in ROOT/images."""
    source, root, notes = options.source, options.output, Notes()
    images, target = root / "images", root / f"{options.list}.csv"
    if not images.is_dir():
        raise UserError(f"{images}: no such folder; put the pictures there first, in subfolders if you like")
    for path in (target, root / "masks"):
        if path.exists() and (path == target or (source / LABELMAP).is_file()):
            raise UserError(f"{path} exists; delete it, or give another --list NAME")
    if source.is_dir() and (source / LABELMAP).is_file():
        export = convert_coloured_masks(source, images, root / "masks", notes, track=track)
    else:
        export = read_export(
            source, notes, encoding=options.encoding, separator=options.separator, image=options.image_column
        )
    shown = export.shown
    if export.silent and options.empty is None:
        raise UserError(
            f"{source}: says nothing about {len(export.silent)} of {len(shown)} pictures, for example "
            f"{export.silent[0]!r}: give --empty background (they show no class) or --empty skip (not labelled yet)"
        )
    if options.empty == "skip":
        shown = {name: names for name, names in shown.items() if name not in set(export.silent)}
    pictures = match_pictures(shown, images, notes)
    classes = _agree_on_classes(root, export.classes)
    count = write_csv(target, ((pictures[name], names) for name, names in shown.items()))
    print_notes(notes)
    for name in classes:
        print(f"{name}: {sum(name in names for names in shown.values())} pictures")
    print(f"no class: {sum(not names for names in shown.values())} pictures")
    print(f"{target}: labels of {count} pictures; next: fsr-fast data check {root}")


def _agree_on_classes(root: Path, found: list[str]) -> list[str]:
    """Return the classes of classes.txt, which is written if there is none."""
    path = root / "classes.txt"
    for name in found:
        refuse_background(name, "the export")
    if not path.exists():
        write_new(path, "".join(f"{name}\n" for name in found))
        return found
    known = read_classes(root)
    missing = [name for name in found if name.replace(" ", "_") not in {other.replace(" ", "_") for other in known}]
    if missing:
        raise UserError(f"{path}: lacks {missing[0]!r}, which the export holds; add it at the end, or rename it there")
    return known


def print_notes(notes: Iterable[str]) -> None:
    """Print what was inferred in reading a data set."""
    for note in notes:
        print(f"read as: {printable(note)}")
