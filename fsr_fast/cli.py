"""What all entry points share."""

import sys
from collections.abc import Callable, Sequence

from fsr_fast.errors import UserError


def run_command(command: Callable[[Sequence[str]], None]) -> None:
    """Run an entry point on the command line; the user's mistakes end it with one paragraph and exit code 2.

    So do files and folders that cannot be read or written.
    """
    try:
        command(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; check path, permissions and free space", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
