"""The longest context and the largest batch that fit: a search over runs of the step."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch._subclasses import fake_tensor

from ..integrations.heads import linear_head
from .estimate import Estimate, Session
from .given import foreign, quiet
from .models import Fake, adapted, backbone, bytes_of, fake, made, positions, size_of
from .setting import MOST_TOKENS, Setting

# Contexts are whole blocks of attention kernels; so long, an error of 2 % is more than a block.
_GRANULE = {"context": 64, "batch": 1}
_CLOSE = 1.02
_LEAST = 3  # layers, and a repeat more
_TRIES = 4  # pairs of shallow models that are looked at
_TOKENS = 64  # of a run that only asks whether there is one
_MOST = {"context": 2**20, "batch": 2**14}


def check_runs(setting: Setting, config: Any, name: str) -> None:
    """ValueError unless transformers runs a few tokens through its first layers, and back where it
    is the model, and has a position for every one of the context, and fastpo knows its head.

    Apart from the step: what goes wrong in there is not the config's fault.
    """
    trained = name == "model"
    with torch.device("meta"):
        model = made(setting, cut(config, depths(setting, config, name)[0]), name)
        if setting.lora is not None and trained:
            model = adapted(model, setting.lora).get_base_model()
    most = positions(model)
    if most is not None and setting.context > most:
        wanted = f"at most {most}, the positions that the {name} has a table for"
        raise ValueError(f"context: expected {wanted}, got {setting.context}")
    with Fake(), torch.set_grad_enabled(trained):
        fake(model.train(trained), "cpu")
        ids = torch.zeros(1, min(setting.context, _TOKENS), dtype=torch.long)
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=setting.dtype == "bf16-mixed")
        expected = foreign(f"{name}: expected one whose layers run")
        with expected, mixed, quiet(fake_tensor.__name__):
            hidden = backbone(model)(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
            if hidden.requires_grad:  # not where only a head is adapted
                hidden.sum().backward()
        _check_head(model, hidden.shape[-1], name)


def _check_head(model: Any, width: int, name: str) -> None:
    try:
        found = linear_head(model).weight.shape[1]
    except RuntimeError as error:
        raise ValueError(f"{name}: {error}") from error
    if found != width:  # of Electra and RemBERT, with layers in between
        wanted = f"a head of hidden size {width}, that of its backbone"
        raise ValueError(f"{name}: expected {wanted}, got {found}")


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
            shallow = cut(teacher, depths(setting, teacher, "teacher")[0])
            self.rest = size_of(setting, teacher) - size_of(setting, shallow)
        kept = depths(setting, config)
        self.sessions = [Session(setting, cut(config, x), head, shallow) for x in kept]
        self._known: dict[tuple[int, int], Estimate] = {}  # context and batch
        first, last = len(kept[0]), len(kept[-1])
        beyond = config.get_text_config().num_hidden_layers - first
        self.beyond = beyond / (last - first) if beyond else 0.0

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
        """The step of the largest context or batch that fits; None if not even the least does.

        What is given may be larger than what is found, between two steps of the search.
        """
        most = self._most(what)
        granule = min(_GRANULE[what], most)

        def peak(count: int) -> int:
            return self.estimate(**{what: count * granule}).peak

        given = getattr(self.setting, what)
        count = _search(peak, memory, max(given // granule, 1), most // granule)
        if given > count * granule and self.estimate().peak <= memory:
            return self.estimate()
        return self.estimate(**{what: count * granule}) if count else None

    def _most(self, what: str) -> int:
        models = self.sessions[0].models
        known = [positions(x) for x in (models.base, models.copied) if x is not None]
        asked = end_of(self.setting, what)
        return min([asked, *(x for x in known if x is not None and what == "context")])


def end_of(setting: Setting, what: str) -> int:
    """Where a search ends: an answer there is "or more"."""
    each = setting.rows  # tokens of one more
    if what == "batch":
        each = setting.rows // setting.batch * setting.context
    return min(_MOST[what], MOST_TOKENS // each)


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


def depths(setting: Setting, config: Any, name: str = "model") -> list[list[int]]:
    """Layers of the models that are run: all of them where no two shallower ones tell the rest."""
    kinds, whole = _layers(setting, config, name)
    text = config.get_text_config()
    own = (x for x in vars(text).values() if _for_each(x, len(kinds)))
    told = [*zip(kinds, *(x for x in own if x != list(range(len(x)))), strict=True)]
    for pair in sorted(_repeats(told), key=_size)[:_TRIES]:
        # So few layers may make no model, or others than they are among the rest.
        with suppress(ValueError, NotImplementedError):
            (low, size), (high, other) = (_layers(setting, cut(config, x), name) for x in pair)
            if [low, high] == [[kinds[i] for i in kept] for kept in pair]:
                repeats = (len(kinds) - len(low)) // (len(high) - len(low))
                if size + (other - size) * repeats == whole:
                    return pair
    return [[*range(text.num_hidden_layers)]]


def _layers(setting: Setting, config: Any, name: str) -> tuple[list[Any], int]:
    """What each layer is, and the bytes of the model; no layers where the config counts others."""
    with torch.device("meta"):
        model = made(setting, config, name)
    count = config.get_text_config().num_hidden_layers
    stacks = [x for x in model.modules() if isinstance(x, nn.ModuleList) and len(x) == count]
    return [_kind(x) for x in max(stacks, key=bytes_of, default=())], bytes_of(model)


def _kind(layer: nn.Module) -> list[Any]:
    """Classes, shapes and switches; numbers would tell which layer it is."""
    return [
        (
            type(module),
            [(name, x.shape) for name, x in module.named_parameters(recurse=False)],
            {name: x for name, x in vars(module).items() if x is None or type(x) in (bool, str)},
        )
        for module in layer.modules()
    ]


def _repeats(kinds: list[Any]) -> Iterator[list[list[int]]]:
    """Layers of two models, a repeat apart, for every period and every stretch of repeats: both
    have what comes before it, what comes after, and what is left over of the last repeat."""
    count = len(kinds)
    for period in range(1, count):
        pairs = enumerate(zip(kinds, kinds[period:], strict=False))
        ends = [-1, *(i for i, (x, y) in pairs if x != y), count - period]
        for before, end in pairwise(ends):
            after = count - period - end
            least = max(_LEAST, before + 1 + max(period, 2) + after)
            first = least + (count - least) % period
            if first + period < count:
                sizes = first, first + period
                yield [[*range(x - after), *range(count - after, count)] for x in sizes]


def _size(pair: list[list[int]]) -> int:
    return len(pair[1])


def cut(config: Any, kept: Sequence[int]) -> Any:
    """The config of a model of some of its layers."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    whole = text.num_hidden_layers
    if len(kept) == whole:
        return made
    for name, value in vars(text).items():
        if _for_each(value, whole):
            setattr(text, name, [value[i] for i in kept])
    if getattr(text, "num_kv_shared_layers", None):  # the last ones
        text.num_kv_shared_layers = max(text.num_kv_shared_layers - whole + len(kept), 0)
    text.num_hidden_layers = len(kept)
    return made


def _for_each(x: Any, layers: int) -> bool:
    return isinstance(x, list) and len(x) == layers
