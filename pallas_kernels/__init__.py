"""Block-sparse attention kernels: jax alone, no patterns, no modalities, no models."""

from pallas_kernels.attention.api import block_sparse_attention as block_sparse_attention
from pallas_kernels.attention.reference import coverage as coverage
from pallas_kernels.block_index import BlockIndex as BlockIndex
