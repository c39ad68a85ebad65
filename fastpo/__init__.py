"""fastpo: preference optimisation without logits."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import objectives, quantities
from .ops.linear_divergence import DivergenceStats, linear_divergence, linear_topk_divergence
from .ops.linear_logps import TokenStats, linear_logps
from .ops.linear_topk import TokenSample, TopK, linear_topk, sample_topk
from .ops.mixed_linear_logps import mixed_linear_logps
from .ops.multi_head import multi_head_logps
from .planner import Plan, plan

if TYPE_CHECKING:
    from .integrations.attach import attach
    from .integrations.sharing.backbone import shared_prompts
    from .integrations.trl.objectives.groups import GroupTrainer
    from .integrations.trl.patch import patch, patched, unpatch
    from .ops.vocab_parallel_logps import vocab_parallel_logps

__version__ = "0.1.0"

__all__ = [
    "DivergenceStats",
    "GroupTrainer",
    "Plan",
    "TokenSample",
    "TokenStats",
    "TopK",
    "attach",
    "linear_divergence",
    "linear_logps",
    "linear_topk",
    "linear_topk_divergence",
    "mixed_linear_logps",
    "multi_head_logps",
    "objectives",
    "patch",
    "patched",
    "plan",
    "quantities",
    "sample_topk",
    "shared_prompts",
    "unpatch",
    "vocab_parallel_logps",
]

# Read when asked for: `import fastpo` imports neither transformers, TRL nor torch.distributed.
_LAZY = {
    "GroupTrainer": "fastpo.integrations.trl.objectives.groups",
    "attach": "fastpo.integrations.attach",
    "patch": "fastpo.integrations.trl.patch",
    "patched": "fastpo.integrations.trl.patch",
    "shared_prompts": "fastpo.integrations.sharing.backbone",
    "unpatch": "fastpo.integrations.trl.patch",
    "vocab_parallel_logps": "fastpo.ops.vocab_parallel_logps",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
