"""Long runs on a CPU: memory that stays, patches that leave nothing, runs killed and resumed.

    python benchmarks/soak.py --out benchmarks/results/soak.json

Each part has a process of its own; those that the file has are not run again. Resident memory is
read after a tenth of a part, when caches are full, and at its end. A training is TRL's DPO of a
model of two layers on rows of 64 tokens; the curve of a killed one that was resumed is compared
with that of one that was left alone, number by number.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from trainers import TRAINERS, Sizes, small_model, texts

import fastpo
from fastpo.bench import machine
from fastpo.bench.process import fresh
from fastpo.bench.report import write

SIZES = Sizes(words=2048, length=64, hidden=32, steps=32)  # as many rows
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=10_000, help="of patch and of attach")
    parser.add_argument("--steps", type=int, default=10_000, help="of the training")
    parser.add_argument("--kills", type=int, default=3, help="of a run of 40 steps")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    command = f"python benchmarks/soak.py --times {options.times} --steps {options.steps}"
    report = machine.facts("cpu") | {"what": "soak", "command": command, "dtype": "float32"}
    report["rows"] = []
    parts: dict[str, Callable[[], Row]] = {
        "patch, unpatch": functools.partial(fresh, patches, options.times),
        "attach, detach": functools.partial(fresh, attaches, options.times),
        "steps of DPO, patched": functools.partial(trained, options.steps),
        "runs killed and resumed": functools.partial(killed, options.kills),
        "demos killed and begun again": functools.partial(killed_demos, options.kills),
    }
    if options.out.exists():
        report["rows"] = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
    done = {row["part"] for row in report["rows"]}
    for name, run in parts.items():
        if name in done:
            continue
        row = {"part": name, **run()}
        print(json.dumps(row), flush=True)
        report["rows"].append(row)
        write(report, options.out)


def resident() -> float:
    """MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def repeated(times: int, once: Callable[[], None]) -> Row:
    early = 0.0
    for i in range(times):
        once()
        if i + 1 == -(-times // 10):
            early = resident()
    return {"times": times, "early_mib": early, "late_mib": resident()}


def patches(times: int) -> Row:
    """Every name that was taken over is TRL's own again."""
    from fastpo.integrations.trl.patch import SEAMS

    fastpo.patch()
    fastpo.unpatch()
    loaded = [seam for seam in SEAMS if seam.module in sys.modules]
    before = [seam.current() for seam in loaded]

    def once() -> None:
        fastpo.patch()
        fastpo.unpatch()

    row = repeated(times, once)
    if any(seam.current() is not own for seam, own in zip(loaded, before, strict=True)):
        raise AssertionError("a name of TRL's is not what it was")
    return row


def attaches(times: int) -> Row:
    model = model_of(tokenizer())
    own = dict(vars(model))

    def once() -> None:
        fastpo.attach(model).detach()

    row = repeated(times, once)
    if vars(model) != own:
        raise AssertionError("the model is not what it was")
    return row


def trained(steps: int) -> Row:
    """With TRL's own losses beside fastpo's, to the last."""
    ours, own = (fresh(train, steps, patched) for patched in (True, False))
    pairs = zip(ours["losses"], own["losses"], strict=True)
    return {
        "times": steps,
        "early_mib": ours["early_mib"],
        "late_mib": ours["late_mib"],
        "difference": max(abs(a - b) for a, b in pairs),
        "last_loss": ours["losses"][-1],
    }


def train(steps: int, patched: bool, folder: str | None = None) -> Row:
    """Losses of each hundredth of it; with a folder checkpoints there, resumed where there are."""
    from transformers import PrinterCallback, TrainerCallback

    class Watch(TrainerCallback):
        early = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == -(-steps // 10):
                self.early = resident()

    torch.set_num_threads(1)
    watch = Watch()
    with fastpo.patched() if patched else nullcontext(), tempfile.TemporaryDirectory() as other:
        trainer = dpo(steps, folder or other, saving=folder is not None)
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=None if folder is None else newest(Path(folder)))
    logs = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    return {"losses": [*logs.values()], "early_mib": watch.early, "late_mib": resident()}


def newest(folder: Path) -> str | None:
    """transformers writes the trainer's state last: without it a checkpoint was cut off."""
    states = folder.glob("checkpoint-*/trainer_state.json")
    whole = sorted((path.parent for path in states), key=lambda x: int(x.name.partition("-")[2]))
    return str(whole[-1]) if whole else None


def tokenizer() -> Any:
    from fastpo.demo.data import embedded_pairs
    from fastpo.demo.tokenizer import texts_of, train_tokenizer

    return train_tokenizer(texts_of(embedded_pairs().train), SIZES.words)


def model_of(words: Any) -> Any:
    return small_model(words, SIZES, seed=0)


def dpo(steps: int, folder: str, *, saving: bool) -> Any:
    import datasets
    from trl import DPOConfig, DPOTrainer

    from fastpo.demo.data import embedded_pairs

    datasets.disable_progress_bars()
    words = tokenizer()
    rows = texts(TRAINERS["DPO"], embedded_pairs().train, SIZES, words)
    model_of(words).save_pretrained(f"{folder}/model")  # TRL reads the reference from there
    return DPOTrainer(
        model=f"{folder}/model",
        args=DPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=2,
            max_length=SIZES.length,
            learning_rate=1e-4,
            logging_steps=1 if saving else max(steps // 100, 1),
            save_strategy="steps" if saving else "no",
            save_steps=4,
            save_total_limit=2,
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=words,
    )


def killed(kills: int) -> Row:
    """A run of 40 steps, killed some seconds after each start that made a checkpoint."""
    steps = 40
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as broken:
        alone = fresh(train, steps, True, whole)["losses"]
        program = f"import soak; soak.train({steps}, True, {broken!r})"
        for i in range(kills):
            kill_when(
                [sys.executable, "-c", program],
                Path(__file__).parent,
                lambda i=i: len(list(Path(broken).glob(f"checkpoint-{8 * (i + 1)}"))) > 0,
            )
        resumed = fresh(train, steps, True, broken)["losses"]
    same = resumed == alone
    if not same:
        raise AssertionError(f"curves: expected {alone}, got {resumed}")
    return {"times": kills, "difference": 0.0, "last_loss": resumed[-1]}


def killed_demos(kills: int) -> Row:
    """A demo leaves nothing in its place when it is killed, and none of it in the next one."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fastpo", "demo", "--steps", "4", "--warmup-steps", "8"]
        command += ["--eval-rows", "4", "--batch-size", "2", "--out"]
        started = time.monotonic()
        subprocess.run([*command, "whole"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        length = time.monotonic() - started
        for i in range(kills):
            begun = time.monotonic()
            due = length * (i + 1) / (kills + 1)
            kill_when(
                [*command, "broken"],
                Path(folder),
                lambda begun=begun, due=due: time.monotonic() - begun > due,
            )
            if (Path(folder) / "broken").exists():
                raise AssertionError("a demo that was killed has left a folder")
        subprocess.run([*command, "broken"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        curves = [
            json.loads((Path(folder) / name / "report.json").read_text())["variants"]["fastpo"]
            for name in ("whole", "broken")
        ]
    if curves[0]["loss"] != curves[1]["loss"]:
        raise AssertionError(f"curves: {curves[0]['loss']} and {curves[1]['loss']} differ")
    return {"times": kills, "difference": 0.0, "last_loss": curves[1]["loss"][-1]}


def kill_when(command: list[str], folder: Path, due: Callable[[], bool]) -> None:
    """SIGKILL to the process and those it started; the run must not have ended before."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=folder, start_new_session=True, stdout=quiet)
    while not due():
        if process.poll() is not None:
            raise AssertionError(f"the run ended with {process.returncode} before it was killed")
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main()
