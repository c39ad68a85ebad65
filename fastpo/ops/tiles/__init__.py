"""Heads whose words are made tile by tile: quantised ones, and any that say how."""
