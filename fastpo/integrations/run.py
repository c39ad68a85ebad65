"""`fastpo run`: what `python` does with the same arguments, with TRL patched.

The process becomes the script's. `__main__` and the patch are there until the interpreter ends, and
exit codes, uncaught exceptions and threads that outlive the last line are the interpreter's to
handle. What cannot be the same: `sys.orig_argv`, the modules that are imported before the first
line (torch, but not TRL), the calls below it that `inspect.stack()` shows, whether `__file__` is
still there at exit, and PYTHONPATH and FASTPO_RUN, by which Python processes that the script starts
are patched as well.
"""

from __future__ import annotations

import builtins
import io
import itertools
import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import BuiltinImporter, SourceFileLoader, SourcelessFileLoader
from pkgutil import get_importer
from types import ModuleType
from typing import Any

from .seams import imports
from .seams.seam import Replacement, Seam, replace_when_imported

_WHAT = "(script.py | folder | archive | - | -m module) [arguments]"
USAGE = f"fastpo run [--lazy] [--shared-prompts] [--padding-free] {_WHAT}"
# Before what is run: options of fastpo.patch.
_OPTIONS = {
    "--lazy": "lazy",
    "--shared-prompts": "shared_prompts",
    "--padding-free": "padding_free",
}

Options = dict[str, Any]  # of fastpo.patch

# For a module, a folder or an archive Python itself calls this.
_as_main = runpy._run_module_as_main  # type: ignore[attr-defined]


def run_script(argv: Sequence[str]) -> int:
    """What `python *argv` would do; afterwards the process is of no other use.

    Returns the exit code for the shell. What the script raises passes through, SystemExit too.
    """
    arguments = list(argv)
    given = [*itertools.takewhile(_OPTIONS.__contains__, arguments)]
    options, argv = {_OPTIONS[name]: True for name in given}, arguments[len(given) :]
    if {"shared_prompts", "padding_free"} <= options.keys():
        return _refuse("--padding-free: expected without --shared-prompts, got both")
    match argv:
        case ["-m", module, *rest]:
            # Until the module is found, -m stands where its file will.
            return _run(partial(_as_main, module), ["-m", *rest], os.getcwd(), options)
        case ["-", *_]:
            source = sys.stdin.buffer.read()
            return _run(partial(_execute, source, "<stdin>", BuiltinImporter), argv, "", options)
        case [target, *_] if not target.startswith("-"):
            return _run_file(target, argv, options)
        case [option, *_] if option.startswith("--"):
            known = ", ".join(_OPTIONS)
            return _refuse(f"option: expected one of {known} before the script, got {option}")
    return _refuse(f"expected a script or -m and a module, got {arguments!r}")


def _run_file(target: str, argv: Sequence[str], options: Options) -> int:
    file = os.path.join(os.getcwd(), target)  # `..` stays in it, as Python leaves it there
    if get_importer(file) is not None:
        start = partial(_as_main, "__main__", alter_argv=False)
        return _run(start, argv, file, options, importable=True)
    try:
        with io.open_code(file) as opened:
            source = opened.read()
    except OSError as error:
        return _refuse(f"script: expected a file, got {target!r} ({error.strerror})")
    kind = SourcelessFileLoader if file.endswith(".pyc") else SourceFileLoader
    start = partial(_execute, source, file, kind("__main__", file))
    return _run(start, argv, os.path.dirname(os.path.realpath(file)), options)


def _refuse(why: str) -> int:
    """The code is Python's own for a file it cannot open."""
    print(f"fastpo run: error: {why}\nusage: {USAGE}", file=sys.stderr)
    return 2


def _run(
    start: Callable[[], None],
    argv: Sequence[str],
    place: str,
    options: Options,
    *,
    importable: bool = False,
) -> int:
    """place: what Python puts first on `sys.path`, under -P and -I only if it is `importable`."""
    sys.argv = list(argv)
    safe = sys.flags.isolated or getattr(sys.flags, "safe_path", False)
    if not safe:
        del sys.path[0]  # it was for the program that has run up to now
    if importable or not safe:
        sys.path.insert(0, place)
    patch_with_children(options)
    _tell_processes(options)
    _clear_main()
    try:
        start()
    except SystemExit:
        raise
    except BaseException as error:
        _hide_own_frames(error)
        raise
    return 0


def _clear_main() -> None:
    """As the interpreter makes it. The module stays: multiprocessing and dill hold it by now."""
    main = vars(sys.modules["__main__"])
    main.clear()
    main |= vars(ModuleType("__main__"))
    main |= {"__builtins__": builtins, "__loader__": BuiltinImporter}
    if sys.version_info < (3, 14):  # made when they are asked for, since
        main["__annotations__"] = {}


def _execute(source: bytes, file: str, loader: Any) -> None:
    main = vars(sys.modules["__main__"])
    main |= {"__file__": file, "__cached__": None, "__loader__": loader}
    if isinstance(loader, SourcelessFileLoader):
        code: Any = loader.get_code("__main__")
    else:
        code = compile(source, file, "exec", dont_inherit=True)
    exec(code, main)


def _hide_own_frames(error: BaseException) -> None:
    """Whatever `sys.excepthook` is by now gets the traceback that Python would have handed it."""
    hook, theirs = sys.excepthook, error.__traceback__
    while theirs is not None and theirs.tb_frame.f_globals is globals():
        theirs = theirs.tb_next

    def once(kind: type[BaseException], value: BaseException, _: Any) -> None:
        sys.excepthook, sys.last_traceback = hook, theirs
        hook(kind, value.with_traceback(theirs), theirs)

    sys.excepthook = once


def patch_with_children(options: Options) -> None:
    """At the import of TRL, before which the script may set what TRL's imports read.

    Lazy logits, which need no TRL, at that of transformers' models.
    """
    replace_when_imported({_CHILDREN: partial(_Carrying, options=options)})
    actions: dict[str, Callable[[], None]] = {"trl": partial(_patch, options)}
    if options.get("lazy"):
        more = {"verl": _serve_verl, "openrlhf": _serve_readers, "axolotl": _serve_readers}
        actions |= {"transformers.modeling_utils": _make_lazy, **more}
    for module, action in actions.items():
        if module in sys.modules:
            action()
        else:
            imports.after(module, action)


def _make_lazy() -> None:
    from ..ops.shards.gathered import HeadOptions
    from .lazy import everywhere

    everywhere.install(HeadOptions())


def _tell_processes(options: Options) -> None:
    """Python processes that the script starts are patched, too, whatever they run.

    Until the interpreter ends its environment says so; one that ignores that is not.
    """
    places = [os.path.join(os.path.dirname(__file__), "startup"), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    os.environ["FASTPO_RUN"] = json.dumps(options)


def _patch(options: Options) -> None:
    from .trl.patch import patch

    patch(**options)


def _serve_verl() -> None:
    from ..ops.shards.gathered import HeadOptions
    from . import verl

    verl.install(HeadOptions())


def _serve_readers() -> None:
    from . import readers

    readers.install()


class _Carried:
    """Patches the process that unpickles it."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def __reduce__(self) -> tuple[Callable[[Options], None], tuple[Options]]:
        return patch_with_children, (self.options,)


class _Carrying(Replacement):
    """What a process of `multiprocessing` that is not a fork reads before it imports the script."""

    def __init__(self, original: Any, options: Options) -> None:
        super().__init__(original)
        self.options = options

    def __call__(self, name: str) -> dict[str, Any]:
        return {**self.original(name), "fastpo": _Carried(self.options)}


_CHILDREN = Seam(
    "multiprocessing.spawn",
    "get_preparation_data",
    ("name",),
    versions=("3.10", "3.11", "3.12", "3.13"),
)
