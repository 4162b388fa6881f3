"""Attention of one query token per prompt over a cache: api, xla, mosaic_gpu."""

from pallas_kernels.decode.api import decode_attention as decode_attention
