"""Prefill and decoding of a whole model."""
