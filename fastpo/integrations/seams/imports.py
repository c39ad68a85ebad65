"""Something to do right after a module is imported, without importing it now."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[], None]


class _Watcher(MetaPathFinder):
    """Finds nothing itself: lets the other finders find, and adds the action to their loader."""

    def __init__(self) -> None:
        self.actions: dict[str, Action] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.actions:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Acting(spec.loader, self)
                return spec
        return None


class _Acting(Loader):
    """Another loader, and the action after it; the module keeps the loader it would have had."""

    def __init__(self, loader: Loader, watcher: _Watcher) -> None:
        self.loader, self.watcher = loader, watcher

    def __getattr__(self, name: str) -> Any:
        """What else it can: `pkgutil` asks for sources and data before the import."""
        if name == "loader":
            raise AttributeError(name)  # of an instance that is being made
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        action = self.watcher.actions.get(module.__name__)
        if action is not None:
            action()  # should it fail, so does the import, and the next one tries again
            self.watcher.actions.pop(module.__name__, None)


_watcher = _Watcher()


def after(module: str, action: Action) -> None:
    """Runs `action` once, right after `module` has been imported; a later call replaces it."""
    _watcher.actions[module] = action
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)


def forget(module: str) -> None:
    _watcher.actions.pop(module, None)
    if not _watcher.actions and _watcher in sys.meta_path:
        sys.meta_path.remove(_watcher)


def waiting() -> dict[str, Action]:
    return dict(_watcher.actions)


def restore(actions: dict[str, Action]) -> None:
    """Waits for exactly these modules again, and acts now on those imported meanwhile."""
    for module in waiting():
        forget(module)
    for module, action in actions.items():
        if module in sys.modules:
            action()
        else:
            after(module, action)
