"""PrefillRequest: what a prefill is to run, decided from lengths and options before anything touches the device."""

import dataclasses

from mmi_jax.engine.programs.layer_program import Program
from mmi_jax.engine.protocols import ModelConfig, VisionLanguageModel
from mmi_jax.engine.settings.buckets import Buckets
from mmi_jax.engine.settings.options import PrefillOptions, whole_number
from mmi_jax.engine.settings.padded_lengths import NO_CACHE, PaddedLengths, PriorCache, padded_lengths
from mmi_jax.method.patterns import Dense
from mmi_jax.method.tables.cost_model import costs_of_device, faster_patterns
from mmi_jax.method.tables.pattern_table import PatternTable, as_table, uniform_table
from mmi_jax.sharding import Shards, shards_of
from pallas_kernels.block_lists.block_sizes import Blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillRequest:
    """Sizes and settings of one prefill.

    Args:
      config: the model's sizes.
      options: as they were given.
      table: the patterns that run: `options.table`, some heads of which may have become dense.
      batch: prompts that run together.
      num_tokens: of the longest.
      prior: the cache that is continued.
    """

    config: ModelConfig
    options: PrefillOptions
    table: PatternTable
    batch: int
    num_tokens: int
    prior: PriorCache

    @property
    def shards(self) -> Shards:
        """Its split over the mesh."""
        return shards_of(self.options.mesh, num_kv_heads=self.config.num_kv_heads)

    @property
    def buckets(self) -> Buckets:
        """Padded lengths that prompts may have."""
        return self.options.buckets_on(self.shards)

    @property
    def lengths(self) -> PaddedLengths:
        """Padded lengths of this prefill; raises ValueError where the sizes do not fit each other."""
        return padded_lengths(self.num_tokens, self.options, self.shards, self.prior)

    def program(self, model: VisionLanguageModel, *, position_is_index: bool) -> Program:
        """The program of its chunks; `position_is_index` as `position_equals_index` says of the padded prompt."""
        from flax import nnx  # here, so that attention and its benchmarks need no flax

        mesh = self.options.mesh
        return Program(
            graphdef=nnx.split(model)[0],
            layer_graphdef=nnx.split(model.layers)[0],
            layers=self.table.layers,
            blocks=self.options.block_sizes,
            implementation=self.options.implementation,
            measures_recall=self.options.measures_recall,
            position_is_index=position_is_index
            and self.lengths.is_whole
            and mesh is None
            and _has_dense_layer(self.table),
            mesh=mesh,
        )


def request_for(
    config: ModelConfig,
    num_tokens: int,
    options: PrefillOptions,
    *,
    batch: int = 1,
    prior: PriorCache = NO_CACHE,
) -> PrefillRequest:
    """The request of a prefill whose longest prompt has `num_tokens`.

    Raises:
      ValueError: the prompt is too long, the table is for another model, the sizes do not fit each other, or are no
        whole numbers.
    """
    num_tokens = whole_number("num_tokens", num_tokens)
    if (batch := whole_number("batch", batch)) < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    table = as_table(options.table, num_layers=config.num_layers, num_heads=config.num_heads)
    request = PrefillRequest(
        config=config, options=options, table=table, batch=batch, num_tokens=num_tokens, prior=prior
    )
    lengths = request.lengths  # checked here, whether or not the table may change
    if options.may_run_dense:
        request = dataclasses.replace(request, table=_faster(table, lengths, options.block_sizes))
    return request


def _faster(table: PatternTable, lengths: PaddedLengths, blocks: Blocks) -> PatternTable:
    """The table with dense heads where the device's cost model finds them faster."""
    costs = costs_of_device()
    if not lengths.is_whole:
        keys = lengths.prior_tokens + lengths.padded_tokens
        is_dense = costs is not None and costs.runs_dense(table.num_heads, lengths.chunk_tokens, keys)
        return uniform_table(Dense(), num_layers=table.num_layers, num_heads=table.num_heads) if is_dense else table
    num_tokens = lengths.padded_tokens
    layers = tuple(faster_patterns(row, num_tokens=num_tokens, blocks=blocks, costs=costs) for row in table.layers)
    return dataclasses.replace(table, layers=layers)


def _has_dense_layer(table: PatternTable) -> bool:
    """Whether a layer may run without a plan; where none may, all chunks are one program, the first too."""
    return any(set(row) == {Dense()} for row in table.layers)
