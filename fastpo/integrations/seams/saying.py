"""What fastpo leaves as it is, and why, in one line of the log."""

from __future__ import annotations

import functools
import logging

_log = logging.getLogger(__name__)


@functools.cache
def say_once(what: str, why: str) -> None:
    _log.warning("fastpo: %s: %s", what, why)
