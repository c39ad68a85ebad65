"""fastpo: preference optimisation without logits."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import curves, objectives, quantities, reference, testing
    from .integrations.attach import attach
    from .integrations.lazy.models import lazy_logits
    from .integrations.sharing.backbone import shared_prompts
    from .integrations.trl.objectives.groups import GroupTrainer
    from .integrations.trl.patch import patch, patched, unpatch
    from .mismatch import Mismatch, diagnose
    from .ops.linear_divergence import DivergenceStats, linear_divergence
    from .ops.linear_logps import linear_logps
    from .ops.linear_topk import TokenSample, TopK, linear_topk, sample_topk
    from .ops.linear_topk_divergence import linear_topk_divergence
    from .ops.mixed_linear_logps import mixed_linear_logps
    from .ops.multi_head import multi_head_logps
    from .ops.multi_token import multi_token_logps
    from .ops.stats import TokenStats
    from .ops.support.words import Support
    from .ops.tiles.formats import NVFP4, BlockScaled, PackedIntegers
    from .ops.tiles.known import tile_source
    from .ops.tiles.tiled import TileSource
    from .ops.vocab_parallel_divergence import vocab_parallel_divergence
    from .ops.vocab_parallel_logps import vocab_parallel_logps
    from .ops.vocab_parallel_mixed_logps import vocab_parallel_mixed_logps
    from .ops.vocab_parallel_topk import vocab_parallel_topk
    from .planner import Plan, plan
    from .planning.plan import StepPlan, plan_step

__version__ = "0.1.0"

__all__ = [
    "NVFP4",
    "BlockScaled",
    "DivergenceStats",
    "GroupTrainer",
    "Mismatch",
    "PackedIntegers",
    "Plan",
    "StepPlan",
    "Support",
    "TileSource",
    "TokenSample",
    "TokenStats",
    "TopK",
    "attach",
    "curves",
    "diagnose",
    "lazy_logits",
    "linear_divergence",
    "linear_logps",
    "linear_topk",
    "linear_topk_divergence",
    "mixed_linear_logps",
    "multi_head_logps",
    "multi_token_logps",
    "objectives",
    "patch",
    "patched",
    "plan",
    "plan_step",
    "quantities",
    "reference",
    "sample_topk",
    "shared_prompts",
    "testing",
    "tile_source",
    "unpatch",
    "vocab_parallel_divergence",
    "vocab_parallel_logps",
    "vocab_parallel_mixed_logps",
    "vocab_parallel_topk",
]

# Read when asked for: `import fastpo` imports none of torch, transformers and TRL, so that
# `fastpo run` starts as Python does, before a script has set what their imports read.
_HOMES = {
    "fastpo.integrations.attach": ("attach",),
    "fastpo.integrations.lazy.models": ("lazy_logits",),
    "fastpo.integrations.sharing.backbone": ("shared_prompts",),
    "fastpo.integrations.trl.objectives.groups": ("GroupTrainer",),
    "fastpo.integrations.trl.patch": ("patch", "patched", "unpatch"),
    "fastpo.mismatch": ("Mismatch", "diagnose"),
    "fastpo.ops.linear_divergence": ("DivergenceStats", "linear_divergence"),
    "fastpo.ops.linear_topk_divergence": ("linear_topk_divergence",),
    "fastpo.ops.linear_logps": ("linear_logps",),
    "fastpo.ops.linear_topk": ("TokenSample", "TopK", "linear_topk", "sample_topk"),
    "fastpo.ops.mixed_linear_logps": ("mixed_linear_logps",),
    "fastpo.ops.multi_head": ("multi_head_logps",),
    "fastpo.ops.multi_token": ("multi_token_logps",),
    "fastpo.ops.tiles.formats": ("NVFP4", "BlockScaled", "PackedIntegers"),
    "fastpo.ops.tiles.known": ("tile_source",),
    "fastpo.ops.tiles.tiled": ("TileSource",),
    "fastpo.ops.vocab_parallel_divergence": ("vocab_parallel_divergence",),
    "fastpo.ops.vocab_parallel_logps": ("vocab_parallel_logps",),
    "fastpo.ops.vocab_parallel_mixed_logps": ("vocab_parallel_mixed_logps",),
    "fastpo.ops.vocab_parallel_topk": ("vocab_parallel_topk",),
    "fastpo.ops.stats": ("TokenStats",),
    "fastpo.ops.support.words": ("Support",),
    "fastpo.planner": ("Plan", "plan"),
    "fastpo.planning.plan": ("StepPlan", "plan_step"),
}
_MODULES = ("curves", "objectives", "ops", "planner", "quantities", "reference", "testing")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
