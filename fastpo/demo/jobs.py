"""Training processes: what they are told, and how the demo listens to them.

Each run has a process of its own: resident memory of one cannot be told from what an earlier run
left behind in the allocator.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import DemoFailure

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_DEFAULTS = {
    # With several GPUs visible, Trainer would wrap the model in DataParallel, which TRL refuses.
    "CUDA_VISIBLE_DEVICES": "0",
    # Threads that spin for one another starve when the cores are shared: a warm-up step took 2.5 s
    # on 2 cores with two other jobs on them, and 0.29 s so.
    "OMP_WAIT_POLICY": "PASSIVE",
}
_LOG_LINES = 12


@dataclass(frozen=True)
class Job:
    """One process. patch: options of fastpo's, None: TRL alone.

    kind: "warmup", "train", or "answer" as the models in `model` and `out` do.
    """

    kind: str
    patch: dict[str, Any] | None
    model: str  # folder to start from
    tokenizer: str  # folder
    rows: str  # JSON file: {"train": [...], "held_out": [...]}
    out: str | None  # folder for the trained model; None: not kept
    scratch: str
    steps: int
    evaluations: int
    batch_size: int
    eval_batch_size: int
    learning_rate: float
    max_length: int
    seed: int
    lora: bool = False
    objective: dict[str, Any] | None = None

    def read_rows(self) -> dict[str, list[dict[str, Any]]]:
        return json.loads(Path(self.rows).read_text(encoding="utf-8"))


def _environment() -> dict[str, str]:
    """No way to a hub, and imports as in this process, wherever fastpo lies."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
    return {**_DEFAULTS, **os.environ, **OFFLINE, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run(job: Job, name: str) -> Iterator[dict[str, Any]]:
    """The events of the job, as they come; DemoFailure with the end of its log if it dies."""
    folder = Path(job.scratch)
    description, log = folder / f"{name}.json", folder / f"{name}.log"
    description.write_text(json.dumps(asdict(job)), encoding="utf-8")
    command = [sys.executable, "-m", "fastpo.demo.worker", str(description)]
    error = None
    with log.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=_environment(),
            cwd=folder,
            text=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                event = json.loads(line)
                error = event.get("error", error)
                yield event
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()  # waits, and closes the pipe
    if code:
        raise DemoFailure(_obituary(name, code, error, log))


def _obituary(name: str, code: int, error: str | None, log: Path) -> str:
    if error is not None:
        return f"{name}: {error}"
    why = f"signal {-code} (out of memory?)" if code < 0 else f"exit code {code}"
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    return "\n".join([f"{name}: the training process ended with {why}", *tail])
