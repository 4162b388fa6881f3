"""The attention mass of a few queries by key and by distance: api, xla, mosaic_gpu."""
