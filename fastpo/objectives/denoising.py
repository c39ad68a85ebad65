"""Denoising: diffusion and flow, squared errors in place of log-probabilities."""
