"""TRL's trainers on fastpo's head; `fastpo.patch` and its companions."""

from .patch import patch, patched, unpatch

__all__ = ["patch", "patched", "unpatch"]
