"""Try a network in the browser: `fsr-fast serve --checkpoint RUN`, then drop a picture on the page.

The page answers this machine alone unless --host says otherwise. Pictures stay in memory; nothing is written.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fsr_fast.cli import run_command
from fsr_fast.errors import UserError
from fsr_fast.models import load_network
from fsr_fast.options import Parser
from fsr_fast.reporting.demo import DemoServer
from fsr_fast.runtime.distributed import start_process


def main(arguments: Sequence[str]) -> None:
    """Serve until interrupted."""
    options = build_parser().parse_args(arguments)
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port: {options.port}; expected 0 (any free one) to 65535")
    for name in ("max_mib", "side"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(options, name)}; expected 1 or more")
    network = load_network(options.checkpoint).to(start_process(options.device).device)
    try:
        server = DemoServer((options.host, options.port), network, largest=options.max_mib * 2**20, side=options.side)
    except OSError as error:
        raise UserError(
            f"--host, --port: cannot listen on {options.host}:{options.port} ({error.strerror}); give another --port"
        ) from None
    with server:
        print(f"open {server.address} in a browser; Ctrl-C ends it", flush=True)
        server.serve_forever()


def build_parser() -> Parser:
    """Build the parser of this verb."""
    parser = Parser("serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="run folder, checkpoint, exported folder, official student.pth"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than this let others in")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--max-mib", type=int, default=16, help="largest picture file, MiB")
    parser.add_argument("--side", type=int, default=1024, help="pictures are scaled down to this longer side, pixels")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


if __name__ == "__main__":
    run_command(main)
