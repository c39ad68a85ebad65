"""The longest context and the largest batch that fit: a search over runs of the step."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .estimate import Estimate, Session
from .given import foreign, quiet
from .models import fake, made, size_of
from .setting import Setting

# Contexts are whole blocks of attention kernels; so long, an error of 2 % is more than a block.
_GRANULE = {"context": 64, "batch": 1}
_CLOSE = 1.02
_LEAST = 3  # layers, and a repeat more
MOST = {"context": 2**20, "batch": 2**14}


def check_runs(setting: Setting, config: Any, name: str) -> None:
    """ValueError unless transformers runs two tokens through its first layers.

    Apart from the step: what goes wrong in there is not the config's fault.
    """
    with torch.device("meta"):
        model = made(setting, _cut(config, _depths(config)[0]), name)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake(model, "cpu")
        ids = torch.zeros(1, 2, dtype=torch.long)
        with foreign(f"{name}: expected one whose layers run"), quiet(FakeTensorMode.__module__):
            model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))


class Depths:
    """Steps of any size from runs of two shallow models: layers are alike.

    Each phase grows by as much with every layer; which one is the largest may change.
    """

    def __init__(self, setting: Setting, config: Any, head: str, teacher: Any = None) -> None:
        self.setting, self.head = setting, head
        shallow = None
        self.rest = 0  # of the teacher, whose layers leave nothing but their weights
        if setting.distils:
            teacher = config if teacher is None else teacher
            shallow = _cut(teacher, _depths(teacher)[0])
            self.rest = size_of(setting, teacher) - size_of(setting, shallow)
        depths = _depths(config)
        self.sessions = [Session(setting, _cut(config, n), head, shallow) for n in depths]
        self._known: dict[tuple[int, int], Estimate] = {}  # context and batch
        beyond = config.get_text_config().num_hidden_layers - depths[0]
        self.beyond = beyond / (depths[-1] - depths[0]) if len(depths) > 1 else 0.0

    def estimate(self, **sizes: int) -> Estimate:
        """sizes: another `context` or `batch`."""
        setting = replace(self.setting, **sizes)  # type: ignore[arg-type]
        key = setting.context, setting.batch
        if key not in self._known:
            self._known[key] = self._run(setting)
        return self._known[key]

    def _run(self, setting: Setting) -> Estimate:
        runs = [session.phases(setting) for session in self.sessions]
        first, last = runs[0], runs[-1]
        phases = {
            name: Counter({x: self._further(held[x], last[name][x]) for x in {*held, *last[name]}})
            for name, held in first.items()
        }
        for held in phases.values():
            held["reference"] += self.rest
        trained = self._further(self.sessions[0].trained, self.sessions[-1].trained)
        return Estimate.of(self.head, setting, phases, trained, self.sessions[0].gathered)

    def _further(self, first: int, last: int) -> int:
        return round(first + (last - first) * self.beyond)

    def largest(self, what: str, memory: int) -> Estimate | None:
        """The step of the largest context or batch that fits; None if not even the least does."""
        granule = _GRANULE[what]

        def peak(count: int) -> int:
            return self.estimate(**{what: count * granule}).peak

        start = max(getattr(self.setting, what) // granule, 1)
        count = _search(peak, memory, start, MOST[what] // granule)
        return self.estimate(**{what: count * granule}) if count else None


def _search(peak: Callable[[int], int], limit: int, start: int, most: int) -> int:
    """The largest count whose peak is within the limit, to 2 %; 0 if there is none."""
    fits, over = [(0, 0)], (0, 0)  # counts and peaks, the last ones known
    guess = start
    while not over[0] or over[0] > max(fits[-1][0] + 1, fits[-1][0] * _CLOSE):
        found = peak(guess)
        if found > limit:
            over = guess, found
        elif guess == most:
            return most
        else:
            fits.append((guess, found))
        guess = _guess(fits, over, limit, most)
    return fits[-1][0]


def _guess(fits: list[tuple[int, int]], over: tuple[int, int], limit: int, most: int) -> int:
    """On a straight line through two of them."""
    low, at_low = fits[-1]
    if not low:
        return max(over[0] // 8, 1)
    if not over[0] and len(fits) < 3:  # the first one fits nothing, and costs nothing
        return min(2 * low, most)
    other, at_other = over if over[0] else fits[-2]
    slope = max((at_other - at_low) / (other - low), 1)
    further = int((limit - at_low) / slope)
    if not over[0]:  # where another phase was the largest, the line rises too little
        return min(low + max(further, 1) + low // 50, 8 * low, most)
    # Memory bends upwards: a straight line to what is over aims low, never far.
    return min(max(low + further, low + 1 + (over[0] - low) // 8), over[0] - 1)


def _depths(config: Any) -> list[int]:
    """Layers of the models that are run: all of them where there are few."""
    layers, period = _layers(config)
    # The first few may differ (dense ones before experts); what is left over is in both.
    first = layers % period + -(-(_LEAST - layers % period) // period) * period
    return [first, first + period] if first + period < layers else [layers]


def _layers(config: Any) -> tuple[int, int]:
    """How many, and after how many they repeat."""
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [])
    count = int(text.num_hidden_layers)
    for period in range(1, count + 1):
        if kinds[period:] == kinds[: len(kinds) - period]:
            return count, period
    return count, count


def _cut(config: Any, layers: int) -> Any:
    made = copy.deepcopy(config)
    text = made.get_text_config()
    whole = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return made
