"""`fsr-fast VERB …`: the table of verbs, and what all entry points share.

A verb is a module with `main(arguments)`, imported when it is called, and a function in commands/parsers.py.
"""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from fsr_fast.errors import UserError, nearest, printable

if TYPE_CHECKING:
    from fsr_fast.options import Parser


class Verb(NamedTuple):
    """One line of the table."""

    module: str
    purpose: str
    example: str
    """Arguments that follow the verb."""


VERBS = {
    "train": Verb(
        "fsr_fast.train",
        "train a network; the same command resumes it",
        "--config voc_vit_b --data.root VOCdevkit/VOC2012",
    ),
    "evaluate": Verb(
        "fsr_fast.commands.evaluate",
        "score a trained network on pictures with masks",
        "--checkpoint runs/synthetic --crf",
    ),
    "compare": Verb(
        "fsr_fast.commands.compare",
        "compare two evaluations, with intervals",
        "runs/first runs/second --output comparison",
    ),
    "pseudo-labels": Verb(
        "fsr_fast.commands.pseudo_labels",
        "write label maps of a whole list, for other methods or the VOC test server",
        "--checkpoint runs/synthetic --output labels",
    ),
    "data": Verb(
        "fsr_fast.commands.data",
        "check a data set, derive image labels, build masks, pack shards",
        "check VOCdevkit/VOC2012 --json findings.json",
    ),
    "predict": Verb(
        "fsr_fast.commands.predict",
        "segment pictures: masks, overlays, heat maps, scores",
        "--checkpoint runs/synthetic holiday/ --output results --legend",
    ),
    "serve": Verb(
        "fsr_fast.commands.serve", "try a network in the browser, on this machine only", "--checkpoint runs/synthetic"
    ),
    "export": Verb(
        "fsr_fast.commands.export",
        "write a trained network for other programs",
        "--checkpoint runs/synthetic --to onnx --output network.onnx",
    ),
    "ablate": Verb(
        "fsr_fast.commands.ablate",
        "run one of the paper's tables, row by row",
        "--table 4 --config synthetic --seeds 0 1 2",
    ),
    "report": Verb(
        "fsr_fast.commands.report",
        "show a run, or compare several, on one HTML page",
        "runs/synthetic --output report.html",
    ),
    "completion": Verb(
        "fsr_fast.commands.completion",
        "print a script that completes verbs and options in a shell",
        "bash > ~/.fsr-fast.bash",
    ),
}


def run_command(command: Callable[[Sequence[str]], None]) -> None:
    """Run an entry point on the command line; users' mistakes end it with one paragraph and exit code 2.

    So do files and folders that cannot be read or written, and missing packages.
    """
    try:
        command(sys.argv[1:])
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "fsr_fast").partition(".")[0] == "fsr_fast":
            raise
        print(
            f"error: this needs {error.name}, which is not installed (inference.txt leaves out what training needs); "
            "install everything: pip install -c constraints.txt .",
            file=sys.stderr,
        )
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output is gone, as with `head`
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.errno is None:
            raise  # from a library, about something else
        if error.errno in (errno.EMFILE, errno.ENFILE):
            sys.unraisablehook = lambda _: None  # torch's half-built loader would print a traceback of its own
            print(
                f"error: {error.strerror}; raise the limit by `ulimit -n 4096`, or lower data.workers", file=sys.stderr
            )
            sys.exit(2)
        place = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {printable(place)}{error.strerror}; check path, permissions and free space", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        print(f"error: out of memory ({str(error).partition(chr(10))[0]}); reduce the sizes", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def dispatch(arguments: Sequence[str]) -> None:
    """Run the verb that the first argument names.

    Args:
        arguments: verb, then its own arguments.

    Raises:
        UserError: there is no such verb.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return
    name, *rest = arguments
    if name == "--version":
        print(f"fsr-fast {metadata.version('fsr_fast')}")
        return
    if name not in VERBS:
        raise UserError(f"command line: unknown verb {name!r}{nearest(name, VERBS)}")
    parser_of(name).parse_args(rest)  # help and mistakes end here, without importing torch
    importlib.import_module(VERBS[name].module).main(rest)


def parser_of(name: str) -> Parser:
    """Build the parser of a verb."""
    build: Callable[[], Parser] = getattr(importlib.import_module("fsr_fast.commands.parsers"), name.replace("-", "_"))
    return build()


def help_text() -> str:
    """Describe all verbs, with an example each."""
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(
        f"  {name:<{width}}{verb.purpose}\n  {'':<{width}}  $ fsr-fast {name} {verb.example}\n"
        for name, verb in VERBS.items()
    )
    return f"""usage: fsr-fast VERB [options]

Train segmentation networks from image-level labels: you say what is in each picture, the network learns where.

verbs:
{verbs}
first steps:
  fsr-fast train              the demonstration: the embedded data set, on a CPU, from nothing to a trained network
  fsr-fast VERB --help        every option of a verb
  torchrun --nproc-per-node 4 -m fsr_fast train …
                              the same on several GPUs
"""


def main() -> None:
    """Entry point of the command `fsr-fast`."""
    run_command(dispatch)
