"""A training process of the demo: `python -m fastpo.demo.worker JOB.json`.

It writes its events to the standard output, one JSON object a line; everything that libraries print
goes to the standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from .jobs import Job


def main() -> int:
    events = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def emit(**event: object) -> None:
        events.write(json.dumps(event) + "\n")

    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    try:
        from . import answers, train

        kinds = {"warmup": train.warm_up, "train": train.prefer, "answer": answers.answer}
        kinds[job.kind](job, emit)
    except Exception as error:
        traceback.print_exc()
        emit(error=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
