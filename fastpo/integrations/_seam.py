"""Names in other people's modules that fastpo stands in for, and the signatures it relies on."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any


class Replacement:
    """Stands in for `original`; the seam itself remembers what it hid, no global state does."""

    def __init__(self, original: Any) -> None:
        self.original = original


@dataclass(frozen=True)
class Seam:
    """A global of a module, looked up there at call time, with the parameters it must take.

    member: the method of a class that carries the signature; its first parameter is not listed.
    optional: versions without this name need no replacement.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    versions: tuple[str, ...]
    member: str | None = None
    optional: bool = False

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def current(self) -> Any:
        """What the module holds now: the original, a replacement, or None."""
        try:
            return getattr(import_module(self.module), self.name, None)
        except ImportError as error:
            raise RuntimeError(f"{self.module}: {error}; {self._works()}") from error

    def read(self) -> Any:
        """The original behind the name, its signature checked; None where it is optional."""
        original = self.current()
        if isinstance(original, Replacement):
            original = original.original
        if original is None and self.optional:
            return None
        found = self._parameters(original)
        if found != self.parameters:
            got = "nothing" if found is None else f"({', '.join(found)})"
            raise RuntimeError(
                f"{self.module}.{self.name}: expected ({', '.join(self.parameters)}), got {got}; "
                f"{self._works()}"
            )
        return original

    def write(self, value: Any) -> None:
        setattr(import_module(self.module), self.name, value)

    def restore(self) -> None:
        """Gives the original back; nothing happens where nothing of ours stands."""
        # Not imported, not patched: looking must not import it.
        current = getattr(sys.modules.get(self.module), self.name, None)
        if isinstance(current, Replacement):
            self.write(current.original)

    def _parameters(self, original: Any) -> tuple[str, ...] | None:
        target = original if self.member is None else getattr(original, self.member, None)
        if not callable(target):
            return None
        names = tuple(inspect.signature(target).parameters)
        return names if self.member is None else names[1:]

    def _works(self) -> str:
        try:
            installed = f"{self.package} {metadata.version(self.package)} is installed"
        except metadata.PackageNotFoundError:
            installed = f"{self.package} is not installed"
        return f"{installed}, fastpo works with {self.package} {' and '.join(self.versions)}"


def replace(replacements: dict[Seam, type[Replacement] | Any]) -> None:
    """Puts `make(original)` at every seam, or raises and leaves all of them alone."""
    made = [(seam, make(seam.read())) for seam, make in replacements.items()]
    for seam, replacement in made:
        if replacement.original is not None:
            seam.write(replacement)


@contextmanager
def kept(*seams: Seam) -> Iterator[None]:
    """On exit every seam holds what it held on entry."""
    before = [(seam, seam.current()) for seam in seams]
    try:
        yield
    finally:
        for seam, value in before:
            if seam.current() is not value:
                seam.write(value)
