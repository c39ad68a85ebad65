"""LLaMA-Factory imports it for sounds; texts need nothing of it."""
