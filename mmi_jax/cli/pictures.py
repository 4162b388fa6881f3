"""Pictures of a prefill: which files, of which heads."""

import os
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from mmi_jax import Blocks, plots
from mmi_jax.report import PrefillReport
from models.prompt import Prompt


def write_pictures(directory: Path, model, prompt: Prompt, report: PrefillReport, blocks: Blocks) -> tuple[Path, ...]:
    """Writes the patterns by layer and head, and the density by layer.

    Returns:
      The files written.
    """
    figures = {"patterns": plots.plot_patterns(report.table), "density": plots.plot_density(report)}
    directory.mkdir(parents=True, exist_ok=True)
    return tuple(_write(directory / f"{name}.png", figure) for name, figure in figures.items())


def _write(path: Path, figure: Figure) -> Path:
    """Writes a picture through a temporary file: a failed run leaves no half-written one."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        figure.savefig(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
