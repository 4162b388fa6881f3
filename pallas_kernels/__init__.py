"""Block-sparse attention kernels: jax alone, no patterns, no modalities, no models.

A `BlockIndex` says which kv blocks each q block visits; `block_sparse_attention` runs it by the best backend of the
device, and `coverage` says which pairs it attends. `column_mass` and `line_mass` estimate where attention goes from a
few queries, `decode_attention` and `layer_matmul` serve one new token of each prompt.
"""

from pallas_kernels.attention.api import block_sparse_attention as block_sparse_attention
from pallas_kernels.attention.reference import coverage as coverage
from pallas_kernels.block_index import NO_LIMIT as NO_LIMIT
from pallas_kernels.block_index import BlockIndex as BlockIndex
from pallas_kernels.block_index import index_from_block_mask as index_from_block_mask
from pallas_kernels.decode.api import decode_attention as decode_attention
from pallas_kernels.estimate.api import column_mass as column_mass
from pallas_kernels.estimate.api import line_mass as line_mass
from pallas_kernels.layer_matmul.api import layer_matmul as layer_matmul
from pallas_kernels.notation import PAD_KV_POS as PAD_KV_POS
from pallas_kernels.notation import PAD_Q_POS as PAD_Q_POS

__all__ = [
    "NO_LIMIT",
    "PAD_KV_POS",
    "PAD_Q_POS",
    "BlockIndex",
    "block_sparse_attention",
    "column_mass",
    "coverage",
    "decode_attention",
    "index_from_block_mask",
    "layer_matmul",
    "line_mass",
]
