"""fastpo: preference optimisation without logits."""

from .ops.linear_logps import TokenStats, linear_logps
from .planner import Plan, plan

__version__ = "0.1.0"

__all__ = ["Plan", "TokenStats", "linear_logps", "plan"]
