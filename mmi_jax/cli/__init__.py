"""`mmi`, the command-line program: the one place that may join kernels, method and models."""

from mmi_jax.cli.app import app as app
from mmi_jax.cli.app import main as main
