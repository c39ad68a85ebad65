"""How much memory a training run took, over what the loaded process already had."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from typing import Any

_STATUS = "/proc/self/status"


class PeakMemory:
    """`loaded` when the trainer stands, `start` before the first step, `result` after the last.

    What runs between the first two, an evaluation for one, leaves freed memory with the allocator.
    Did it count as having been there, the training that reuses it would look smaller by as much.

    On a GPU: bytes of tensors. On Linux: resident memory of the process, whose high-water mark is
    set back at the start, so that loading the model does not count. Elsewhere the mark cannot be
    set back, and the increase is what training added to it.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.before = 0

    def loaded(self) -> None:
        if self.cuda:
            import torch

            self.before = torch.cuda.memory_allocated()
        else:
            self.before = _status("VmRSS")

    def start(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError), open("/proc/self/clear_refs", "w") as mark:
                mark.write("5")

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
