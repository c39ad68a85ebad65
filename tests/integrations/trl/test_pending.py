"""Pending metrics are what they stand for, found in one collective and one transfer."""

from __future__ import annotations

import copy
import operator
import pickle
import weakref
from contextlib import contextmanager

import pytest
import torch

from fastpo.integrations.trl.metrics import ledger as ledgers
from fastpo.integrations.trl.metrics.deferring import Deferring, deferred, quotient_guards
from fastpo.integrations.trl.metrics.ledger import Ledger
from fastpo.integrations.trl.metrics.pending import PendingNumber, PendingTensor


class Processes:
    """An accelerator whose other processes hold the tensors of this one times 2, 3 ..."""

    def __init__(self, count=1, *, sync_gradients=True):
        self.count, self.sync_gradients = count, sync_gradients
        self.use_distributed = count > 1
        self.collectives = 0
        self.gradient_state = self
        self.end_of_dataloader, self.remainder = False, -1

    def gather(self, packed):
        """Of bytes, when there are several: float32 first, which the tests here send alone."""
        self.collectives += 1
        if self.count == 1:
            return packed
        values = packed.view(torch.float32)
        return torch.cat([values * i for i in range(1, self.count + 1)]).view(torch.uint8)


@pytest.fixture
def transfers(monkeypatch):
    """One entry for each tensor that went to the host whole."""
    seen, own = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: seen.append(x.numel()) or own(x))
    return seen


X, Y = torch.tensor([1.5, -2.25, 7.1]), torch.tensor(0.3)
N = torch.tensor(2**53 + 1)  # no float64 holds it
# Each with a gather, of which the truth has none.
METRICS = {
    "mean": lambda gather: gather(X).mean().item(),
    "sum of int": lambda gather: gather(N).sum().item(),
    "nansum": lambda gather: gather(X / 0 * 0).nansum().item(),
    "bool": lambda gather: gather(X > 0).float().mean().item(),
    "bfloat16": lambda gather: gather(X.bfloat16()).sum().item(),
    "clamp": lambda gather: gather(X).mean().clamp(min=3).item(),
    "quotient": lambda gather: (gather(X).sum() / gather(N).sum()).item(),
    "numbers": lambda gather: gather(X).sum().item() / gather(N).sum().item() - 2 * 0.1,
    "reflected": lambda gather: 3 - (1 / gather(X).mean()).item() // 0.7,
    "power": lambda gather: (2 ** gather(X).mean() % 3 - abs(-gather(Y))).item() ** 2,
    "strided": lambda gather: gather(torch.stack((X, X + 1), 1)[:, 0]).mean().item(),
    "empty": lambda gather: gather(X[:0]).sum().item(),
}


@pytest.mark.parametrize("name", METRICS)
def test_the_same_value_and_type(name):
    ledger, metric = Ledger(), METRICS[name]
    with ledger.recording(Processes()):
        found = metric(ledger.gathered)
        assert isinstance(found, PendingNumber)
    expected = metric(lambda x: x)
    assert found.plain() == expected
    assert type(found.plain()) is type(expected)


def test_of_several_processes(transfers):
    accelerator, ledger = Processes(3), Ledger()
    with ledger.recording(accelerator):
        scalar = ledger.gathered(Y).sum().item()
        matrix = ledger.gathered(torch.stack((X, X + 1))).mean(0)
        kept = ledger.gathered(X, 4).mean().item()
    every = torch.stack((X, X + 1))
    every = torch.cat((every, 2 * every, 3 * every))
    assert scalar.plain() == (Y * torch.tensor([1, 2, 3])).sum().item()
    assert torch.equal(matrix.plain(), every.mean(0))
    assert kept.plain() == torch.cat((X, 2 * X[:1])).mean().item()
    assert accelerator.collectives == len(transfers) == 1


def test_bytes_of_any_dtype_find_their_place():
    tensors = [X > 0, X.double(), torch.tensor(7), torch.zeros(0, 3), X.bfloat16()[None]]
    tensors.append(torch.stack((X, X + 1), 1)[:, 0])  # strided
    packed = ledgers._pack(tensors)
    rows = ledgers._unpack_rows(torch.cat((packed, packed)), tensors)
    for x, found in zip(tensors, rows, strict=True):
        once = x if x.ndim else x[None]
        assert torch.equal(found, torch.cat((once, once)))
        assert found.dtype == x.dtype


def test_one_collective_a_step_and_one_transfer_a_log(transfers):
    """Of micro-batches whose gradients stay local, too; a read by one process never waits."""
    accelerator, ledger = Processes(2), Ledger()
    total, logged, expected = 0, [], 0
    for step in range(12):
        accelerator.sync_gradients = step % 3 == 2
        x = torch.tensor([float(step)])
        with ledger.recording(accelerator):
            total += ledger.gathered(x).sum().item() // 1
            logged.append(ledger.gathered(x).mean().item() / 2)
        x.fill_(-1)  # the next forward may write there
        expected += 3 * step
    assert accelerator.collectives == 4
    assert not transfers
    assert sum(logged) == sum(1.5 * step / 2 for step in range(12))
    assert total == expected
    assert accelerator.collectives == 4
    assert len(transfers) == 1


def test_a_tensor_that_nobody_has_read_is_gathered_with_its_step():
    """Later a process may read it alone."""
    accelerator, ledger = Processes(2), Ledger()
    with ledger.recording(accelerator):
        pending = ledger.gathered(X)
    assert accelerator.collectives == 1
    assert torch.equal(pending.plain(), torch.cat((X, 2 * X)))
    assert accelerator.collectives == 1


def test_nobody_reads_and_memory_stays_small(monkeypatch, transfers):
    monkeypatch.setattr(ledgers, "_MOST", 10)
    ledger, total = Ledger(), 0
    for _ in range(30):
        with ledger.recording(Processes()):
            total += ledger.gathered(Y).item()
    assert 3 <= len(transfers) <= 8
    assert total.plain() == sum([Y.item()] * 30)


def test_a_running_total_as_long_as_an_epoch():
    ledger, total = Ledger(), 0
    with ledger.recording(Processes()):
        for _ in range(5000):  # deeper than Python recurses
            total += 1 + ledger.gathered(N).item() * 0
    assert total.plain() == 5000


USES = {
    "float": float,
    "int": int,
    "bool": bool,
    "hash": hash,
    "round": lambda x: round(x, 1),
    "text": lambda x: f"{x:.3e} {x} {x!r}",
    "equal": lambda x: (x == 7.25, x != 7.25, x in [7.25]),
    "order": lambda x: (x > 7, x < 7, x >= 7.25, x <= 7, x < 8, x > 0),
    "unary": lambda x: (-x, abs(x)),
    "attribute": lambda x: x.is_integer(),
    "copy": lambda x: (copy.deepcopy(x), pickle.loads(pickle.dumps(x))),
    "with a tensor": lambda x: [(X * x).sum().item(), (x - X).tolist(), torch.maximum(X, X + x)[0]],
    "mean of a list": lambda x: sum([x, x, x]) / 3,
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("use", USES)
def test_a_number_is_a_number(use, inside):
    ledger, gathered = Ledger(), torch.tensor(7.25)
    with ledger.recording(Processes()):
        pending = ledger.gathered(gathered).item()
        found = USES[use](pending) if inside else None
    found = found if inside else USES[use](pending)
    if not inside:
        assert type(found) is type(USES[use](7.25)), "nothing is written down any more"
    assert found == USES[use](7.25)


TENSOR_USES = {
    "function": lambda x: torch.cat((x, x)),
    "argument": lambda x: X - x,
    "method": lambda x: x.view(3, 1),
    "attribute": lambda x: (x.shape, x.dtype),
    "index": lambda x: x[1:],
    "list": lambda x: (len(x), [y.item() for y in x], x.tolist()),
    "with a tensor": lambda x: x.clamp(min=X + 1) + X,
    "dimension": lambda x: x.sum(dim=0, keepdim=True).argmax(),
    "mask": lambda x: (x > 0) & torch.tensor([True, False, True]),
    "truth": lambda x: [bool(y) for y in (x.sum() > 0, x.sum() < 0, x.sum() == 0)],
    "scalar": lambda x: (float(x.sum()), int(x.sum()), range(3)[x.float().sum().long()]),
    "place": lambda x: "abc"[(x > 0).sum()],
    "text": lambda x: f"{x} {x!r}",
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("use", TENSOR_USES)
def test_a_tensor_is_a_tensor(use, inside):
    ledger = Ledger()
    x = torch.tensor([0.5, -0.25, 1.0])
    with ledger.recording(Processes()):
        pending = ledger.gathered(x)
        found = TENSOR_USES[use](pending) if inside else None
        found = found.plain() if isinstance(found, PendingTensor) else found
    found = found if inside else TENSOR_USES[use](pending)
    expected = TENSOR_USES[use](x)
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
    else:
        assert found == expected


def test_a_number_of_a_tensor_is_one_when_nothing_is_written_down():
    ledger = Ledger()
    with ledger.recording(Processes()):
        pending = ledger.gathered(X)
    assert type(pending.sum().item()) is float


def test_a_tensor_that_nobody_gathered_counts_as_it_is_then():
    ledger, other = Ledger(), X.clone()
    with ledger.recording(Processes()):
        product, difference = ledger.gathered(X) * other, ledger.gathered(Y).item() - other
        other.zero_()
    assert torch.equal(product, X * X)
    assert torch.equal(difference, Y.item() - X)


def test_a_loss_of_it_still_trains():
    """As accelerate's own on one process; across several its gather has no gradient."""
    weight, ledger = torch.ones(3, requires_grad=True), Ledger()
    with ledger.recording(Processes()):
        pending = ledger.gathered(weight * X)
        logged = pending.mean().item()
        (pending.mean() + X.sum()).backward()
    assert torch.equal(weight.grad, X * (torch.ones(1) / 3))
    assert logged.plain() == X.mean().item()


def test_the_graph_is_let_go():
    """What a micro-batch logs must not keep its activations until it is read."""
    weight, ledger = torch.ones(3, requires_grad=True), Ledger()
    kept = []
    for processes in (Processes(), Processes(2, sync_gradients=False)):
        activation = weight * X
        saved = weakref.ref(activation)  # for the backward of the square
        with ledger.recording(processes):
            kept.append(ledger.gathered(activation.square()).mean().item())
            del activation
            assert saved() is not None
        assert saved() is None


def guarded(gather, a, b):
    a, b, c = gather(a).sum(), gather(b).sum(), gather(b)
    mean = (a / b).item() if b > 0 else 0.0
    total, count = a.item(), c.sum().item()
    average = total / count if count > 0 else 0.0
    if count > 0:
        return mean, average, count
    return mean, average


@pytest.mark.parametrize("count", [4, 1, 0])
def test_a_guarded_quotient_waits_for_nobody(count, transfers):
    """Both its ways; an `if` of the same function has to wait."""
    ledger, counts = Ledger(), torch.tensor(count)
    with ledger.recording(Processes(), quotient_guards(guarded)):
        found = guarded(ledger.gathered, X, counts)
        assert len(transfers) == 1
    expected = guarded(lambda x: x, X, counts)
    assert [x.plain() for x in found] == list(expected)
    assert [type(x.plain()) for x in found] == [type(x) for x in expected]
    guards = {line for code, line in quotient_guards(guarded) if code is guarded.__code__}
    assert guards == {guarded.__code__.co_firstlineno + offset for offset in (2, 4)}


def unguarded(gather, x, limit):
    other = 1 / gather(x).item() if gather(x).item() > 0 else 0.0
    first = x.sum() / limit if limit > 0 else 1.0
    second = (limit / 2).item() if limit > 0 else 0.0
    both = x / limit if limit > 0 and x > 0 else 0.0
    many = x / limit if limit > 1 else 0.0
    times = x * limit if limit > 0 else 0.0
    beside = (x / limit if limit > 0 else 0.0) if x.sum() > 3 else 1.0
    return other, first, second, both, many, times, beside


def test_only_a_quotient_by_what_is_asked_is_guarded():
    assert quotient_guards(unguarded) == frozenset()
    assert quotient_guards(len) == frozenset()


PROMISED = {
    "truth": lambda x: bool(x.sum() > 0),
    "product": lambda x: [n * 2 for n in [x.sum().item()] if n > 0],
    "product of tensors": lambda x: [n * 2 for n in [x.sum()] if n > 0],
}


@pytest.mark.parametrize("name", PROMISED)
def test_a_promise_nobody_keeps_is_loud(name):
    """Were TRL's line another than it seems, its value would be wrong."""
    asks, ledger = PROMISED[name], Ledger()
    codes = (asks.__code__, *(x for x in asks.__code__.co_consts if hasattr(x, "co_code")))
    here = frozenset((code, asks.__code__.co_firstlineno) for code in codes)
    with (
        pytest.raises(RuntimeError, match="x > 0: expected a division by x to follow"),
        ledger.recording(Processes(), here),
    ):
        asks(ledger.gathered(X))
    with ledger.recording(Processes()):
        assert ledger.gathered(X).sum().item() == X.sum().item()


def test_an_error_of_one_number_is_its_own():
    ledger = Ledger()
    with ledger.recording(Processes()):
        zero, one = ledger.gathered(Y * 0).item(), ledger.gathered(Y).item()
        wrong, right = one / zero, one + 1
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            wrong.plain()
    assert right.plain() == Y.item() + 1


@contextmanager
def stood_in(accelerator):
    trainer = type("Trainer", (), {"__module__": "trl"})()
    trainer.accelerator, trainer.is_in_train = accelerator, True
    with deferred(trainer, guarded):
        yield trainer.accelerator
    assert trainer.accelerator is accelerator


def test_the_stand_in_forwards_what_is_no_tensor():
    accelerator = Processes()
    accelerator.gather_for_metrics = lambda *args: ("gathered", *args)
    with stood_in(accelerator) as found:
        assert isinstance(found, Deferring)
        assert found.count == 1
        assert found.gather_for_metrics((X, Y)) == ("gathered", (X, Y), False)
        assert found.gather_for_metrics(X, True) == ("gathered", X, True)
        assert found.gather([X])[0] is X
        parameter = torch.nn.Parameter(X)
        assert found.gather(parameter) is parameter
        assert isinstance(found.gather(X), PendingTensor)


@pytest.mark.parametrize(
    ("at_end", "remainder", "rows"), [(True, 2, 2), (True, 0, 3), (False, 2, 3)]
)
def test_rows_that_fill_the_last_batch_up_are_dropped(at_end, remainder, rows):
    accelerator = Processes()
    accelerator.end_of_dataloader, accelerator.remainder = at_end, remainder
    with stood_in(accelerator) as found:
        kept, all_of_them = found.gather_for_metrics(X), found.gather(X)
        accelerator.end_of_dataloader = not at_end  # known at the call only
        assert len(kept) == rows
        assert len(all_of_them) == 3


def test_an_exception_gives_the_accelerator_back():
    with pytest.raises(KeyError), stood_in(Processes()):
        raise KeyError


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits are a GPU's")
def test_a_micro_batch_waits_for_nothing():
    x, n, ledger = X.cuda(), N.cuda(), Ledger()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with ledger.recording(Processes(), quotient_guards(guarded)):
            found = METRICS["numbers"](lambda y: ledger.gathered(x if y is X else n))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.plain() == METRICS["numbers"](lambda y: x if y is X else n)


def test_all_operators_are_there():
    """One that is missing fails loudly, but fails."""
    ledger = Ledger()
    with ledger.recording(Processes()):
        number, tensor = ledger.gathered(N).item(), ledger.gathered(N)
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_"):
            function = getattr(operator, name)
            assert function(number, 1) == function(N.item(), 1), name
            assert function(1, number) == function(1, N.item()), name
            assert function(tensor, 1).plain() == function(N, 1), name
