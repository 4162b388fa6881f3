"""The patterns: one file for each kind, frozen dataclasses with a single duty, `parts`; registered once, here.

To add one, write its file, import it here and add it to `PATTERNS`. JSON tables, the search, the gallery of pictures
and the tests read that tuple; the search tries the `search_candidates` of each.
"""

from mmi_jax.method.patterns.base import Pattern as Pattern
from mmi_jax.method.patterns.block_top_k import BlockTopK as BlockTopK
from mmi_jax.method.patterns.boundary import Boundary2D as Boundary2D
from mmi_jax.method.patterns.boundary import QBoundary as QBoundary
from mmi_jax.method.patterns.dense import Dense as Dense
from mmi_jax.method.patterns.grid import Grid as Grid
from mmi_jax.method.patterns.static import SparseTransformerFixed as SparseTransformerFixed
from mmi_jax.method.patterns.static import SparseTransformerStrided as SparseTransformerStrided
from mmi_jax.method.patterns.static import SwinWindow as SwinWindow
from mmi_jax.method.patterns.streaming import AShape as AShape
from mmi_jax.method.patterns.streaming import TriShape as TriShape
from mmi_jax.method.patterns.vertical_slash import VerticalSlash as VerticalSlash

PATTERNS: tuple[type[Pattern], ...] = (
    Dense,
    Grid,
    VerticalSlash,
    AShape,
    TriShape,
    SparseTransformerFixed,
    SparseTransformerStrided,
    SwinWindow,
    BlockTopK,
    QBoundary,
    Boundary2D,
)
"""Every pattern of the package, in the order in which commands list their families."""
