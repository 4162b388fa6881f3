"""New tokens from the KV cache of a prefill."""
