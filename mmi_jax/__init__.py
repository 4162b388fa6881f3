"""Modality-aware sparse prefill (MMInference) in JAX: the public names. Modules of Flax are in `mmi_jax.flax`."""

from mmi_jax.engine.batching import prefill_many as prefill_many
from mmi_jax.engine.decoding.decode_loop import decode as decode
from mmi_jax.engine.decoding.decode_loop import decode_with_cache as decode_with_cache
from mmi_jax.engine.memory.memory_check import DoesNotFitError as DoesNotFitError
from mmi_jax.engine.prefill import PrefillResult as PrefillResult
from mmi_jax.engine.prefill import prefill as prefill
from mmi_jax.engine.settings.buckets import Buckets as Buckets
from mmi_jax.engine.settings.options import PrefillOptions as PrefillOptions
from mmi_jax.engine.warmup import prepare as prepare
from mmi_jax.layout import TokenLayout as TokenLayout
from mmi_jax.layout import concatenate as concatenate
from mmi_jax.layout import stack as stack
from mmi_jax.layout import text_tokens as text_tokens
from mmi_jax.layout import vision_tokens as vision_tokens
from mmi_jax.method.dispatch import sparse_attention as sparse_attention
from mmi_jax.method.patterns import AShape as AShape
from mmi_jax.method.patterns import BlockTopK as BlockTopK
from mmi_jax.method.patterns import Boundary2D as Boundary2D
from mmi_jax.method.patterns import Dense as Dense
from mmi_jax.method.patterns import Grid as Grid
from mmi_jax.method.patterns import Pattern as Pattern
from mmi_jax.method.patterns import QBoundary as QBoundary
from mmi_jax.method.patterns import SparseTransformerFixed as SparseTransformerFixed
from mmi_jax.method.patterns import SparseTransformerStrided as SparseTransformerStrided
from mmi_jax.method.patterns import SwinWindow as SwinWindow
from mmi_jax.method.patterns import TriShape as TriShape
from mmi_jax.method.patterns import VerticalSlash as VerticalSlash
from mmi_jax.method.permutation import Permutation as Permutation
from mmi_jax.method.plan import Plan as Plan
from mmi_jax.method.tables.pattern_table import PatternTable as PatternTable
from mmi_jax.method.tables.pattern_table import load_table as load_table
from mmi_jax.plots.mask_plot import plot_mask as plot_mask
from pallas_kernels.block_lists.block_sizes import Blocks as Blocks

__all__ = [
    "AShape",
    "BlockTopK",
    "Blocks",
    "Boundary2D",
    "Buckets",
    "Dense",
    "DoesNotFitError",
    "Grid",
    "Pattern",
    "PatternTable",
    "Permutation",
    "Plan",
    "PrefillOptions",
    "PrefillResult",
    "QBoundary",
    "SparseTransformerFixed",
    "SparseTransformerStrided",
    "SwinWindow",
    "TokenLayout",
    "TriShape",
    "VerticalSlash",
    "concatenate",
    "decode",
    "decode_with_cache",
    "load_table",
    "plot_mask",
    "prefill",
    "prefill_many",
    "prepare",
    "sparse_attention",
    "stack",
    "text_tokens",
    "vision_tokens",
]
