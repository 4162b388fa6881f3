"""Device memory of a prefill: planned by stage, and checked before anything runs."""
