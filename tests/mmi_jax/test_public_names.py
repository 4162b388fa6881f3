"""The public names: what is exported, what the reference documents, and what `import mmi_jax` leaves alone."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import mmi_jax
from mmi_jax.method.patterns import PATTERNS

ROOT = Path(__file__).parents[2]


def test_all_is_what_can_be_imported():
    public = {n for n, value in vars(mmi_jax).items() if not n.startswith("_") and not inspect.ismodule(value)}
    assert set(mmi_jax.__all__) == public and len(set(mmi_jax.__all__)) == len(mmi_jax.__all__)


def test_all_is_what_the_reference_documents():
    pages = "\n".join(page.read_text() for page in sorted((ROOT / "docs/api").glob("*.md")))
    assert set(re.findall(r"^::: mmi_jax\.(\w+)$", pages, re.M)) == set(mmi_jax.__all__)


def test_every_registered_pattern_is_public():
    assert {pattern.__name__ for pattern in PATTERNS} <= set(mmi_jax.__all__)


def test_no_module_has_the_name_of_a_public_function():
    package = ROOT / "mmi_jax"
    assert not [n for n in mmi_jax.__all__ if (package / f"{n}.py").exists() or (package / n).exists()]


def test_importing_draws_no_pictures():
    code = "import sys, mmi_jax; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
