"""The embedded data set on disk: drawn on first use, in PASCAL VOC layout, and kept."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from fsr_fast.dataloading.creatures import KINDS, draw_scene
from fsr_fast.errors import UserError

CLASSES = tuple(kind.name for kind in KINDS)
VERSION = 5  # of the pictures; raised when they change
MARKER = "synthetic.json"
PALETTE = (0, 0, 0, 214, 60, 66, 232, 196, 48, 41, 178, 190, 63, 96, 214, 82, 176, 72, 204, 82, 180)


def generate(root: Path, *, train: int = 2000, val: int = 200, seed: int = 0, processes: int | None = None) -> None:
    """Draw the data set: JPEGImages, SegmentationClassAug, ImageSets/Segmentation and labels.csv.

    Args:
        root: folder to write; it appears only once complete, and replaces an existing one.
        train: number of training images, ≥ 1.
        val: number of validation images, ≥ 1.
        seed: the same seed makes the same files.
        processes: number of processes that draw; None: one per CPU, at most 8.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    replaced = folder.with_name(f"{folder.name}-replaced")
    try:
        folder.chmod(0o755)
        for name in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
            (folder / name).mkdir(parents=True)
        count = processes or min(8, os.cpu_count() or 1)
        write = partial(_write, folder, seed)
        if count == 1:
            rows = [write(index) for index in range(train + val)]
        else:
            with multiprocessing.get_context("fork").Pool(count) as pool:
                rows = pool.map(write, range(train + val), chunksize=16)
        lines = [f"{name}\n" for name, _ in rows]
        (folder / "ImageSets/Segmentation/train_aug.txt").write_text("".join(lines[:train]), encoding="utf-8")
        (folder / "ImageSets/Segmentation/val.txt").write_text("".join(lines[train:]), encoding="utf-8")
        table = "".join(f"{name},{labels}\n" for name, labels in rows)
        (folder / "labels.csv").write_text(f"image,labels\n{table}", encoding="utf-8")
        marker = {"version": VERSION, "train": train, "val": val, "seed": seed}
        (folder / MARKER).write_text(json.dumps(marker), encoding="utf-8")
        if root.exists():
            root.rename(replaced)
        folder.rename(root)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def ensure(root: Path) -> None:
    """Draw the data set unless the folder already holds it. Concurrent processes wait for the first.

    Args:
        root: folder of the data set.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    if _is_current(root):
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with open(root.parent / f".{root.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_current(root):
                return
            if root.exists() and not (root / MARKER).is_file() and (root.is_file() or any(root.iterdir())):
                own = (root / "images").is_dir()
                there = "own pictures, --data.dataset own --data.train_list train" if own else "--data.dataset voc"
                raise UserError(
                    f"data.root: {root} is not the embedded data set, which is what data.dataset synthetic means; to "
                    f"train on what is there give {there}; or give a new or empty folder"
                )
            generate(root)
    except OSError as error:
        raise UserError(
            f"data.root: cannot write the embedded data set to {root}: {error}; give another folder"
        ) from None


def _is_current(root: Path) -> bool:
    try:
        return json.loads((root / MARKER).read_text(encoding="utf-8")).get("version") == VERSION
    except (OSError, ValueError, AttributeError):
        return False


def _write(folder: Path, seed: int, index: int) -> tuple[str, str]:
    """Write image and mask; return name and classes as in labels.csv."""
    scene = draw_scene(seed, index)
    name = f"creatures_{index:06d}"
    Image.fromarray(scene.image).save(folder / "JPEGImages" / f"{name}.jpg", quality=92)
    mask = Image.fromarray(scene.mask, mode="P")
    mask.putpalette(PALETTE)
    mask.save(folder / "SegmentationClassAug" / f"{name}.png")
    present = np.flatnonzero(np.bincount(scene.mask.ravel(), minlength=len(CLASSES) + 1)[1:])
    return name, " ".join(CLASSES[number] for number in present)
