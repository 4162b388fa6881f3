"""Modality-aware sparse prefill (MMInference) in JAX."""
