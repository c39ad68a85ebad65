"""DPO and KTO log what TRL logs, bit for bit, without a collective and a wait for each value."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
from types import MethodType

import pytest

pytest.importorskip("trl", minversion="1.15")  # logits are read as they are before
pytest.importorskip("datasets")

import _processes
import _tiny as tiny
import _trainers
import torch
import transformers
import trl
from _processes import PROCESSES
from _tiny import one_thread  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import fastpo
from fastpo.integrations.trl import light

EVALUATED = {
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 2,
    "max_steps": 4,
}
# Collectives and scalars of one micro-batch in training, counted in TRL's source; no more of them.
COLLECTIVES = {"DPO": 15, "KTO": 14}
SCALARS = {"DPO": 15, "KTO": 14}
# KTO's loss takes one gathered number, and its `if`s take two looks at the numbers so far.
LOOKS = {"DPO": 0, "KTO": 2}


@contextlib.contextmanager
def way(name):
    """TRL's own, or under the patch with metrics one by one, or with all of them at once."""
    with contextlib.ExitStack() as stack:
        if name == "one by one":
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(light, "deferred", lambda *_: contextlib.nullcontext())
        if name != "own":
            stack.enter_context(fastpo.patched())
        yield


def build(prefix, folder, changes, model="llama", rows=None):
    data = _trainers.DATA[prefix]()
    data = data.select(range(rows or len(data)))
    if not (folder / "model").exists():
        tiny.model(model).save_pretrained(folder / "model")
    path = str(folder / "model")
    return _trainers.build(prefix, folder, path, data, changes, eval_dataset=data)


# name: (TRL's prefix, model, config on top)
RUNS = {
    "dpo": ("DPO", "llama", {}),
    "dpo_experts": ("DPO", "qwen2_moe", EVALUATED),
    "dpo_one_log": ("DPO", "llama", {"logging_steps": 100, "per_device_train_batch_size": 4}),
    "dpo_no_kl": ("DPO", "llama", {**EVALUATED, "f_divergence_type": "js_divergence"}),
    "dpo_ld": ("DPO", "llama", {"ld_alpha": 0.5}),
    "kto": ("KTO", "llama", EVALUATED),
    "kto_experts": ("KTO", "qwen2_moe", {}),
    "kto_no_kl": ("KTO", "llama", {"loss_type": "apo_zero_unpaired"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_logs(name, tmp_path):
    prefix, model, changes = RUNS[name]
    runs = []
    for each in ("one by one", "at once"):
        with way(each):
            runs.append(_trainers.train(build(prefix, tmp_path, changes, model)))
    (own, own_parameters), (ours, parameters) = runs
    assert ours == own
    assert [list(log) for log in ours] == [list(log) for log in own]
    kinds = [{key: type(value) for key, value in log.items()} for log in ours]
    assert kinds == [{key: type(value) for key, value in log.items()} for log in own]
    assert all(torch.equal(x, own_parameters[n]) for n, x in parameters.items())
    assert {"entropy", "num_tokens", "rewards/margins"} <= set().union(*own)
    assert any("eval_entropy" in log for log in own) == ("eval_steps" in changes)


def losses(prefix, folder, rows):
    """Trainer, and the batches of an epoch as it feeds them to its loss."""
    changes = {"per_device_train_batch_size": rows}
    trainer = build(prefix, folder, changes)
    trainer.model.train()
    trainer.is_in_train = True
    return trainer, [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]


def logged(trainer):
    trainer.log({})
    return trainer.state.log_history[-1]


@pytest.mark.parametrize("side", ["chosen", "rejected", "both"])
def test_a_batch_without_completion_tokens(side, tmp_path):
    """TRL's data has none, a collator of a script may: the quotients are 0.0 by TRL's `else`."""
    found = []
    for each in ("one by one", "at once"):
        with way(each):
            trainer, (batch, *_) = losses("DPO", tmp_path, 2)
            empty = {"chosen": slice(0, 2), "rejected": slice(2, 4), "both": slice(0, 4)}[side]
            batch["completion_mask"][empty] = 0
            trainer.compute_loss(trainer.model, batch)
            found.append(logged(trainer))
    assert found[0] == found[1]
    assert (found[0]["logits/chosen"] == 0.0) == (side != "rejected")
    assert (found[0]["entropy"] == 0.0) == (side == "both")


@pytest.mark.parametrize("label", [True, False])
def test_a_batch_of_one_label(label, tmp_path):
    """KTO has no metrics of the other, neither ours nor TRL's."""
    found = []
    for each in ("one by one", "at once"):
        with way(each):
            trainer, (batch, *_) = losses("KTO", tmp_path, 4)
            batch["label"] = torch.full_like(torch.as_tensor(batch["label"]), label)
            trainer.compute_loss(trainer.model, batch)
            found.append(logged(trainer))
    assert found[0] == found[1]
    assert ("rewards/chosen" in found[0]) == label
    assert ("rewards/rejected" in found[0]) != label


class Scalars(TorchDispatchMode):
    """How many single values operators bring to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("prefix", COLLECTIVES)
def test_one_transfer_for_a_log(prefix, tmp_path, monkeypatch):
    """And none for a value; what else waits is the same with and without."""
    transfers, own_cpu = [], torch.Tensor.cpu
    counts = {}
    for each in ("one by one", "at once"):
        with way(each):
            trainer, batches = losses(prefix, tmp_path, 4)
            accelerator = trainer.accelerator
            with monkeypatch.context() as patch, Scalars() as scalars:
                patch.setattr(torch.Tensor, "cpu", lambda x: transfers.append(1) or own_cpu(x))
                for batch in batches:
                    trainer.compute_loss(trainer.model, batch)
                looks = len(transfers)
                assert trainer.accelerator is accelerator
                logged(trainer)
            counts[each] = scalars.count, looks, len(transfers) - looks
            transfers.clear()
    steps = len(batches)
    assert counts["one by one"][0] - counts["at once"][0] == SCALARS[prefix] * steps
    assert counts["one by one"][1:] == (0, 0)
    assert counts["at once"][1:] == (LOOKS[prefix] * steps, 1)


def test_what_was_written_down_is_read_after_unpatch(tmp_path):
    found = []
    for each in ("one by one", "at once"):
        with way(each):
            trainer, (batch, *_) = losses("DPO", tmp_path, 2)
            trainer.compute_loss(trainer.model, batch)
        found.append(logged(trainer))
    assert found[0] == found[1]
    assert {type(value) for value in found[1].values()} <= {int, float, type(None)}


def numbers(trainer):
    """What only takes numbers, as json does, and not what stands for them."""
    found = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return json.loads(json.dumps({**found, "tokens": trainer._total_train_tokens}))


def subclass(own, seen):
    whole = own.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = whole(self, *args, **kwargs)
        seen.append(numbers(self))
        return loss

    return type("Mine", (own,), {"compute_loss": compute_loss, "__module__": "script"})


class Callback(transformers.TrainerCallback):
    def on_substep_end(self, *_, **__):
        self.seen.append(numbers(self.trainer))


@pytest.mark.parametrize("prefix", COLLECTIVES)
@pytest.mark.parametrize("kind", ["subclass", "callback", "instance", "class"])
def test_code_of_a_script_finds_numbers(kind, prefix, tmp_path, monkeypatch):
    """In the middle of a step, too."""
    runs = {"one by one": [], "at once": []}
    for each, seen in runs.items():
        with way(each), monkeypatch.context() as patch:
            if kind == "subclass":
                own = getattr(trl, f"{prefix}Trainer")
                patch.setattr(trl, f"{prefix}Trainer", subclass(own, seen))
            if kind == "class":
                own = getattr(trl, f"{prefix}Trainer")
                patch.setattr(own, "compute_loss", subclass(own, seen).compute_loss)
            trainer = build(prefix, tmp_path, {"gradient_accumulation_steps": 2, "max_steps": 2})
            if kind == "instance":
                method = subclass(type(trainer), seen).compute_loss
                trainer.compute_loss = MethodType(method, trainer)
            if kind == "callback":
                callback = Callback()
                callback.seen, callback.trainer = seen, trainer
                trainer.add_callback(callback)
            trainer.train()
    assert runs["at once"] == runs["one by one"] != []


def test_a_loop_of_a_script_finds_numbers(tmp_path):
    with way("at once"):
        trainer = build("DPO", tmp_path, {})
        trainer.model.train()
        for batch in trainer.get_train_dataloader():
            trainer.compute_loss(trainer.model, batch)
        assert numbers(trainer)["tokens"] > 0


def one_callback(rank, folder):
    """The main process alone has a callback of a script's."""
    runs = {}
    for prefix, each in itertools.product(SPLITS, ("one by one", "at once")):
        with way(each):
            trainer = build(prefix, folder, {"ddp_backend": "gloo"})
            if rank == 0:
                trainer.add_callback(type("Mine", (Callback,), {"seen": [], "trainer": trainer}))
            runs[prefix, each] = _trainers.train(trainer)[0]
    torch.save(runs, folder / f"{rank}.pt")


def test_a_callback_in_one_process_alone(tmp_path):
    """Collectives are those of all processes."""
    tiny.model("llama").save_pretrained(tmp_path / "model")
    _processes.run(one_callback, tmp_path)
    for ran in _processes.loaded(tmp_path):
        for prefix in SPLITS:
            assert ran[prefix, "at once"] == ran[prefix, "one by one"] != []


# TRL's prefix, rows, rows of a micro-batch: accelerate fills the last batch of both up.
SPLITS = {"DPO": (5, 1), "KTO": (9, 2)}
WAYS = ("own", "one by one", "at once")


def process(rank, folder):
    """Each trainer in each way, with the number of collectives."""
    collectives, gather = [], torch.distributed.all_gather
    torch.distributed.all_gather = lambda *args: collectives.append(1) or gather(*args)
    runs = {}
    for (prefix, (rows, batch)), each in itertools.product(SPLITS.items(), WAYS):
        changes = {
            **EVALUATED,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": batch,
            "ddp_backend": "gloo",
        }
        collectives.clear()
        with way(each):
            trainer = build(prefix, folder, changes, rows=rows)
            logs = _trainers.train(trainer)[0]
        assert trainer.accelerator.num_processes == PROCESSES
        runs[prefix, each] = logs, len(collectives)
    torch.save(runs, folder / f"{rank}.pt")


def collectives_saved(prefix):
    """TRL has 15 for every micro-batch; KTO's loss and its `if`s keep three of theirs."""
    rows, batch = SPLITS[prefix]
    batches = 2 * -(-rows // (batch * PROCESSES))  # of two epochs, and of two evaluations
    own = (2 * COLLECTIVES[prefix] - 1) * batches
    ours = EVALUATED["max_steps"] + batches
    if prefix == "KTO":
        # The ninth row is the first of its batch that counts: there is no rejected one with it.
        own -= 2 * 4
        ours += 3 * 2 * batches
    return own - ours


def test_two_processes_log_the_same(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path / "model")
    _processes.run(process, tmp_path)
    ranks = _processes.loaded(tmp_path)
    for rank, prefix in itertools.product(ranks, SPLITS):
        own, one_by_one, at_once = (rank[prefix, each] for each in WAYS)
        assert at_once[0] == one_by_one[0]
        assert len(at_once[0]) == len(own[0])
        assert own[1] == one_by_one[1]
        assert own[1] - at_once[1] == collectives_saved(prefix)
    for prefix in SPLITS:  # the main process alone writes its log to the end
        own, at_once = (ranks[0][prefix, each][0] for each in ("own", "at once"))
        for log, own_log in zip(at_once, own, strict=True):
            assert log == pytest.approx(own_log, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("prefix", ["DPO", "KTO"])
def test_an_average_is_of_floats(prefix, tmp_path, monkeypatch):
    """Since Python 3.12 `sum` rounds floats once, but not what only behaves like them."""
    module = sys.modules[getattr(trl, f"{prefix}Trainer").__module__]
    averaged = []
    monkeypatch.setattr(module, "sum", lambda x: averaged.append(x) or math.fsum(x), raising=False)
    with way("at once"):
        trainer, batches = losses(prefix, tmp_path, 2)
        for batch in batches[:2]:
            trainer.compute_loss(trainer.model, batch)
        averaged.clear()
        trainer.log({})
    assert {len(values) for values in averaged} >= {2}
    assert {type(value) for values in averaged for value in values} <= {int, float}
