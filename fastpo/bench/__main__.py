"""`python -m fastpo.bench head` is `fastpo bench head`."""

import sys

from ..cli import main
from .process import leave, one_interrupt

if __name__ == "__main__":
    one_interrupt()
    leave(main(["bench", *sys.argv[1:]]))
