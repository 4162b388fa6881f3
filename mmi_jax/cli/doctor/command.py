"""`mmi doctor`: versions, devices, backends and why one cannot run here, compiled programs; or a prefill's memory."""

import platform
from importlib import metadata
from typing import Annotated, get_args

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.table import Table

from mmi_jax.cli import compile_cache, console
from mmi_jax.cli.doctor.memory_plan import PlanOptions, print_plan
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.options import CacheDirOption, DebugOption, PatternOption, PatternTableOption
from pallas_kernels import block_sparse_attention
from pallas_kernels.attention.api import Implementation
from pallas_kernels.block_index import index_from_block_mask

PACKAGES = ("mmi-jax", "jax", "jaxlib", "flax", "numpy")
PLUGINS = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
BLOCK, HEAD_DIM = 128, 64


def doctor(
    plan: Annotated[
        str | None,
        typer.Option(help="Print the memory plan of a prefill of a model: 3b, 7b, ... or a directory."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Memory plan: tokens of the prompt.")] = 2**17,
    batch: Annotated[int, typer.Option(help="Memory plan: prompts per batch.")] = 1,
    device: Annotated[
        str | None,
        typer.Option(help="Memory plan: h100, h200, v5e, ... or a size as in 72GiB. Default: the attached device."),
    ] = None,
    table: PatternTableOption = None,
    pattern: PatternOption = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Memory plan: tokens per chunk.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Memory plan: tokens to generate.")] = 0,
    cache_dir: CacheDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Print versions, devices, backends and the compilation cache. Of a backend that cannot run it says why.

    With --plan, print the memory plan of a prefill instead: live buffers by stage, or changes that fit if it does not.
    """
    with one_line_errors(shows_traceback=debug):
        out = console.stdout_console()
        if plan is not None:
            options = PlanOptions(
                model=plan,
                tokens=tokens,
                batch=batch,
                device=device,
                table=table,
                pattern=pattern,
                chunk_tokens=chunk_tokens,
                max_new_tokens=max_new_tokens,
            )
            print_plan(options, out)
            return
        out.print(versions_table())
        out.print(_rows("devices", devices()))
        out.print(_rows("attention backend", [(name, backend_status(name)) for name in get_args(Implementation)]))
        directory = cache_dir or compile_cache.default_cache_directory()
        contents = compile_cache.cache_contents(directory)
        out.print(f"compiled programs: {contents.num_programs}, {contents.num_bytes / 2**20:.1f} MiB", highlight=False)
        out.print(f"in {directory}", markup=False, soft_wrap=True)


def versions_table() -> Table:
    """Python, our packages, and the installed accelerator plugins."""
    installed = [(name, _version(name)) for name in (*PACKAGES, *PLUGINS)]
    rows = [(name, version or "not installed") for name, version in installed if version or name in PACKAGES]
    return _rows("versions", [("python", platform.python_version()), *rows])


def devices() -> list[tuple[str, str]]:
    """Name and kind of each device, or why there is none."""
    try:
        return [(str(device), device.device_kind) for device in jax.devices()]
    except RuntimeError as error:
        return [("none", str(error))]


def backend_status(name: Implementation) -> str:
    """`can run`, or the reason why a backend refuses one head of 128 bfloat16 tokens on the default device."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, BLOCK, HEAD_DIM)), jnp.bfloat16) for _ in range(3))
    one_tile = np.ones((1, 1, 1), bool)
    index = index_from_block_mask(one_tile, ~one_tile, block_q=BLOCK, block_kv=BLOCK)
    pos = jnp.arange(BLOCK, dtype=jnp.int32)[None]
    try:
        out, _ = block_sparse_attention(q, k, v, index, q_pos=pos, kv_pos=pos, implementation=name)
        jax.block_until_ready(out)
    except (NotImplementedError, ImportError, RuntimeError) as refusal:
        return f"cannot run here: {refusal}"
    return "can run"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _rows(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title, "")
    for row in rows:
        table.add_row(*row)
    return table
