"""`mmi doctor --plan`: the memory plan of a prefill on a device, which need not be attached."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from mmi_jax.cli.gpu_memory import FRACTION_VARIABLE, JAX_DEFAULT, memory_fraction
from mmi_jax.cli.options import chosen_patterns
from mmi_jax.cli.protocols import ModelConfig
from mmi_jax.engine.memory.chips import CHIPS, GB, GIB
from mmi_jax.engine.memory.memory_check import DeviceMemory, check_fits, describe, memory_of
from mmi_jax.engine.memory.memory_plan import MemoryRequest, memory_request
from mmi_jax.engine.settings.options import PrefillOptions
from mmi_jax.engine.settings.request import request_for

GPUS = {"a100": 80 * GB, "h100": 85 * GB, "h200": 150 * GB}
"""Memory as the driver reports it: A100 80 GB, H100 80 GB (79.2 GiB), H200 (139.8 GiB)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `mmi doctor --plan`.

    Args:
      model: a preset or a checkpoint's directory.
      device: a name, a size such as 80GiB, or None for the attached device.
      table, pattern: as for `mmi prefill`.
    """

    model: str
    tokens: int
    batch: int
    device: str | None
    table: Path | None
    pattern: str | None
    chunk_tokens: int | None
    max_new_tokens: int

    def memory_request(self) -> MemoryRequest:
        """What is to be planned.

        Raises:
          ValueError: the model, the table or a size cannot be used.
        """
        from models import family_of

        patterns = chosen_patterns(self.table, self.pattern)
        if self.tokens < 1 or self.batch < 1:
            raise ValueError(f"--tokens and --batch must be at least 1, got {self.tokens} and {self.batch}")
        config = model_config(self.model)
        options = PrefillOptions(
            table=patterns,
            chunk_tokens=self.chunk_tokens,
            max_new_tokens=self.max_new_tokens,
            may_run_dense=False,
        )
        prefill = request_for(config, self.tokens, options, batch=self.batch)
        embed_bytes = vision_bytes(config, self.batch * self.tokens)
        return memory_request(prefill, family_of(config).abstract_model(config), embed_bytes=embed_bytes)


def vision_bytes(config: ModelConfig, num_tokens: int) -> int:
    """What the vision tower holds while it encodes a prompt of nothing but frames."""
    from models import family_of

    return family_of(config).vision_bytes(config, num_tokens, jnp.bfloat16)


def model_config(name: str) -> ModelConfig:
    """The sizes of a preset, or of a checkpoint's directory or name on the hub."""
    from models import open_checkpoint, presets

    known = presets()
    return known[name] if name in known else open_checkpoint(name).config


def memory_for(device: str | None) -> DeviceMemory:
    """What JAX may use of a device.

    Raises:
      ValueError: the device is unknown, or the attached one does not report its memory.
    """
    if device is None:
        memory = memory_of(jax.devices()[0])
        if memory is None:
            raise ValueError(f"{jax.devices()[0].device_kind} does not report its memory: expected --device, got none")
        return DeviceMemory(limit=memory.limit)
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)(GiB|GB)", device):
        return DeviceMemory(limit=round(float(size[1]) * (GIB if size[2] == "GiB" else GB)))
    if device in CHIPS:
        return DeviceMemory(limit=CHIPS[device].hbm_bytes)
    if device not in GPUS:
        raise ValueError(
            f"--device must be one of {', '.join([*GPUS, *CHIPS])}, or what JAX may use of it, as in 72GiB: "
            f"got {device!r}"
        )
    return DeviceMemory(limit=round(GPUS[device] * memory_fraction()))


def print_plan(options: PlanOptions, out: Console) -> None:
    """The buffers of the prefill, and that it fits.

    Raises:
      DoesNotFitError: it does not; the message says what would.
      ValueError: the request cannot be planned.
    """
    planned, memory = options.memory_request(), memory_for(options.device)
    plan, prefill = check_fits(planned, memory), planned.prefill
    table = Table("buffer", "shape", "size", "live", title_justify="left")
    for row in describe(plan):
        table.add_row(*row)
    out.print(table)
    out.print(
        f"{prefill.batch} x {prefill.num_tokens:,} tokens, padded to {prefill.lengths.padded_tokens:,}, need at most "
        f"{plan.peak / GIB:.1f} GiB (in {plan.peak_stage!s}) of {memory.limit / GIB:.1f} GiB: it fits",
        highlight=False,
        soft_wrap=True,
    )
    if options.device in GPUS:
        out.print(
            f"mmi takes {memory_fraction():.0%} of this GPU, JAX in a program of your own {JAX_DEFAULT:.0%}; "
            f"{FRACTION_VARIABLE} sets another fraction",
            style="dim",
            highlight=False,
            soft_wrap=True,
        )
