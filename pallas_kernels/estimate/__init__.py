"""What a few queries say of all keys: api, xla, mosaic_gpu."""
