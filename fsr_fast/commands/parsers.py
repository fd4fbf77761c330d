"""The command lines of all verbs, in one place and without torch: one function for each, which builds its parser.

Verbs that open a trained network share their first options, and accept the configuration keys that apply to them:
the checkpoint's own configuration, overridden by a recipe (`--config`), overridden by `--section.key value`.
"""

import argparse
from pathlib import Path
from typing import Any

from fsr_fast.commands.paper_tables import TABLES
from fsr_fast.config import SECTIONS, EvaluateConfig, RecipeParser, build_parser
from fsr_fast.dataloading.findings import KINDS
from fsr_fast.options import Parser, Short

train = build_parser

TRAINED_SECTIONS = ("run", "data", "cam", "evaluate")
EXPORTS = ("safetensors", "onnx", "torch", "official")
LABEL_KINDS = ("pseudo", "seg", "seg+crf")

_DEVICE = {"--device": Short("run.device", "auto, cpu or cuda")}
_ROOT = {"--root": Short("data.root", "folder or URL of the data set, if not the training's")}
_INFERENCE = {
    "--scales": Short("evaluate.scales", "scales of the segmentation"),
    "--side": Short(
        "evaluate.side",
        "longest side, in pixels, at which pictures pass through the network; larger ones are scaled down, their masks "
        "scaled back; auto: twice the training's image_size, at least 512; none: every pixel",
    ),
    "--tile": Short(
        "evaluate.tile",
        "side of the tiles of pictures that are larger after --side; auto: above 16,384 patches; none: never",
    ),
    "--overlap": Short("evaluate.overlap", "smallest share of a tile that overlaps the next one, 0 to 0.75 (0.25)"),
    "--no-flip": Short("evaluate.flip", "segment without mirror images", "false"),
}
_MAPS = {
    **_INFERENCE,
    "--threshold": Short("evaluate.threshold", "background score of the pseudo labels"),
    "--limit": Short("evaluate.limit", "use only the first images"),
}


def evaluate() -> Parser:
    """Build the parser of `evaluate`."""
    parser = Parser("evaluate", description="Score a trained network on a list of pictures with masks.")
    _add_trained(
        parser,
        {
            **_ROOT,
            "--list": Short("data.val_list", "name of the list, if not the validation list of the training"),
            "--protocol": Short(
                "evaluate.protocol", "sizes of the pictures: own, or official, as in the official scripts (own)"
            ),
            **_MAPS,
            **_DEVICE,
        },
    )
    parser.add_argument(
        "--crf",
        nargs="?",
        const=EvaluateConfig().crf_backend,
        choices=("pydensecrf", "exact"),
        help="also report the segmentation after the dense CRF; exact is for a GPU (pydensecrf unless given)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for metrics.json, report.md and pictures; by default that of the run, for a file such as best.pt "
        "evaluations/best in it, or beside a file without a run",
    )
    return parser


def pseudo_labels() -> Parser:
    """Build the parser of `pseudo-labels`."""
    parser = Parser(
        "pseudo-labels",
        description="""\
Write label maps of a whole list, for multi-stage methods or the PASCAL VOC test server.

    OUTPUT/labels/NAME.png        PNG with VOC's palette; its values are the labels: 0 background, 1… the classes
    OUTPUT/confidence/NAME.png    8-bit greyscale, how certain each label is: 0 to 255 for 0 to 1
    OUTPUT/classes.txt            names of the labels from 0 on, one per line

Repeating an interrupted command resumes it, given the same weights and settings.""",
    )
    _add_trained(
        parser,
        {
            **_ROOT,
            "--list": Short("data.train_list", "name of the list, if not the training list"),
            **_MAPS,
            "--crf": Short("evaluate.crf_backend", "back end of seg+crf, pydensecrf or exact; exact is for a GPU"),
            **_DEVICE,
        },
    )
    parser.add_argument("--output", type=Path, help="folder for the results; by default pseudo_labels in the run")
    parser.add_argument("--kind", choices=LABEL_KINDS, default="pseudo", help="what to write (pseudo)")
    parser.add_argument("--unlabelled", action="store_true", help="the list has no image labels, as VOC's test list")
    parser.add_argument("--found", action="store_true", help="pseudo labels of the classes that the classifier finds")
    parser.add_argument("--layout", choices=("plain", "mmseg"), default="plain", help="folders of the results (plain)")
    parser.add_argument("--archive", type=Path, help="also write a tar (.tar, .tgz) for the PASCAL VOC test server")
    return parser


def predict() -> Parser:
    """Build the parser of `predict`."""
    parser = Parser(
        "predict",
        description="""\
Segment pictures: masks (palette PNG: the pixel value is the class), overlays, a heat map for each class that is
found, and the probability and area of each class (scores.json, results.csv).""",
    )
    parser.add_argument("images", nargs="+", help="pictures, folders of pictures, or patterns such as 'trip/*.jpg'")
    _add_trained(parser, {**_INFERENCE, **_DEVICE})
    parser.add_argument("--output", type=Path, help="folder for the results; by default predictions in the run")
    parser.add_argument("--crf", action="store_true", help="refine the masks by the dense CRF")
    parser.add_argument("--opacity", type=float, default=0.6, help="of the colours over the pictures, 0 to 1")
    parser.add_argument("--legend", action="store_true", help="name the colours above the overlays")
    parser.add_argument("--batch", type=int, default=4, help="largest number of pictures of one size in one pass")
    return parser


def serve() -> Parser:
    """Build the parser of `serve`."""
    parser = Parser(
        "serve",
        description="""\
Try a network in the browser: open the page and drop a picture on it. It only answers this machine unless --host says
otherwise. Pictures stay in memory; nothing is written.""",
    )
    _add_trained(parser, {**{name: _INFERENCE[name] for name in ("--scales", "--no-flip")}, **_DEVICE})
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; any other lets other machines in")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--max-mib", type=int, default=16, help="largest picture file, MiB")
    parser.add_argument("--side", type=int, default=1024, help="pictures are scaled down to this longer side, pixels")
    return parser


def export() -> Parser:
    """Build the parser of `export`."""
    parser = Parser(
        "export",
        description="""\
Write a trained network for other programs.

safetensors: a folder with weights, description and a card with the scores, for `fsr_fast.from_pretrained(folder)`.
onnx, torch: one function of pictures of any number and size, compared with the network after writing.
official: the state dict of the official code.""",
    )
    _add_checkpoint(parser)
    parser.add_argument(
        "--to", choices=EXPORTS, help="what to write; by default what the ending of --output says, else safetensors"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="file to write, for safetensors a folder; by default in exported/ of the run",
    )
    parser.add_argument("--teacher", action="store_true", help="the averaged network instead of the student")
    parser.add_sections({"run": SECTIONS["run"]})
    return parser


def report() -> Parser:
    """Build the parser of `report`."""
    parser = Parser(
        "report",
        description="""\
Write a report of one run, or a comparison of several, as one HTML page.

The page holds curves, scores by class, the confusion matrix, a gallery of the best, worst and random pictures of the
validation list, the attention of the network, masks over the training, configuration and environment. It is one file
and needs no network.""",
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders; several are compared")
    parser.add_argument("--output", type=Path, help="page to write; by default report.html in the first run's folder")
    parser.add_argument("--limit", type=int, default=200, help="pictures of the validation list to look at (200)")
    parser.add_argument("--rows", type=int, default=6, help="best, worst and random pictures to show of each (6)")
    _add_configuration(parser, {**_ROOT, **_INFERENCE, **_DEVICE})
    return parser


def compare() -> Parser:
    """Build the parser of `compare`."""
    parser = Parser(
        "compare",
        description="""\
Compare two evaluations of the same pictures, as `fsr-fast evaluate` wrote them.

The intervals are paired bootstraps over the pictures: they account for the choice of pictures on the list, not for the
seed of the training.""",
    )
    parser.add_argument("first", type=Path, help="folder of an evaluation")
    parser.add_argument("second", type=Path, help="folder of another evaluation of the same list")
    parser.add_argument("--draws", type=int, default=2000, help="number of resamples (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (0)")
    parser.add_argument("--output", type=Path, help="folder for comparison.json and comparison.md")
    return parser


def ablate() -> Parser:
    """Build the parser of `ablate`."""
    parser = RecipeParser(
        "ablate",
        description="""\
Run the rows of one of the paper's tables. A row is a recipe with a few keys changed.

Each row and seed has a run folder of its own below the output folder. The same command resumes: finished runs
are read, not repeated. `table.md` and `table.json` are rewritten after every run.""",
        epilog="--section.key value changes the recipe of all rows.",
    )
    parser.add_argument("--table", type=int, choices=sorted(TABLES), required=True, help="number of the paper's table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of each row (0)")
    parser.add_argument("--rows", nargs="+", help="run only these rows (all)")
    parser.add_argument("--output", type=Path, help="folder of the table and its runs; by default beside run.output")
    return parser


def completion() -> Parser:
    """Build the parser of `completion`."""
    parser = Parser(
        "completion",
        description="""\
Print a script that completes verbs, options and their values in a shell.

bash: `fsr-fast completion bash > ~/.fsr-fast.bash`, and `source ~/.fsr-fast.bash` in ~/.bashrc; zsh likewise.
fish: `fsr-fast completion fish > ~/.config/fish/completions/fsr-fast.fish`.""",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def data() -> Parser:
    """Build the parser of `data`."""
    parser = Parser("data", description="Prepare data sets: check them, derive image labels, build masks, pack shards.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_ActionParser)

    action = actions.add_parser(
        "check",
        help="find every fault",
        description="Check a data set: print tables, write JSON and clean lists; exit code 1 if anything was found.",
    )
    _add_data(action)
    action.add_argument("--json", type=Path, metavar="FILE", help="write all findings to this file")
    action.add_argument(
        "--fix", type=Path, metavar="FOLDER", help="write lists without the bad pictures to this folder"
    )
    kinds = "; ".join(f"{kind} ({text})" for kind, text in KINDS.items())
    action.add_argument(
        "--accept", nargs="+", default=[], choices=KINDS, metavar="KIND", help=f"kinds of findings to accept: {kinds}"
    )

    action = actions.add_parser(
        "import",
        help="read the exports of labelling tools, and spreadsheets",
        description="Turn a labelling tool's export or a spreadsheet into the table of own pictures in ROOT/images.",
    )
    action.add_argument(
        "source",
        type=Path,
        metavar="EXPORT",
        help="Label Studio's or MS COCO's JSON, CVAT's XML or folder of masks, a folder per class, CSV or Excel",
    )
    action.add_argument("--output", type=Path, required=True, metavar="ROOT", help="own data set, with images/ in it")
    action.add_argument("--list", default="train", metavar="NAME", help="name of the table (%(default)s)")
    action.add_argument("--empty", choices=("background", "skip"), help="pictures about which the tool says nothing")
    action.add_argument("--image-column", metavar="NAME", help="column of a table that names the pictures")
    action.add_argument("--encoding", metavar="NAME", help="of a table, if not UTF-8 or UTF-16, e.g. cp1252")
    action.add_argument("--separator", metavar="CHARACTER", help="between the columns of a table, if ambiguous")

    action = actions.add_parser(
        "labels",
        help="derive image labels",
        description="Write image labels as CSV, from a data set, MS COCO's annotations, or the official code's file.",
    )
    _add_data(action, "folder of the data set, MS COCO's instances_*.json, or the official cls_labels_onehot.npy")
    action.add_argument("--output", type=Path, required=True, metavar="FILE", help="CSV file to write")
    action.add_argument("--names", metavar="TEMPLATE", help="how numbers become names: 'COCO_train2014_{:012d}'")

    action = actions.add_parser(
        "masks",
        help="build mask files",
        description="Build VOC's augmented masks from SBD, or write the masks of a list as files.",
    )
    _add_data(action)
    action.add_argument("--sbd", type=Path, metavar="FOLDER", help="SBD's benchmark_RELEASE/dataset: VOC's train_aug")
    action.add_argument("--output", type=Path, metavar="FOLDER", help="write the masks here, in a folder per list")

    action = actions.add_parser(
        "pack", help="write WebDataset shards", description="Write the lists of a data set as shards."
    )
    _add_data(action)
    action.add_argument("--output", required=True, metavar="FOLDER", help="folder, or URL (s3://…, gs://…)")
    action.add_argument("--shard-size", type=_positive, default=256, metavar="MB", help="size of a shard (%(default)s)")
    action.add_argument("--shuffle", type=_seed, metavar="SEED", help="pack in an order drawn from this seed")
    return parser


class _ActionParser(Parser):
    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog.removeprefix("fsr-fast "), **settings)


def _add_checkpoint(parser: Parser) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="run folder, checkpoint, exported folder, official student.pth"
    )


def _add_trained(parser: Parser, short: dict[str, Short]) -> None:
    _add_checkpoint(parser)
    _add_configuration(parser, short)


def _add_configuration(parser: Parser, short: dict[str, Short]) -> None:
    parser.add_argument(
        "--config", type=Path, help="recipe over the checkpoint's configuration; needed where it has none"
    )
    parser.add_sections({name: SECTIONS[name] for name in TRAINED_SECTIONS}, short)


def _add_data(parser: Parser, source: str = "folder of the data set") -> None:
    parser.add_argument("source", type=Path, metavar="ROOT", help=source)
    parser.add_sections(
        {"data": SECTIONS["data"]},
        {
            "--dataset": Short("data.dataset", "layout, voc, coco or own; by default inferred from the folder"),
            "--classes": Short("data.classes", "names of all classes, if not the data set's own"),
            "--labels": Short("data.labels", "source of the labels: auto, xml, csv or masks"),
            "--train": Short("data.train_list", "training list; by default train_aug or train"),
            "--val": Short("data.val_list", "validation list; by default val, if there is one"),
        },
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value
