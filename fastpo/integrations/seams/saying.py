"""One line of the log: a warning of what fastpo leaves as it is, and why; what it took over."""

from __future__ import annotations

import functools
import logging

_log = logging.getLogger(__name__)


@functools.cache
def say_once(what: str, why: str) -> None:
    _log.warning("fastpo: %s: %s", what, why)


def inform(what: str, how: str) -> None:
    _log.info("fastpo: %s: %s", what, how)
