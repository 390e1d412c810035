"""`python -m delta_llava COMMAND ...`, as `delta-llava COMMAND ...`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
