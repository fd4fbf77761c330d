"""Label maps in the layout that other trainers read: pictures and masks side by side, and the configuration for them.

    FOLDER/img_dir/LIST/NAME.jpg    links to the pictures, or PNG copies, see `lay_out_pictures`
    FOLDER/ann_dir/LIST/NAME.png    8-bit greyscale: 0 background, 1… the classes, 255 ignored

mmsegmentation's BaseSegDataset and lightly-train's semantic segmentation take these folders as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fsr_fast.dataloading.batch import ImageSet
from fsr_fast.dataloading.datasets import SegmentationDataset
from fsr_fast.dataloading.images import is_upright
from fsr_fast.dataloading.layout import bare_name
from fsr_fast.dataloading.palette import voc_palette
from fsr_fast.dataloading.reading import is_deep
from fsr_fast.runtime.files import write_png

PICTURES, MASKS = "img_dir", "ann_dir"

Track = Callable[[Iterable[int], str, int], Iterable[int]]


def lay_out_pictures(images: ImageSet, indices: Sequence[int], folder: Path, list_name: str, *, track: Track) -> str:
    """Put the pictures beside their masks, all with one extension, as mmsegmentation requires.

    They are links to the files themselves if those have one extension and 8 bits and need not be turned upright; else
    PNG files of the preview channels.

    Args:
        images: the list.
        indices: which images.
        folder: of the results.
        list_name: of the list, without extension.
        track: shows progress; takes the numbers, a description and their count.

    Returns:
        The extension.
    """
    files = [images.image_path(index) for index in indices] if isinstance(images, SegmentationDataset) else []
    endings = {path.suffix for path in files}
    limit = images.reading.max_pixels
    linked = len(endings) == 1 and all(not is_deep(file, str(file), limit) and is_upright(file) for file in files)
    ending = endings.pop() if linked else ".png"
    for number, index in enumerate(track(indices, "laying out pictures", len(indices))):
        target = folder / PICTURES / list_name / f"{bare_name(images.ids[index])}{ending}"
        if os.path.lexists(target):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if linked:
            target.symlink_to(files[number].resolve())
        else:
            write_png(target, images.image(index))
    return ending


def configuration(folder: Path, list_name: str, ending: str, classes: Sequence[str]) -> str:
    """Return the lines that make mmsegmentation and lightly-train read the folder.

    Args:
        folder: of the results.
        list_name: of the list, without extension.
        ending: extension of the pictures.
        classes: names of the foreground classes.
    """
    names = ("background", *classes)
    palette = voc_palette()[: len(names)].tolist()
    images, masks = f"{PICTURES}/{list_name}", f"{MASKS}/{list_name}"
    return f"""# mmsegmentation: the data set of a train_dataloader
dataset = dict(
    type="BaseSegDataset",
    data_root={str(folder)!r},
    data_prefix=dict(img_path={images!r}, seg_map_path={masks!r}),
    img_suffix={ending!r},
    seg_map_suffix=".png",
    reduce_zero_label=False,
    metainfo=dict(classes={names!r}, palette={palette!r}),
)
# lightly-train: data of train_semantic_segmentation
data = {{
    "train": {{"images": {str(folder / images)!r}, "masks": {str(folder / masks)!r}}},
    "classes": {dict(enumerate(names))!r},
}}
"""
