"""`fastpo.patch` under DistributedDataParallel: two processes train as they do without it, and an
objective by name as TRL's loss of that name; groups train as in one process."""

from __future__ import annotations

import contextlib
import itertools

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _processes
import _tiny as tiny
import _trainers
import torch
from datasets import Dataset

import fastpo

TRAINERS = ("DPO", "SFT")
# Means per token of all processes, per row, and per token of a process; TRL's options by our names.
LOSSES = {
    "dapo": {"beta": 0.1, "unbiased_kl": True, "epsilon_high": None},
    "grpo": {"beta": 0.1, "unbiased_kl": True},
    "bnpo": {"beta": 0.1, "unbiased_kl": True},
}


def assert_trained_alike(ranks, kind):
    """With the patch or by name as without, and in both processes the same parameters."""
    # The main process alone writes its log to the end.
    _trainers.assert_same(ranks[0][kind, True], ranks[0][kind, False])
    # Had the gradients not been averaged, each process would hold a model of its own rows.
    first, second = (runs[kind, True][1] for runs in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)


def process(rank, folder):
    """Each trainer without the patch, then with it."""
    runs = {}
    for prefix, patched in itertools.product(TRAINERS, (False, True)):
        with fastpo.patched() if patched else contextlib.nullcontext():
            trainer = _trainers.build(
                prefix,
                folder,
                _trainers.saved(folder),
                _trainers.DATA[prefix](),
                {"per_device_train_batch_size": 1, "ddp_backend": "gloo"},
            )
            runs[prefix, patched] = _trainers.train(trainer)
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    torch.save(runs, folder / f"{rank}.pt")


def test_two_processes_train_the_same(tmp_path):
    _trainers.saved(tmp_path)
    _processes.run(process, tmp_path)
    ranks = _processes.loaded(tmp_path)
    for prefix in TRAINERS:
        assert_trained_alike(ranks, prefix)


def rollout(prompts, trainer):
    """Completions of other lengths in each process: a loss per token has to count those of all."""
    rank, words = trainer.accelerator.process_index, trainer.processing_class
    template = words.apply_chat_template
    ids = [template(x, add_generation_prompt=True, return_dict=True)["input_ids"] for x in prompts]
    drawn = [
        [(7 * i + 3 * j + rank) % 40 + 5 for j in range(1 + i + 2 * rank)] + [words.eos_token_id]
        for i in range(len(ids))
    ]
    return {"prompt_ids": ids, "completion_ids": drawn, "logprobs": None}


def group_process(rank, folder):
    """GRPOTrainer with TRL's own loss, then with ours under the same name."""
    runs = {}
    accumulated = {"gradient_accumulation_steps": 2, "num_iterations": 2, "ddp_backend": "gloo"}
    sampled = {"num_generations": 2, "max_completion_length": 8, "beta": 0.1, **accumulated}
    for loss_type in LOSSES:
        for ours in (False, True):
            objective = {"objective": loss_type, **LOSSES[loss_type]} if ours else {}
            theirs = {} if ours else {"loss_type": loss_type}
            with fastpo.patched(**objective):
                trainer = _trainers.build(
                    "GRPO",
                    folder,
                    _trainers.saved(folder),
                    tiny.prompts(),
                    {**sampled, **theirs, **({"beta": 0.0} if ours else {})},
                    reward_funcs=_trainers.reward,
                    rollout_func=rollout,
                )
                runs[loss_type, ours] = _trainers.train(trainer)
    torch.save(runs, folder / f"{rank}.pt")


def test_objectives_of_rollouts_train_as_trls_losses_do(tmp_path):
    pytest.importorskip("trl", minversion="1.15")  # the first with objectives by name
    _trainers.saved(tmp_path)
    _processes.run(group_process, tmp_path)
    ranks = _processes.loaded(tmp_path)
    for loss_type in LOSSES:
        assert_trained_alike(ranks, loss_type)


def groups(folder, **changes):
    """GroupTrainer on groups of one to four completions."""
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completions": [[{"role": "assistant", "content": x}] for x in tiny.GOOD[: i + 1]],
            "scores": [float(j) for j in range(i + 1)],
        }
        for i, question in enumerate(tiny.QUESTIONS[:4])
    ]
    config = _trainers.config("DPO", folder, {"max_steps": 2, **changes})
    trainer = fastpo.GroupTrainer(
        _trainers.saved(folder),
        args=config,
        objective="infonca",
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )
    return _trainers.train(trainer)


def groups_process(rank, folder):
    found = groups(folder, per_device_train_batch_size=1, ddp_backend="gloo")
    torch.save(found, folder / f"{rank}.pt")


def test_groups_of_two_processes_train_and_log_as_those_of_one(tmp_path):
    """Their completions differ in number."""
    pytest.importorskip("trl", minversion="1.15")  # the first with objectives by name
    whole = groups(tmp_path, per_device_train_batch_size=2)
    _processes.run(groups_process, tmp_path)
    ours = _processes.loaded(tmp_path)[0]
    for logs, _ in (ours, whole):
        logs[-1].pop("total_flos")  # counts pads, and there are others
    _trainers.assert_same(ours, whole)
