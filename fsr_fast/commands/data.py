"""Prepare data sets: check them, derive image labels, build masks, pack shards."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich import print as rich_print
from rich.markup import escape
from rich.table import Table

from fsr_fast.cli import run_command
from fsr_fast.commands import parsers
from fsr_fast.commands.data_import import import_labels, print_notes
from fsr_fast.config import DataConfig, build_config
from fsr_fast.dataloading.check import Report, check_dataset, write_clean_lists
from fsr_fast.dataloading.class_names import COCO_CLASSES, VOC_CLASSES
from fsr_fast.dataloading.coco import Instances
from fsr_fast.dataloading.datasets import open_split
from fsr_fast.dataloading.detect import default_lists, detect_dataset
from fsr_fast.dataloading.findings import KINDS
from fsr_fast.dataloading.labels import write_csv
from fsr_fast.dataloading.layout import Split, check_names, list_stem
from fsr_fast.dataloading.masks import build_augmented_masks, write_masks
from fsr_fast.dataloading.negatives import keeps_negatives
from fsr_fast.dataloading.notes import Notes
from fsr_fast.dataloading.official_labels import read_official_labels
from fsr_fast.dataloading.pack import pack
from fsr_fast.dataloading.reading import COLOURS
from fsr_fast.dataloading.threads import map_ahead
from fsr_fast.errors import UserError, printable
from fsr_fast.options import Given, given
from fsr_fast.runtime.files import write_json
from fsr_fast.runtime.terminal import track

RECIPES = {"own": "own", "voc": "voc_vit_b", "coco": "coco_vit_b"}
"""Recipe for each kind of data set."""
EXAMPLES = 3  # number of printed messages per kind
MEGABYTE = 10**6


def main(arguments: Sequence[str]) -> None:
    """Run the sub-verb."""
    options = parsers.data().parse_args(arguments)
    actions = {"check": check, "import": import_labels, "labels": labels, "masks": masks, "pack": pack_lists}
    actions[options.action](options)


def check(options: argparse.Namespace) -> None:
    """Check a data set: print tables, write JSON and clean lists; exit code 1 if anything was found."""
    config, parts = _open(options)
    if options.json and options.json.exists() and not _is_report_of(options.json, config):
        raise UserError(
            f"--json: {options.json} exists and is not a report of {config.root}; delete it or give another name"
        )
    report = check_dataset(config, parts, options.accept, track=track)
    _print(report)
    if options.json:
        print(f"report: {write_json(options.json, _as_json(report))}")
    if options.fix:
        for path in write_clean_lists(report, options.fix):
            print(f"clean list: {path}")
    if report.findings:
        sys.exit(1)
    if config.dataset in RECIPES:
        unscored = "" if "val" in parts else " --data.val_list none"
        small = ", or on a CPU --config own_small" if config.dataset == "own" else ""
        usual = report.channels.usual
        channels = "" if usual == COLOURS.channels else f" --model.in_chans {usual}"
        recipe = f"{RECIPES[config.dataset]} --data.root {config.root}{unscored}{channels}"
        print(f"next: fsr-fast train --config {recipe}{small}")


def labels(options: argparse.Namespace) -> None:
    """Write image labels as CSV, from a data set, MS COCO's annotations, or the official code's file."""
    source: Path = options.source
    if source.suffix == ".npy":
        notes = Notes()
        names, shown = read_official_labels(source, options.names, notes)
        print_notes(notes)
        known = {len(VOC_CLASSES): VOC_CLASSES, len(COCO_CLASSES): COCO_CLASSES}
        classes = _classes(options) or known.get(shown.shape[1])
        if classes is None or len(classes) != shown.shape[1]:
            raise UserError(f"{source}: {shown.shape[1]} classes; name each of them, in their order, by --classes")
        rows = (
            (name, [classes[number] for number in row.nonzero()[0]]) for name, row in zip(names, shown, strict=True)
        )
    elif source.suffix == ".json":
        classes = _classes(options) or COCO_CLASSES
        instances = Instances(source, classes, with_masks=False)
        rows = ((name, [classes[number] for number in instances.labels(name)]) for name in instances.listed())
    else:
        config, parts = _open(options)
        splits = [open_split(config, training=part == "train", with_masks=config.labels == "masks") for part in parts]
        seen: set[str] = set()
        rows = (row for split in splits for row in _rows(split, seen))
    print(f"{options.output}: labels of {write_csv(options.output, rows)} images")


def masks(options: argparse.Namespace) -> None:
    """Build VOC's augmented masks from SBD, or write the masks of a list as files."""
    if options.sbd:
        count, listed = build_augmented_masks(options.source, options.sbd, track=track)
        print(f"{options.source}: {count} masks in SegmentationClassAug; {listed} training images")
        return
    if not options.output:
        raise UserError("command line: --sbd FOLDER (VOC) or --output FOLDER (MS COCO) is missing")
    config, parts = _open(options)
    for part in parts:
        split = open_split(config, training=part == "train", with_masks=True)
        folder = options.output / split.origin.stem.removeprefix("instances_")
        print(f"{folder}: {write_masks(split, folder, track=track)} masks")


def pack_lists(options: argparse.Namespace) -> None:
    """Write the lists of a data set as shards."""
    config, parts = _open(options)
    names = {part: list_stem(str(config.train_list if part == "train" else config.val_list)) for part in parts}
    if len(set(names.values())) < len(parts):
        raise UserError(
            f"--train, --val: both lists are called {names['val']!r}; rename one, since shards are named after it"
        )
    for part in parts:
        split = open_split(config, training=part == "train", with_masks=part == "val")
        index = pack(
            split,
            str(options.output),
            names[part],
            with_masks=part == "val",
            shard_bytes=options.shard_size * MEGABYTE,
            negatives=keeps_negatives(config),
            max_pixels=config.max_pixels,
            seed=options.shuffle,
            track=track,
        )
        shards = index["shards"]
        size = sum(shard["bytes"] for shard in shards) / MEGABYTE
        count = sum(shard["samples"] for shard in shards)
        print(f"{options.output}: {names[part]}: {count} images, {len(shards)} shards, {size:.1f} MB")
        print_notes(split.notes)


def _classes(options: argparse.Namespace) -> tuple[str, ...] | None:
    found = given(options).get("data.classes")
    return tuple(found.value) if found and not isinstance(found.value, str) else None


def _open(options: argparse.Namespace) -> tuple[DataConfig, list[str]]:
    """Return the section `data` that reads the folder, and which of the lists `train` and `val` exist."""
    changes = given(options) | {"data.root": Given("ROOT", str(options.source))}
    dataset = changes["data.dataset"].value if "data.dataset" in changes else detect_dataset(options.source)
    lists = default_lists(options.source, dataset)
    values: dict[str, Any] = {"dataset": dataset, "train_list": lists.get("train", ""), "val_list": lists.get("val")}
    config = build_config({"data": values}, str(options.source), changes).data
    parts = [part for part in ("train", "val") if getattr(config, f"{part}_list")]
    if not parts:
        raise UserError(
            f"{options.source}: no list of images; name one by --train LIST, or make one from a spreadsheet, folders "
            f"named by class or a labelling tool's export: fsr-fast data import EXPORT --output {options.source}"
        )
    return config, parts


def _rows(split: Split, seen: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Return the rows of a list, without images of previous lists."""
    check_names(split.ids, split.origin, "data labels")
    names = [name for name in split.ids if name not in seen]
    seen.update(names)
    shown = track(map_ahead(split.labels, names), "reading labels", len(names))
    for name, numbers in zip(names, shown, strict=True):
        yield name, [split.classes[number] for number in numbers]


def _print(report: Report) -> None:
    print_notes(report.notes)
    summary = Table("list", "images", "no class", "masks", "labels per image", "without a finding", box=box.ASCII2)
    for part, checked in report.lists.items():
        count = len(checked.names)
        mean = checked.labelled.sum() / max(count, 1)
        clean = str(len(report.clean(part)))
        summary.add_row(part, str(count), str(checked.negatives), str(checked.masks), f"{mean:.2f}", clean)
    columns = [f"{part}: {what}" for part in report.lists for what in ("show it", "do not")]
    classes = Table("class", *columns, box=box.ASCII2)
    for number, name in enumerate(_class_names(report)):
        counts = [(checked.labelled[number], len(checked.names)) for checked in report.lists.values()]
        classes.add_row(escape(name), *(str(value) for shown, count in counts for value in (shown, count - shown)))
    rich_print(summary, classes)
    for warning in report.warnings:
        print(f"warning: {printable(warning)}")
    if not report.findings:
        print("nothing was found")
        return
    found = Table("finding", "list", "number", "meaning", box=box.ASCII2)
    for kind, text in KINDS.items():
        for part in (*report.lists, ""):
            number = sum(finding.kind == kind and finding.list == part for finding in report.findings)
            if number:
                found.add_row(kind, part, str(number), text)
    rich_print(found)
    for kind in KINDS:
        messages = [f"{kind}: {item.name}: {item.message}\n" for item in report.findings if item.kind == kind]
        print(printable("".join(messages[:EXAMPLES])), end="")
        if len(messages) > EXAMPLES:
            print(f"{kind}: … and {len(messages) - EXAMPLES} more; --json FILE writes all")


def _is_report_of(path: Path, config: DataConfig) -> bool:
    """Return whether a file was written by an earlier check of this data set."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return content["root"] == str(config.root) and "findings" in content
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _as_json(report: Report) -> dict[str, object]:
    names = _class_names(report)
    return {
        "root": str(report.config.root),
        "dataset": report.config.dataset,
        "lists": {
            part: {
                "origin": str(checked.split.origin),
                "images": len(checked.names),
                "masks": checked.masks,
                "negatives": checked.negatives,
                "clean": len(report.clean(part)),
                "classes": dict(zip(names, checked.labelled.tolist(), strict=True)),
            }
            for part, checked in report.lists.items()
        },
        "read_as": report.notes,
        "warnings": report.warnings,
        "findings": [finding._asdict() for finding in report.findings],
    }


def _class_names(report: Report) -> tuple[str, ...]:
    return next(iter(report.lists.values())).split.classes


if __name__ == "__main__":
    run_command(main)
