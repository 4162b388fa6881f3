"""Modality-aware sparse prefill (MMInference) in JAX."""

from mmi_jax.attention import sparse_attention as sparse_attention
from mmi_jax.layout import TokenLayout as TokenLayout
from mmi_jax.patterns import AShape as AShape
from mmi_jax.patterns import BlockTopK as BlockTopK
from mmi_jax.patterns import Boundary2D as Boundary2D
from mmi_jax.patterns import Dense as Dense
from mmi_jax.patterns import Grid as Grid
from mmi_jax.patterns import Pattern as Pattern
from mmi_jax.patterns import QBoundary as QBoundary
from mmi_jax.patterns import SparseTransformerFixed as SparseTransformerFixed
from mmi_jax.patterns import SparseTransformerStrided as SparseTransformerStrided
from mmi_jax.patterns import SwinWindow as SwinWindow
from mmi_jax.patterns import TriShape as TriShape
from mmi_jax.patterns import VerticalSlash as VerticalSlash
from mmi_jax.plan import Plan as Plan
