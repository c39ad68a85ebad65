"""The Triton kernels as a repository that Hugging Face's `kernels` loads: torch-noarch, edition 5.

    python .ci/hub.py build/hub

`torch-ext/` and build.toml are what its kernel-builder reads. `build/` is what that makes of them
where nothing is compiled: the sources and metadata.json, for each backend.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME, VERSION = "fastpo-kernels", 1  # grows when a function of the kernels changes its arguments
BACKENDS = ("cpu", "cuda")  # on a CPU by Triton's interpreter
BUILD = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = [{", ".join(f'"{backend}"' for backend in BACKENDS)}]

[general.hub]
repo-id = "fastpo/{NAME}"

[torch-noarch]
"""
CARD = f"""\
---
library_name: kernels
license: apache-2.0
---

# {NAME}

The Triton kernels of fastpo: statistics and gradients of rows of logits, tile by tile, for
log-probabilities, entropies and divergences of a vocabulary that is never whole in memory.

```python
from kernels import get_kernel

rows = get_kernel("fastpo/{NAME}", version={VERSION}).rows
```

The functions are described where they are defined. Loops over tiles, budgets and autograd are
fastpo's: `pip install fastpo`.
"""


def main(folder: Path) -> None:
    sources = sorted((ROOT / "kernels").glob("*.py"))
    module = NAME.replace("-", "_")
    shutil.rmtree(folder, ignore_errors=True)
    package(folder / "torch-ext" / module, sources)
    (folder / "build.toml").write_text(BUILD, encoding="utf-8")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder)
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        package(variant, sources)
        (variant / "metadata.json").write_text(metadata(backend), encoding="utf-8")


def package(folder: Path, sources: list[Path]) -> None:
    """Modules that import one another relatively, and nothing but torch and triton."""
    folder.mkdir(parents=True)
    for path in sources:
        shutil.copy(path, folder)
    names = [path.stem for path in sources if not path.stem.startswith("_")]
    lines = [f'"""{NAME}, as fastpo has them."""', "", f"from . import {', '.join(names)}", ""]
    listed = ", ".join(f'"{name}"' for name in names)
    text = "\n".join([*lines, f"__all__ = [{listed}]", ""])
    (folder / "__init__.py").write_text(text, encoding="utf-8")


def metadata(backend: str) -> str:
    known = {
        "id": f"_{NAME.replace('-', '_')}_{backend}_{VERSION}",
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    return json.dumps(known, indent=2) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
