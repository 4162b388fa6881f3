"""Options of `mmi aot`, checked before the compiler and the models' packages are needed."""

import dataclasses
from typing import Any

from mmi_jax.cli.protocols import ModelConfig
from mmi_jax.engine.memory.chips import chip_of
from mmi_jax.method.patterns import Dense
from mmi_jax.method.tables.pattern_json import parse
from mmi_jax.method.tables.pattern_table import PatternTable, load_table, uniform_table
from pallas_kernels.block_lists.block_sizes import Blocks

LARGEST_TOKENS = 2**30
"""Positions are int32, and a prompt of almost 2**31 tokens is padded to a bucket of 2**31."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AotOptions:
    """Options of `mmi aot`.

    Args:
      preset: a size of `models.presets`.
      topology: of TPUs, such as v5e:4x4.
      tokens: of the prompt; with `dump`, the padded length itself.
      table, pattern: as for `mmi prefill`; dense attention without both.
      layers: to compile, from the first on; all when None.
      block_q: queries of a tile.
      density: fraction of the causal tiles that dynamic patterns visit, for the lower bound.
      measures_recall: as in `prefill`.
      longest: search the longest prompt up to `tokens`.
      dump: where the compiler writes its schedules, which makes this the kernel's run; None for the whole prefill's.
    """

    preset: str
    topology: str
    tokens: int
    table: str | None
    pattern: str | None
    layers: int | None
    block_q: int
    density: float
    measures_recall: bool
    longest: bool
    dump: str | None = None

    def config(self, *, layers: int | None = None) -> ModelConfig:
        """The preset's sizes, with `layers` layers, all when None.

        Raises:
          ValueError: an unknown preset, or more layers than it has.
        """
        from models import presets

        known = presets()
        if self.preset not in known:
            raise ValueError(f"--preset must be one of {', '.join(known)}, got {self.preset!r}")
        config = known[self.preset]
        num_layers: int = config.num_layers if layers is None else layers
        if not 0 < num_layers <= config.num_layers:
            raise ValueError(f"--layers must be 1 to {config.num_layers}, those of {self.preset}: got {num_layers}")
        return dataclasses.replace(config, num_layers=num_layers)

    def patterns(self) -> PatternTable:
        """The table, for the layers that are compiled.

        Raises:
          ValueError: it cannot be read, or is for another model.
        """
        config, whole = self.config(layers=self.layers), self.config()
        if self.table is None:
            pattern = Dense() if self.pattern is None else parse(self.pattern)
            return uniform_table(pattern, num_layers=config.num_layers, num_heads=config.num_heads)
        table = load_table(self.table)
        table.check_fits(num_layers=whole.num_layers, num_heads=whole.num_heads)
        return dataclasses.replace(table, layers=table.layers[: config.num_layers])

    def check(self) -> None:
        """Raises ValueError for what can be refused without the compiler."""
        chip_of(self.topology)
        self.patterns()
        if not 0 < self.tokens <= LARGEST_TOKENS:
            raise ValueError(f"--tokens must be 1 to {LARGEST_TOKENS}, as positions are int32: got {self.tokens}")
        if not 0 < self.density <= 1:
            raise ValueError(f"--density must be above 0 and at most 1, got {self.density}")
        if self.block_q < 128 or self.block_q % 128:
            raise ValueError(f"--block-q must be a multiple of 128, got {self.block_q}")

    def target(self) -> Any:
        """The model in shapes, on a mesh over all devices of the topology: an `compile_ahead.Target`."""
        from mmi_jax.aot import compile_ahead
        from mmi_jax.sharding import make_mesh
        from models import family_of

        config = self.config(layers=self.layers)
        mesh = make_mesh(compile_ahead.devices_of(self.topology), num_kv_heads=config.num_kv_heads)
        return compile_ahead.Target(
            model=family_of(config).abstract_model(config),
            table=self.patterns(),
            mesh=mesh,
            blocks=Blocks(q=self.block_q),
            measures_recall=self.measures_recall,
        )
