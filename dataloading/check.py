"""Check a data set for everything that would stop or mislead a training. The data are never touched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fsr_fast.config import DataConfig
from fsr_fast.dataloading.channels import Channels
from fsr_fast.dataloading.datasets import check_size, open_split
from fsr_fast.dataloading.images import DamagedFileError, OutsideError, check_name
from fsr_fast.dataloading.labels import shown_classes, write_csv, write_new
from fsr_fast.dataloading.layout import Split, check_one_file_each, has_ending, no_mask
from fsr_fast.dataloading.negatives import balance_warnings, keeps_negatives
from fsr_fast.dataloading.reading import read_stored
from fsr_fast.dataloading.threads import map_ahead
from fsr_fast.errors import UserError


class Finding(NamedTuple):
    """One fault."""

    kind: str
    """One of `findings.KINDS`."""
    list: str
    """`train` or `val`."""
    name: str
    """Name of the picture."""
    message: str


@dataclass
class ListReport:
    """What was found in one list."""

    split: Split
    labelled: NDArray[np.int64]
    """(C,), number of pictures that show each class."""
    names: list[str] = field(default_factory=list)
    """Each name once, in the order of the list."""
    masks: int = 0
    """Number of pictures with a readable mask."""
    negatives: int = 0
    """Number of pictures that show no class."""
    digests: dict[bytes, str] = field(default_factory=dict)
    """Name, by the digest of the pixels."""
    channels: dict[str, tuple[int, int]] = field(default_factory=dict)
    """For each readable picture, its number of channels, and that of the network that fits it."""


@dataclass
class Report:
    """What was found in a data set."""

    config: DataConfig
    lists: dict[str, ListReport]
    findings: list[Finding]
    channels: Channels

    @property
    def notes(self) -> list[str]:
        """What was inferred in reading the lists, each remark once."""
        notes = dict.fromkeys(note for checked in self.lists.values() for note in checked.split.notes)
        return [*notes, *self.channels.notes]

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the channels of the pictures, and with the balance of those to train on."""
        checked = self.lists.get("train")
        balance = balance_warnings(checked.split.classes, checked.labelled, len(checked.names)) if checked else []
        return [*self.channels.warnings, *balance]

    def clean(self, part: str) -> list[str]:
        """Return the names of a list, `train` or `val`, that have no finding, each once."""
        found = (finding for finding in self.findings if finding.kind != "listed-twice")
        bad = {finding.name for finding in found if finding.list == part}
        return [name for name in self.lists[part].names if name not in bad]


class _Examined(NamedTuple):
    name: str
    faults: list[tuple[str, str]]
    labels: list[int] | None
    has_mask: bool
    image: _Image | None


class _Image(NamedTuple):
    digest: bytes
    channels: tuple[int, int]


Track = Callable[[Iterable[_Examined], str, int], Iterable[_Examined]]


def check_dataset(config: DataConfig, parts: Iterable[str], accepted: Iterable[str] = (), *, track: Track) -> Report:
    """Check the lists of a data set, with every picture, label and mask.

    Args:
        config: the section `data` of the configuration.
        parts: the lists to check, `train` or `val` or both.
        accepted: kinds of findings that are not reported.
        track: shows progress; takes the items, a description and their number.

    Raises:
        UserError: a folder, list or annotation file that cannot be read at all.
    """
    splits = {part: open_split(config, training=part == "train", with_masks=True) for part in parts}
    findings: list[Finding] = []
    lists = {}
    for part, split in splits.items():
        report = lists[part] = ListReport(split, np.zeros(len(split.classes), np.int64))
        findings += [Finding("two-files", part, name, problem) for name, problem in check_one_file_each(split)]
        refused = part == "train" and keeps_negatives(config) is None
        examine = partial(
            _examine, split, training=part == "train", negatives=not refused, max_pixels=config.max_pixels
        )
        examined = map_ahead(examine, _each_once(split, part, findings))
        for item in track(examined, f"checking {part}", len(split.ids)):
            _enter(item, part, report, findings)
    if "train" in lists and "val" in lists:
        for digest in lists["train"].digests.keys() & lists["val"].digests.keys():
            name, other = lists["train"].digests[digest], lists["val"].digests[digest]
            findings.append(Finding("leak", "train", name, f"has the pixels of the validation picture {other}"))
    if config.dataset == "own" and isinstance(config.root, Path):
        findings += _unlisted(config.root / "images", splits.values())
    channels = Channels({part: checked.channels for part, checked in lists.items()})
    findings += [Finding("channels", *other) for other in channels.others()]
    return Report(config, lists, [finding for finding in findings if finding.kind not in set(accepted)], channels)


def write_clean_lists(report: Report, folder: Path) -> list[Path]:
    """Write the lists without the pictures that have a finding. The data stay as they are.

    Args:
        report: from `check_dataset`.
        folder: for the lists; each keeps its name, with `.csv` for own pictures, else `.txt`.

    Raises:
        UserError: a file exists already, or nothing is left of a list.
    """
    tables = report.config.dataset == "own"
    paths = {}
    for part, checked in report.lists.items():
        origin = checked.split.origin
        paths[part] = folder / f"{origin.stem.removeprefix('instances_')}.{'csv' if tables else 'txt'}"
        if not report.clean(part):
            raise UserError(f"{origin}: nothing is left without a finding; nothing was written")
        if paths[part].exists():
            raise UserError(f"{paths[part]} exists; delete it or give another folder")
    if len(set(paths.values())) < len(paths):
        raise UserError(f"--train, --val: both lists are called {origin.stem!r}; rename one; nothing was written")
    folder.mkdir(parents=True, exist_ok=True)
    for part, path in paths.items():
        split, names = report.lists[part].split, report.clean(part)
        if tables:
            rows = ((name, [split.classes[number] for number in split.labels(name)]) for name in names)
            write_csv(path, ((_name_on_disk(report, split, name), shown) for name, shown in rows))
        else:
            write_new(path, "".join(f"{name}\n" for name in names))
    return list(paths.values())


def _name_on_disk(report: Report, split: Split, name: str) -> str:
    """Return the name of a picture with its file's extension, spelt as on disk."""
    folder = Path(report.config.root or "") / "images"
    return split.files.image_path(name).relative_to(folder).as_posix() if has_ending(name) else name


def _examine(split: Split, name: str, *, training: bool, negatives: bool, max_pixels: int) -> _Examined:
    """Read everything that belongs to a name. Pictures that show no class are a finding unless they are expected."""
    faults: list[tuple[str, str]] = []
    try:
        check_name(name)
    except OutsideError as error:
        return _Examined(name, [("outside", f"{split.origin}: {error}")], None, False, None)
    stored, labels = None, None
    try:
        path = split.files.image_path(name)
        try:
            stored = read_stored(path, max_pixels=max_pixels)
        except DamagedFileError as error:
            faults.append(("damaged-image", str(error)))
    except OutsideError as error:
        faults.append(("outside", str(error)))
    except DamagedFileError as error:
        faults.append(("missing-image", str(error)))
    try:
        labels = split.labels(name)
        if not negatives and not labels:
            faults.append(
                ("no-label", "shows no class; label it, take it off the list, or give --data.negatives true or false")
            )
    except UserError as error:
        faults.append(("bad-label", str(error)))
    mask = None
    try:
        mask = split.files.mask(name)
    except OutsideError as error:
        faults.append(("outside", str(error)))
    except DamagedFileError as error:
        faults.append(("damaged-mask", str(error)))
    else:
        faults += _compare(split, name, stored and stored.values, labels, mask, training=training)
    known = stored and _Image(_digest(stored.values), (stored.channels, stored.network))
    return _Examined(name, faults, labels, mask is not None, known)


def _compare(
    split: Split,
    name: str,
    image: NDArray[Any] | None,
    labels: list[int] | None,
    mask: NDArray[np.uint8] | None,
    *,
    training: bool,
) -> Iterator[tuple[str, str]]:
    if mask is None:
        if not training:
            yield "missing-mask", str(no_mask(split.files, name))
        return
    if image is not None:
        try:
            check_size(mask, (image.shape[1], image.shape[0]), split.files.mask_place(name))
        except DamagedFileError as error:
            yield "mask-size", str(error)
    if labels is None:
        return
    shown = set(shown_classes(mask))
    for kind, classes, text in (
        ("label-not-in-mask", set(labels) - shown, "labelled, but not in the mask"),
        ("mask-not-in-label", shown - set(labels), "in the mask, but not labelled"),
    ):
        if classes:
            yield kind, f"{text}: {', '.join(split.classes[number] for number in sorted(classes))}"


def _each_once(split: Split, part: str, findings: list[Finding]) -> Iterator[str]:
    seen: set[str] = set()
    for name in split.ids:
        if name in seen:
            findings.append(Finding("listed-twice", part, name, f"{split.origin}: {name!r} is listed twice; keep one"))
        else:
            seen.add(name)
            yield name


def _enter(item: _Examined, part: str, report: ListReport, findings: list[Finding]) -> None:
    report.names.append(item.name)
    report.masks += item.has_mask
    report.negatives += item.labels == []
    for number in set(item.labels or ()):
        report.labelled[number] += 1
    findings += [Finding(kind, part, item.name, message) for kind, message in item.faults]
    if item.image is not None:
        report.channels[item.name] = item.image.channels
        other = report.digests.setdefault(item.image.digest, item.name)
        if other != item.name:
            findings.append(Finding("duplicate", part, item.name, f"has the pixels of {other}"))


def _unlisted(folder: Path, splits: Iterable[Split]) -> Iterator[Finding]:
    """Return the pictures of an own data set that no table names."""
    listed = set()
    for split in splits:
        for name in split.ids:
            with suppress(DamagedFileError):
                listed.add(split.files.image_path(name))
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if has_ending(name) and path not in listed:
            yield Finding("unlisted", "", name, f"{path}: no table names it; add a row with its labels")


def _digest(image: NDArray[Any]) -> bytes:
    key = f"{image.shape} {image.dtype}".encode()
    return hashlib.blake2b(image.tobytes(), digest_size=16, key=key).digest()
