"""Names in other people's modules that fastpo stands in for, and the signatures it relies on."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
from types import MethodType
from typing import Any

from . import imports
from .saying import say_once


class Replacement:
    """Stands in for `original`; the seam itself remembers what it hid, no global state does."""

    def __init__(self, original: Any) -> None:
        self.original = original


class Method(Replacement):
    """Stands in for a method: called with the instance first, as the original is."""

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        if original is not None:
            functools.update_wrapper(self, original)
            vars(self)["__signature__"] = inspect.signature(original)

    def __getattr__(self, name: str) -> Any:
        """`__code__`, `__defaults__`: what a function has."""
        if name == "original":
            raise AttributeError(name)  # of an instance that is being made
        return getattr(self.original, name)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def arguments(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """By name; of what does not fit the error is Python's own, which names the function."""
        try:
            return inspect.signature(self.original).bind(*args, **kwargs).arguments
        except TypeError:
            self.original(*args, **kwargs)
            raise


Make = Callable[[Any], Replacement]


@dataclass(frozen=True)
class Seam:
    """A name in a module, looked up there at call time, with the parameters it must take.

    name: a global of the module, or `Class.method`; then the first parameter is not listed.
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
            return self._lookup(import_module(self.module))
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
        owner, attribute = self._owner(import_module(self.module))
        setattr(owner, attribute, value)

    def restore(self) -> None:
        """Gives the original back; nothing happens where nothing of ours stands."""
        # Not imported, not patched: looking must not import it.
        module = sys.modules.get(self.module)
        current = None if module is None else self._lookup(module)
        if isinstance(current, Replacement):
            self.write(current.original)

    def _owner(self, module: Any) -> tuple[Any, str]:
        owner, _, attribute = self.name.rpartition(".")
        return (getattr(module, owner, None) if owner else module), attribute

    def _lookup(self, module: Any) -> Any:
        # A class's own attribute only: an inherited one would be given back to the wrong class.
        owner, attribute = self._owner(module)
        return None if owner is None else vars(owner).get(attribute, _lazy(owner, attribute))

    def _parameters(self, original: Any) -> tuple[str, ...] | None:
        target = original if self.member is None else getattr(original, self.member, None)
        if not callable(target):
            return None
        names = tuple(inspect.signature(target).parameters)
        return names if self.member is None and "." not in self.name else names[1:]

    def _works(self) -> str:
        try:
            installed = f"{self.package} {metadata.version(self.package)} is installed"
        except metadata.PackageNotFoundError:
            installed = f"{self.package} is not installed"
        return f"{installed}, fastpo works with {self.package} {' and '.join(self.versions)}"


def _lazy(owner: Any, attribute: str) -> Any:
    """A module may serve a name by __getattr__; a class would serve an inherited one."""
    return None if inspect.isclass(owner) else getattr(owner, attribute, None)


def fitting(replacements: Mapping[Seam, Make]) -> dict[Seam, Make]:
    """Those for the installed version of their package.

    A newer one than any is taken for the newest, and its signatures tell; an older one is an error.
    """
    found: dict[Seam, Make] = {}
    for package in {seam.package for seam in replacements}:
        seams = [seam for seam in replacements if seam.package == package]
        version = _fitting_version(package, {v for seam in seams for v in seam.versions})
        found |= {seam: replacements[seam] for seam in seams if version in seam.versions}
    return found


def _fitting_version(package: str, known: set[str]) -> str:
    """The installed version as seams name it: `1.16`."""
    ordered = sorted(known, key=_numbers)
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        return ordered[-1]
    if _numbers(installed) < _numbers(ordered[0]):
        raise RuntimeError(f"{package}: expected version {' or '.join(ordered)}, got {installed}")
    return ".".join(map(str, min(_numbers(installed), _numbers(ordered[-1]))))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def replace(replacements: Mapping[Seam, Make]) -> None:
    """Puts `make(original)` at every seam, or raises and leaves all of them alone."""
    made = [(seam, make(seam.read())) for seam, make in replacements.items()]
    for seam, replacement in made:
        if replacement.original is not None:
            seam.write(replacement)


def replace_when_imported(
    replacements: Mapping[Seam, Make], put: Callable[[Mapping[Seam, Make]], None] = replace
) -> None:
    """`put`, module by module: now where it is imported already, else when it will be."""
    by_module: dict[str, dict[Seam, Make]] = {}
    for seam, make in replacements.items():
        by_module.setdefault(seam.module, {})[seam] = make
    imported = {name: part for name, part in by_module.items() if name in sys.modules}
    put({seam: make for part in imported.values() for seam, make in part.items()})
    for name, part in by_module.items():
        if name not in imported:
            imports.after(name, functools.partial(put, part))


def replace_where_they_fit(
    otherwise: str, replacements: Mapping[Seam, Make], beside: Sequence[Seam] = ()
) -> None:
    """`replace`, when those of `beside` in the same modules fit as well; else the log says once why
    it is `otherwise`."""
    modules = {seam.module for seam in replacements}
    try:
        for seam in beside:
            if seam.module in modules:
                seam.read()
        replace(replacements)
    except RuntimeError as error:
        say_once(otherwise, str(error))


def restore(*seams: Seam) -> None:
    """Gives every original back, and forgets what was waiting for an import."""
    for seam in seams:
        imports.forget(seam.module)
        seam.restore()


@contextmanager
def kept(*seams: Seam) -> Iterator[None]:
    """On exit every seam holds what it held on entry, whether its module was imported or not."""
    before = {
        seam: sys.modules[seam.module] and seam.current()
        for seam in seams
        if seam.module in sys.modules
    }
    waiting = imports.waiting()
    try:
        yield
    finally:
        for seam in seams:
            if seam not in before:
                seam.restore()
            elif seam.current() is not before[seam]:
                seam.write(before[seam])
        imports.restore(waiting)
