"""`fastpo.patch`: TRL's trainers on fastpo's head, and on fastpo's objectives by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from typing import Any

from ...ops.shards.gathered import HeadOptions
from ...ops.walks.checks import check_flag
from .. import readers, verl
from ..lazy import everywhere
from ..seams import imports
from ..seams.saying import inform, say_once
from ..seams.seam import Make, Seam, fitting, kept, replace, replace_when_imported, restore
from . import adapter, built, distillation, early, entropies, light, sampled, shared
from . import logits as trl_logits
from .head import COMPACT, GATHER, HEAD, Compact, FusedHead
from .objectives import by_name
from .objectives.setting import Objective, Setting


def patch(
    *,
    budget: int | None = None,
    backend: str | None = None,
    accumulate: bool = False,
    lazy: bool = False,
    shared_prompts: bool = False,
    padding_free: bool = False,
    whole_groups: bool = False,
    support: bool = False,
    objective: str | Objective | None = None,
    references: Mapping[str, Any] | None = None,
    reference_free: bool = False,
    score_prompts: bool = False,
    mixing: float | None = None,
    alternatives: int = 5,
    **hyperparameters: Any,
) -> None:
    """Puts `fastpo.linear_logps` under every TRL trainer of this process until `unpatch`.

    TRL before 1.13, or newer than any known and of other seams, is served by lazy logits
    (`fastpo.lazy_logits`) in every model, and the log says so. verl's fused heads, and what
    verl and OpenRLHF read of lazy logits, run on fastpo's head, too.

    Trainers keep their losses and metrics, in float32 to rounding. With `objective` or
    `shared_prompts` call it before they are built. `loss_type` of DPOConfig, KTOConfig and
    GRPOConfig also takes the keys of `fastpo.objectives`, with the hyperparameters that the config
    has where they were changed (`beta`, `label_smoothing`, `epsilon`), and the paper's values
    otherwise. TRL's own names run TRL's code. Before TRL 1.15 there are no objectives of fastpo's,
    neither by name nor by `objective`.

    budget, backend: as in `fastpo.linear_logps`.
    accumulate: as in `fastpo.attach`, for trainers that use TRL's fused head on one device with
        gradient accumulation.
    lazy: in every causal language model of transformers `model(...).logits` is a promise, as with
        `fastpo.lazy_logits`, whoever calls it; then TRL need not be there.
    shared_prompts: the backbone computes every distinct token of a batch once, and no padding
        (`fastpo.shared_prompts`). padding_free, in its place: no padding, but every row whole. How
        much was saved is in the trainers' log as "fastpo/tokens_saved".
    whole_groups: GRPOTrainer and RLOOTrainer shuffle prompts, each with all its completions, and
        not completions one by one, so that those in a batch have a prompt to share.
    support: GRPOTrainer and RLOOTrainer score old, reference and policy log-probabilities over the
        words that the sampler kept, where `top_k`, `top_p` or `min_p` left some out: those that a
        rollout function reports as "sampling_mask" (for each completion a list of word ids for each
        token), else what the policy keeps by these settings when its batch is generated. One more
        pass of the policy where a reference comes before it.
    objective: a key of `fastpo.objectives`, with `hyperparameters`, or a function of quantities
        (of `fastpo.objectives.compose`, for one), that DPOTrainer (families pairs and tokens),
        KTOTrainer (singles) or GRPOTrainer (policy_gradient) minimise instead of their own loss;
        other trainers keep theirs, and the log says so. What it needs beside two texts comes from
        dataset columns of the quantity's name: a number per row, or a list per row along the tokens
        of its completion. A column "third" or "unlabeled" holds a text for each row. With
        GRPOTrainer it comes from the rollouts: advantages, old and reference log-probabilities.
    references: {"prev": model, "history": [models]} beside the trainer's own reference.
    reference_free: log-ratios are log-probabilities; no reference model is loaded.
    score_prompts: prompt tokens count as completion tokens do.
    mixing: `mixed_*` quantities are those of softmax(mixing·policy + (1 - mixing)·reference).
        Any finite number: beyond 1 it leads away from the reference.
    alternatives: `rejected_alternative_token_logps` draws among that many best tokens, 1 or more.

    A second call replaces the first. Raises RuntimeError when TRL is missing or its seams have
    changed, and then changes nothing; ValueError for an unknown objective or option, and for an
    option that the objective has no quantity for.
    """
    _check_flags(
        lazy=lazy,
        shared_prompts=shared_prompts,
        padding_free=padding_free,
        whole_groups=whole_groups,
        support=support,
        reference_free=reference_free,
        score_prompts=score_prompts,
    )
    models = {} if references is None else references
    scoring = reference_free, score_prompts, mixing, alternatives
    setting = Setting(objective, hyperparameters, models, *scoring)
    by_name.check(setting)
    own = HeadOptions(budget=budget, backend=backend, accumulate=accumulate)
    sharing = True if shared_prompts else (False if padding_free else None)
    plain = HeadOptions(budget=budget, backend=backend)
    seams = _all(setting, own, sharing, whole_groups, support)
    dispensable = _without_seams(lazy) and objective is None and sharing is None and not support
    try:
        made, now = _checked(seams, setting, support)
    except RuntimeError as error:
        if not dispensable:
            raise
        if not lazy:
            say_once(_INSTEAD, str(error))
        made, now, lazy = {}, {}, True
    restore(*_ADDED)  # by a call before this one, perhaps
    later = {seam: make for seam, make in made.items() if seam not in now}
    if dispensable:
        everywhere.remove()  # what does not fit asks for it again
        replace_when_imported(later, partial(_or_lazily, plain))
    else:
        replace_when_imported(later)
        everywhere.remove()
    replace(now)
    if lazy:
        everywhere.install(plain)
    verl.install(plain)
    readers.install()
    inform("patch", _taken(made, lazy))


def _check_flags(**flags: bool) -> None:
    for name, flag in flags.items():
        check_flag(name, flag)
    if flags["shared_prompts"] and flags["padding_free"]:
        raise ValueError("padding_free: expected False with shared_prompts=True, got True")
    if flags["whole_groups"] and not flags["shared_prompts"]:
        raise ValueError("whole_groups: expected shared_prompts=True with it, got False")


def _taken(made: Mapping[Seam, Make], lazy: bool) -> str:
    """Which trainers run on fastpo, of those that are imported or will be."""
    modules = {seam.module.rpartition(".")[2] for seam in made if seam.package == "trl"}
    trainers = sorted(x.removesuffix("_trainer") for x in modules if x.endswith("_trainer"))
    found = ["logits of every model are lazy"] * lazy
    if trainers:
        found.insert(0, f"trainers of TRL {metadata.version('trl')}: {', '.join(trainers)}")
    return "; ".join(found)


def _checked(
    seams: dict[Seam, Make], setting: Setting, support: bool
) -> tuple[dict[Seam, Make], dict[Seam, Make]]:
    """Those of the installed version, and of them what is replaced at once; nothing is changed."""
    made = fitting(seams)
    if setting.objective is not None:
        fitting(by_name.replacements(setting))  # raises where TRL has no seams for one
    if support:
        fitting(sampled.replacements())  # and here
    now = {seam: make for seam, make in made.items() if seam.module == GATHER.module}
    for seam in (GATHER, *now):
        seam.read()
    return made, now


# What `fastpo run` patches when it is imported.
_RUN = ("trl", "transformers.modeling_utils", "verl", "openrlhf", "axolotl")
_INSTEAD = "lazy logits serve the trainers whose own seams do not fit"


def _or_lazily(options: HeadOptions, replacements: Mapping[Seam, Make]) -> None:
    """`replace`, of a TRL that nobody has seen yet."""
    try:
        replace(replacements)
    except RuntimeError as error:
        say_once(_INSTEAD, str(error))
        everywhere.install(options)


def _without_seams(lazy: bool) -> bool:
    """Will lazy logits do: for a TRL of other times, and where they were asked for without one?"""
    try:
        installed = metadata.version("trl")
    except metadata.PackageNotFoundError:
        return lazy
    return ".".join(installed.split(".")[:2]) not in GATHER.versions


def _all(
    setting: Setting, own: HeadOptions, sharing: bool | None, whole_groups: bool, support: bool
) -> dict[Seam, Make]:
    """What stands in, of every version: in TRL's utilities now, else when a script imports it."""
    made: dict[Seam, Make] = {
        HEAD: partial(FusedHead, own=own),
        COMPACT: Compact,
        **by_name.replacements(setting),
        **adapter.replacements(sharing),
        **light.replacements(),
        **entropies.replacements(),
        **trl_logits.replacements(),
        **distillation.replacements(own),
        **early.replacements(own),
        **early.heads(own),
        **shared.replacements(sharing, whole_groups),
        **built.replacements(by_name.taking(setting), sharing),
        **(sampled.replacements() if support else {}),
    }
    plain = HeadOptions(budget=own.budget, backend=own.backend)
    return trl_logits.with_options(made, plain, sharing)


_ADDED = (
    *shared.replacements(True, True),
    *built.replacements("DPOTrainer", True),
    *sampled.replacements(),
)
SEAMS = tuple(_all(Setting(), HeadOptions(), True, True, True))
DEFAULTS = _all(
    Setting(), HeadOptions(), None, False, False
)  # what a call without options stands in for


def unpatch() -> None:
    """Gives TRL its own objects back; nothing happens when it is not patched.

    A trainer that was built for one of fastpo's objectives keeps it.
    """
    for module in _RUN:
        imports.forget(module)
    restore(*SEAMS)
    everywhere.remove()
    verl.remove()
    readers.remove()


@contextmanager
def patched(**options: Any) -> Iterator[None]:
    """`patch(**options)` for the length of a block; afterwards TRL is what it was before."""
    with kept(*SEAMS, *verl.SEAMS, *readers.SEAMS), everywhere.kept():
        patch(**options)
        yield
