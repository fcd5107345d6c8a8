"""`python -m export`: see `python -m export --help`."""

import sys

try:
    from export.cli import main
except KeyboardInterrupt:  # torch alone takes seconds to import
    print("error: stopped before it was done", file=sys.stderr)
    sys.exit(130)

sys.exit(main())
