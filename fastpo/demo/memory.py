"""How much memory a training run took, over what the loaded process already had."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from typing import Any

_STATUS = "/proc/self/status"


class PeakMemory:
    """`start` before the first step, `result` after the last.

    On a GPU: bytes of tensors. On Linux: resident memory of the process, whose high-water mark is
    set back at the start, so that loading the model does not count. Elsewhere the mark cannot be
    set back, and the increase is what training added to it.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.before = 0

    def start(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            with suppress(OSError), open("/proc/self/clear_refs", "w") as mark:
                mark.write("5")
            self.before = _status("VmRSS")

    def result(self) -> dict[str, Any]:
        if self.cuda:
            import torch

            kind, peak = "GPU tensors", torch.cuda.max_memory_allocated()
        else:
            kind, peak = "resident", _status("VmHWM")
        increase = max(peak - self.before, 0)
        return {"kind": kind, "before": self.before, "peak": peak, "increase": increase}


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes; without /proc the high-water mark for all."""
    if os.path.exists(_STATUS):
        with open(_STATUS) as status:
            found = re.search(rf"^{field}:\s+(\d+) kB", status.read(), re.MULTILINE)
        if found:
            return int(found.group(1)) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
