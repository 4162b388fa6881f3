"""Stages: the names that the packages open scopes by are those of the one list."""

import re
from pathlib import Path

from mmi_jax.engine.reporting.stages import MEMORY_STAGES, PROFILED_STAGES, SCOPE_PREFIX, Stage

ROOT = Path(__file__).parents[3]


def test_every_scope_in_the_sources_is_a_profiled_stage():
    files = [file for package in ("models", "mmi_jax", "pallas_kernels") for file in (ROOT / package).rglob("*.py")]
    literal = re.compile(rf'named_scope\("{re.escape(SCOPE_PREFIX)}(\w+)"\)')
    by_constant = re.compile(r"named_scope\(Stage\.(\w+)\.scope\)")
    opened = {name for file in files for name in literal.findall(file.read_text())}
    opened |= {Stage[name].value for file in files for name in by_constant.findall(file.read_text())}
    assert opened == {stage.value for stage in PROFILED_STAGES}


def test_stages_are_in_order_of_time():
    assert [MEMORY_STAGES[0], MEMORY_STAGES[-1]] == [Stage.EMBED, Stage.LOGITS]
    in_profile = [stage for stage in PROFILED_STAGES if stage in MEMORY_STAGES]
    assert in_profile == [stage for stage in MEMORY_STAGES if stage in PROFILED_STAGES]
    assert Stage.PLAN.scope == "mmi.plan"
