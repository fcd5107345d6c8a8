"""`python -m service`: see `python -m service --help`."""

import signal
import sys


def run() -> None:
    """Import the rest, which takes seconds, and do what the command line says."""
    # A container's first process is not ended by what it does not handle, and would be killed when its grace is over.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        from service.cli import main
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    main()


if __name__ == "__main__":
    run()
