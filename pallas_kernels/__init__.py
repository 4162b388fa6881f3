"""Block-sparse attention kernels: jax alone, no patterns, no modalities, no models."""
