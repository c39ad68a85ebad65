"""`fastpo.patch` under DistributedDataParallel: two processes train as they do without it."""

from __future__ import annotations

import contextlib
import itertools

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _processes
import _trainers
import torch

import fastpo

TRAINERS = ("DPO", "SFT")


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
        # The main process alone writes its log to the end.
        _trainers.assert_same(ranks[0][prefix, True], ranks[0][prefix, False])
        # Had the gradients not been averaged, each process would hold a model of its own rows.
        first, second = (runs[prefix, True][1] for runs in ranks)
        assert all(torch.equal(first[name], second[name]) for name in first)
