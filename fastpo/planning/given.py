"""What a model's own files and transformers have to say of them, as one line of ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from .names import check_path

_SIZES = ("vocab_size", "num_hidden_layers")
# Some models have none of these, or one for each layer.
_PERHAPS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


@contextmanager
def foreign(expected: str) -> Iterator[None]:
    """ValueError of one line for whatever others' code raises over files that are anybody's.

    Only around calls of others' code, and never for what a device lacks.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        line = " ".join(str(error).split())[:200] or "no reason"
        raise ValueError(f"{expected}, got {type(error).__name__}: {line}") from error


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Without the traceback that it logs of what it also raises."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def read_config(model: Any, name: str = "model") -> Any:
    """Of a folder or a config file; nothing is downloaded, no code of the model's own runs."""
    if isinstance(model, PretrainedConfig):
        return model
    if not isinstance(model, str | Path):
        wanted = "a folder, a config.json or a config"
        raise ValueError(f"{name}: expected {wanted}, got {type(model).__name__}")
    check_path(model, name)
    with foreign(f"{name}: expected a config transformers knows in {model}"):
        return AutoConfig.from_pretrained(
            Path(model), local_files_only=True, trust_remote_code=False
        )


def check_sizes(config: Any, name: str) -> None:
    """ValueError for sizes that no model has; transformers builds some of them all the same."""
    text = config.get_text_config()
    for size in (*_SIZES, *_PERHAPS):
        value = getattr(text, size, None)
        if not (value >= 1 if isinstance(value, int) else size in _PERHAPS):
            raise ValueError(f"{name}: expected {size} >= 1, got {value!r}")
