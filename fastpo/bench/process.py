"""Measurements that do not see one another: fresh processes, with their imports behind them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import torch

LOST = 3  # exit code: a device runs nothing any more


class Died(RuntimeError):
    """The process ended without an answer: killed for its memory, as a rule."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"the process ended with code {code}")
        self.code = code


def one_interrupt() -> None:
    """`timeout` interrupts a process, and then its group: the second would end what the first has
    begun, to write down what was measured. After a second an interrupt is one again."""
    last = -float("inf")

    def heard(*_: Any) -> None:
        nonlocal last
        again, last = time.monotonic() - last < 1, time.monotonic()
        if not again:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, heard)


def leave(code: int) -> NoReturn:
    """At once where a device was lost: to free what lies on it would fail, or wait for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code == LOST:
        os._exit(code)
    sys.exit(code)


def for_memory(error: Exception) -> bool:
    """Whether it failed for want of memory: an allocator says so, or a job of `fresh` or `alone`
    was killed."""
    if isinstance(error, Died):
        return error.code == -signal.SIGKILL
    told = f"{type(error).__name__}: {error}"
    return any(word in told for word in ("OutOfMemory", "DefaultCPUAllocator"))


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a process of its own; what it raises is raised here.

    Died when the process ends without an answer.
    """
    context = _context()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        raised, result = here.recv()
    except EOFError:
        process.join()
        raise Died(process.exitcode) from None
    except BaseException:
        process.kill()  # an interrupt does not wait for a measurement that nobody wants
        raise
    finally:
        here.close()
        process.join()
    if raised:
        raise result
    return result


def alone(function: Callable[[Any], Any], job: Any) -> Any:
    """`function(job)`, and what it raises, as if nothing had run before it on `job.device`.

    On a CPU in a fresh process, because resident memory is measured. On a GPU tensors are, and
    here: a process would import and start for ten seconds.
    """
    if job.device == "cpu":
        return fresh(function, job)
    try:
        return function(job)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    raise RuntimeError(said)


@cache
def _context() -> Any:
    """A server that has imported torch once, and forks before any thread of torch's has run.

    Not with a GPU: an import that only counts the devices would keep CUDA from every fork.
    """
    # Threads that spin for one another starve where cores are shared: a step of 0.5 s took 2.7 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastpo.bench.head", "fastpo.bench.step.run"])
    _start_server()
    return context


def _start_server() -> None:
    """Deaf to interrupts, as what it forks: a terminal interrupts all of its processes, and each
    would print a traceback. This one answers, and ends them."""
    from multiprocessing import forkserver

    if threading.current_thread() is not threading.main_thread():
        return  # it may not set signals; the server starts with the first process
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, heard)


def _answer(pipe: Any, function: Callable[..., Any], arguments: tuple) -> None:
    try:
        answer = (False, function(*arguments))
    except Exception as error:
        # Raised again where it was asked for; as text, because not every exception pickles.
        answer = (True, RuntimeError(f"{type(error).__name__}: {error}"))
    pipe.send(answer)
    pipe.close()
