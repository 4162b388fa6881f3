"""A few rows times one layer of stacked weights: api, xla, mosaic_gpu."""

from pallas_kernels.layer_matmul.api import layer_matmul as layer_matmul
