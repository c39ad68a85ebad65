"""`standing_in`: a method of one instance, replaced for the calls of one thread or task."""

from __future__ import annotations

import asyncio
import copy
import threading

import pytest

from fastpo.integrations.seams import calls
from fastpo.integrations.seams.calls import beneath, standing_in, unhidden


class Bell:
    tone = "own"

    def ring(self, times=1):
        return [self.tone] * times

    @property
    def sound(self):
        return getattr(self, "_sound", lambda: "class's")


def elsewhere(call):
    """What another thread gets."""
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def test_one_thread_s_call_is_no_other_s():
    bell = Bell()
    with standing_in(bell, "ring", lambda times=1: "ours"):
        assert bell.ring(2) == "ours"
        assert elsewhere(lambda: bell.ring(times=2)) == ["own", "own"]
        assert unhidden(bell.ring)(2) == ["own", "own"]
        assert beneath(bell, "ring") is None
        assert Bell().ring() == ["own"]
    assert not vars(bell)


def test_calls_within_calls_and_beside_them():
    bell = Bell()

    def beside():
        with standing_in(bell, "ring", lambda: "beside"):
            return bell.ring()

    with standing_in(bell, "ring", lambda: "outer"):
        with standing_in(bell, "ring", lambda: "inner"):
            assert bell.ring() == "inner"
            assert elsewhere(beside) == "beside"
        assert bell.ring() == "outer"
    assert not vars(bell)


def test_one_task_s_call_is_no_other_s():
    bell = Bell()

    async def ring(answer):
        with standing_in(bell, "ring", lambda: answer):
            await asyncio.sleep(0)
            return bell.ring()

    async def plain():
        await asyncio.sleep(0)
        return bell.ring()

    async def all_at_once():
        return await asyncio.gather(ring("a"), plain(), ring("b"))

    assert asyncio.run(all_at_once()) == ["a", ["own"], "b"]
    assert not vars(bell)


def test_what_the_instance_had_comes_back():
    bell = Bell()
    bell.ring = mine = lambda: "instance's"
    with standing_in(bell, "ring", lambda: "ours"):
        assert beneath(bell, "ring") is mine
        assert elsewhere(lambda: bell.ring()) == "instance's"
    assert vars(bell) == {"ring": mine}


def test_what_is_read_by_another_name():
    bell = Bell()
    with standing_in(bell, "_sound", lambda: "ours", "sound"):
        assert bell.sound() == "ours"
        assert elsewhere(lambda: bell.sound()) == "class's"
    assert not vars(bell)


def test_what_is_put_on_top_meanwhile_stays():
    bell = Bell()
    with standing_in(bell, "ring", lambda: "ours"):
        ours = bell.ring
        bell.ring = on_top = lambda: ("on top of", ours())
        assert bell.ring() == ("on top of", "ours")
    assert vars(bell) == {"ring": on_top}
    assert bell.ring() == ("on top of", ["own"])
    bell.ring = ours
    with standing_in(bell, "ring", lambda: "again"):
        assert bell.ring() == "again"
    assert not vars(bell)


def test_a_copy_made_meanwhile_is_free_of_the_call():
    bell = Bell()
    with standing_in(bell, "ring", lambda: "ours"):
        twin = copy.deepcopy(bell)
    twin.tone = "twin's"
    assert twin.ring() == ["twin's"]
    with standing_in(twin, "ring", lambda: "ours"):
        assert twin.ring() == "ours"
    assert vars(twin) == {"tone": "twin's"}


class Interrupted:
    """The variable of handlers; once, a KeyboardInterrupt comes right after it was set."""

    def __init__(self, variable, after):
        self.get, self.own, self.after = variable.get, variable.set, after

    def set(self, value):
        self.own(value)
        self.after -= 1
        if not self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 2], ids=["on entry", "on exit"])
def test_an_interrupted_call_is_over(after, monkeypatch):
    """It answers for nobody, at once; what it left on the instance goes with the next call."""
    bell = Bell()
    with monkeypatch.context() as patch:
        patch.setattr(calls, "_handlers", Interrupted(calls._handlers, after))
        with pytest.raises(KeyboardInterrupt), standing_in(bell, "ring", lambda: "ours"):
            pass
    assert bell.ring() == ["own"]
    with standing_in(bell, "ring", lambda: "next"):
        assert bell.ring() == "next"
    assert not vars(bell)
