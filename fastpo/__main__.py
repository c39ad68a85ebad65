"""`python -m fastpo`, and so `torchrun -m fastpo run script.py`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
