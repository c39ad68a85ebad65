"""Objectives by name in TRL's trainers."""
