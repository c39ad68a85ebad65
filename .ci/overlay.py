"""Other releases of a few packages, and what these need, over an environment that stays as it is.

    python .ci/overlay.py build/trl-0.24.0 trl==0.24.0 'transformers<5'
    PYTHONPATH=build/trl-0.24.0 python ...

What the environment has already and what fits stays where it is, torch for one.
"""

import json
import subprocess
import sys


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(folder: str, *requirements: str) -> None:
    report = pip("--dry-run", "--report", "-", *requirements)
    found = [item["metadata"] for item in json.loads(report)["install"]]
    pinned = [f"{package['name']}=={package['version']}" for package in found]
    print(f"{folder}: {' '.join(pinned)}", flush=True)
    pip("--no-deps", "--upgrade", "--target", folder, *pinned)


if __name__ == "__main__":
    main(*sys.argv[1:])
