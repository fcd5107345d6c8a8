"""`python -m service`: see `python -m service --help`."""

from service.cli import main

if __name__ == "__main__":
    main()
