"""Whole DPO steps, with and without fastpo."""
