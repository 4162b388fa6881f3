"""Baselines of the results: dense attention, torch, transformers."""
