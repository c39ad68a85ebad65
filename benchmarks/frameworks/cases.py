"""What every framework has: an environment, ways to train, and files of its own format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Pairs = list[dict[str, str]]


@dataclass(frozen=True)
class Sizes:
    words: int
    hidden: int
    length: int
    steps: int
    pairs: int = 2  # of a step; of an objective on single texts twice as many texts


@dataclass(frozen=True)
class Case:
    name: str
    data: str  # "pairs", "single" or "text"
    options: dict[str, Any] = field(default_factory=dict)
    lora: bool = False


@dataclass(frozen=True)
class Framework:
    name: str
    package: str  # of Python, and its folder in build
    distribution: str
    module: str  # what `-m` runs
    cases: tuple[Case, ...]
    # (folder with the model, pairs) before the first case
    prepare: Callable[[Path, Pairs], None]
    # (folder with the model, case, output folder, sizes): what follows the module
    arguments: Callable[[Path, Case, Path, Sizes], list[str]]
    environment: dict[str, str]
    launcher: tuple[str, ...] = ()  # between `python` and `-m`
