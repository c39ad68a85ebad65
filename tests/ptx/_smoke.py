"""Cases of benchmarks/gpu_smoke.py on a GPU that is not there, as the first run on one will be.

    python tests/ptx/_smoke.py anchored --every 3 [--capability 80] [--extension FILE] [--seed 0]

Prints a line of JSON for each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from _gpu import emulate

# Few rows, which all dtypes have; more than a block's, which the hardware copies; rows that it does
# not copy; and one row.
SHAPES = ((9, 392, 72), (130, 392, 72), (70, 331, 70), (1, 304, 64))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backend")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--extension", type=Path)
    parser.add_argument("--seed", type=int, help="warps take turns in any order")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        gpu = emulate(Path(cache), options.capability, options.extension)
        gpu.manner.seed = options.seed
        sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
        import gpu_smoke

        gpu_smoke.SHAPES["cuda"] = SHAPES
        with gpu.mode():
            found = [c for c in gpu_smoke.cases(options.backend) if "captured" not in str(c)]
            for case in found[:: options.every]:
                before = len(gpu.launches())
                wrong, _ = gpu_smoke.check(case, options.backend)
                row = {"case": str(case), "wrong": wrong, "launches": gpu.launches()[before:]}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
