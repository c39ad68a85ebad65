"""Every touch of foreign code."""
