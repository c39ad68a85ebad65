"""OpenRLHF imports it for its own strategy; in the place of that one process trains."""

__version__ = "0"
