"""Class names: which are allowed, and those of the public data sets in the order of their mask values 1, 2, …."""

from collections.abc import Sequence

from fsr_fast.errors import UserError

MOST, LONGEST = 254, 100
"""Number of classes, and bytes of a name."""


# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)


def check_class_names(names: Sequence[str], where: str) -> None:
    """Refuse names that tables, pages, terminals and file names cannot show.

    Args:
        names: of the foreground classes.
        where: their source, for messages.

    Raises:
        UserError: no class or too many, a name that is empty, too long, not printable, or a duplicate.
    """
    if not 0 < len(names) <= MOST:
        raise UserError(f"{where}: {len(names)} classes; expected 1 to {MOST}")
    for name in names:
        if not name.strip() or not name.isprintable() or len(name.encode(errors="replace")) > LONGEST:
            raise UserError(
                f"{where}: {name[:LONGEST]!r} is not a class name; expected 1 to {LONGEST} bytes of printable text"
            )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: {twice!r} is listed twice; keep one")
