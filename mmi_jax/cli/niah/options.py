"""Options of `mmi niah`."""

import dataclasses
from pathlib import Path

import numpy as np

from mmi_jax import PatternTable
from mmi_jax.cli.samples import DEFAULT_TASKS, task_name
from mmi_jax.method.tables.pattern_table import load_table
from mmi_jax.search.baselines.families import FAMILIES
from mmi_jax.search.costs import cost_models

DENSE = "dense"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NiahOptions:
    """A grid of tasks, lengths and depths, and the methods that are tried on it.

    Args:
      tasks: names as `models.tasks.TASKS` has them.
      tokens: lengths of the prompts, at most.
      num_depths: depths of the needle, evenly from 0 to 1.
      samples: of each cell.
      methods: "dense", names of `FAMILIES`, and names of `tables`.
      tables: by the name of the method.
      matched_method: the method whose cost the baselines are sized to; None gives them the paper's sizes.
      cost_tolerance: relative difference from that cost above which a baseline is marked.
      batch: prompts of one prefill.
      parallel_compilations: methods compiled in parallel, each of which takes the memory of a prefill.
    """

    model: str
    tasks: tuple[str, ...]
    haystack: str
    tokens: tuple[int, ...]
    num_depths: int
    samples: int
    methods: tuple[str, ...]
    tables: dict[str, PatternTable]
    matched_method: str | None
    cost_tolerance: float
    output: Path
    dtype: str
    cost_model: str | None
    batch: int
    parallel_compilations: int
    seed: int

    def __post_init__(self):
        """Raises ValueError for unknown names and numbers out of range, before anything is loaded."""
        known = {DENSE, *FAMILIES, *self.tables}
        if unknown := [name for name in self.methods if name not in known]:
            raise ValueError(
                f"unknown method {unknown[0]!r}: expected one of {', '.join((DENSE, *FAMILIES))}, or NAME=TABLE.json"
            )
        if len(set(self.methods)) != len(self.methods) or not self.methods:
            raise ValueError(f"a method must be named once, and at least one: got {', '.join(self.methods)}")
        if self.matched_method is not None and self.matched_method not in (DENSE, *self.tables):
            raise ValueError(f"--match-cost must name a method with a table, got {self.matched_method!r}")
        if self.cost_model is not None and self.cost_model not in cost_models():
            raise ValueError(f"--cost-model must be one of {', '.join(cost_models())}, got {self.cost_model!r}")
        if (
            not self.tokens
            or min(*self.tokens, self.samples, self.num_depths, self.batch, self.parallel_compilations) < 1
        ):
            raise ValueError(
                f"tokens, samples, depths, batch and parallel compilations must be at least 1: got {self.tokens}, "
                f"{self.samples}, {self.num_depths}, {self.batch}, {self.parallel_compilations}"
            )
        if not 0 <= self.cost_tolerance < float("inf"):
            raise ValueError(f"--cost-tolerance must be a fraction of 0 or more, got {self.cost_tolerance}")
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"--output must name a directory, got the file {str(self.output)!r}")

    @property
    def baselines(self) -> tuple[str, ...]:
        """Methods of a family, whose sizes are to be chosen."""
        return tuple(name for name in self.methods if name in FAMILIES and name not in self.tables)

    @property
    def fixed_methods(self) -> tuple[str, ...]:
        """The other methods: dense attention and tables."""
        return tuple(name for name in self.methods if name not in self.baselines)

    @property
    def depths(self) -> tuple[float, ...]:
        """Depths of the needle: the middle alone where there is one, else from first to last."""
        return (0.5,) if self.num_depths == 1 else tuple(np.linspace(0, 1, self.num_depths).tolist())

    def seeds(self, depth_number: int) -> range:
        """Of the samples at one depth, the same for every task, length and method."""
        first = self.seed + depth_number * self.samples
        return range(first, first + self.samples)


def read_methods(names: list[str], table: Path | None) -> tuple[tuple[str, ...], dict[str, PatternTable]]:
    """Names of methods and their tables: `name`, `name=table.json`, and `--table` as the method "ours".

    Raises:
      ValueError: a table cannot be read.
    """
    tables = {} if table is None else {"ours": load_table(table)}
    methods = []
    for method in names:
        name, has_table, path = method.partition("=")
        if has_table:
            tables[name] = load_table(path)
        methods.append(name)
    return tuple(methods or (DENSE, *tables, *FAMILIES)), tables


def read_tasks(names: list[str]) -> tuple[str, ...]:
    """The tasks' full names; those for any model when none is given."""
    return tuple(map(task_name, names or DEFAULT_TASKS))
