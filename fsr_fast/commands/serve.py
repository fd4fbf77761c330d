"""Try a network in the browser: `fsr-fast serve --checkpoint RUN`, then drop a picture on the page.

The page only answers this machine unless --host says otherwise. Pictures stay in memory; nothing is written.
"""

from collections.abc import Sequence

from fsr_fast.cli import run_command
from fsr_fast.commands import parsers
from fsr_fast.errors import UserError
from fsr_fast.models.build import open_trained
from fsr_fast.options import given
from fsr_fast.reporting.demo import DemoServer
from fsr_fast.runtime.distributed import start_process


def main(arguments: Sequence[str]) -> None:
    """Serve until interrupted."""
    options = parsers.serve().parse_args(arguments)
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port: {options.port}; expected 0 (any free one) to 65535")
    for name in ("max_mib", "side"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(options, name)}; expected 1 or more")
    network, config, *_ = open_trained(options.checkpoint, given(options), options.config)
    network.to(start_process(config.run.device).device)
    place, largest = (options.host, options.port), options.max_mib * 2**20
    try:
        server = DemoServer(place, network, largest=largest, side=options.side, config=config)
    except OSError as error:
        raise UserError(
            f"--host, --port: cannot listen on {options.host}:{options.port} ({error.strerror}); give another --port"
        ) from None
    with server:
        print(f"open {server.address} in a browser; Ctrl-C ends it", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run_command(main)
