"""Which kind of data set a folder holds, and which lists."""

from pathlib import Path

from fsr_fast.dataloading import synthetic
from fsr_fast.dataloading.coco import has_instances
from fsr_fast.dataloading.own import TABLE_ENDINGS
from fsr_fast.dataloading.voc import IMAGES, LISTS, PARTS
from fsr_fast.errors import UserError


def detect_dataset(root: Path) -> str:
    """Infer the `data.dataset` of a folder from its layout.

    Raises:
        UserError: the folder is missing, or has no known layout.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give the folder of a data set")
    if (root / synthetic.MARKER).is_file():
        return "synthetic"
    if has_instances(root) and not (root / LISTS).is_dir():
        return "coco"
    if (root / IMAGES).is_dir():
        return "coco" if any((root / IMAGES / part).is_dir() for part in PARTS) else "voc"
    if (root / "images").is_dir():
        return "own"
    raise UserError(
        f"{root}: not a known layout; expected {IMAGES} (PASCAL VOC), annotations/instances_*.json "
        "(MS COCO), or images with train.csv (own pictures)"
    )


def default_lists(root: Path, dataset: str) -> dict[str, str]:
    """Return those of a data set's usual lists that exist: name by `train` and `val`."""
    if dataset == "own":
        files = [path for ending in TABLE_ENDINGS for path in root.glob(f"*{ending}")]
    elif (root / LISTS).is_dir():
        files = list((root / LISTS).glob("*.txt"))
    else:
        files = list((root / "annotations").glob("instances_*.json"))
    there = {path.stem.removeprefix("instances_").removesuffix("2014") for path in files}
    usual = {"train": ("train_aug", "train"), "val": ("val",)}
    return {part: next(name for name in names if name in there) for part, names in usual.items() if there & set(names)}
