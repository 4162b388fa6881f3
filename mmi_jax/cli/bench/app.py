"""`mmi bench`: the benchmarks put together; a new one is one file in `commands` and one line here.

JAX and torch share one GPU when peers are timed. Unless the environment says otherwise, JAX then takes memory as it
needs it (`XLA_PYTHON_CLIENT_PREALLOCATE=false`) and at most 70 % of the device (`XLA_PYTHON_CLIENT_MEM_FRACTION`), 92 %
without peers; torch has the rest. Arrays are freed between cases.
"""

import typer

from mmi_jax.cli.bench.commands.attention import attention
from mmi_jax.cli.bench.commands.batch import batch
from mmi_jax.cli.bench.commands.check import check
from mmi_jax.cli.bench.commands.decode import decode
from mmi_jax.cli.bench.commands.first_token import first_token
from mmi_jax.cli.bench.commands.plans import plans
from mmi_jax.cli.bench.commands.prefill import prefill
from mmi_jax.cli.bench.commands.soak import soak_command
from mmi_jax.cli.bench.commands.tune import tune_command
from mmi_jax.cli.bench.commands.vision import vision

app = typer.Typer(name="bench", help="Time kernels and whole prefills next to a baseline. Outputs are checked first.")
app.command()(attention)
app.command()(plans)
app.command()(check)
app.command("tune")(tune_command)
app.command()(decode)
app.command()(vision)
app.command()(prefill)
app.command()(batch)
app.command()(first_token)
app.command("soak")(soak_command)
