"""The persistent cache of compiled programs: unreadable entries are replaced, a full disk is no reason to stop."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmi_jax.cli import compile_cache


def program(x):
    for _ in range(100):
        x = jnp.sin(x @ x) + jnp.cos(x)
    return x


@pytest.fixture(autouse=True)
def quick_programs_are_cached(monkeypatch):
    monkeypatch.setattr(compile_cache, "MIN_COMPILE_SECONDS", 0.0)


def run(directory):
    """The program's result, compiled or read back."""
    with compile_cache.compilation_cache_in(directory):
        jax.clear_caches()
        return np.asarray(jax.jit(program)(jnp.ones((32, 32))))


def entries(directory):
    return sorted(directory.glob("jit_program-*-cache"))


@pytest.mark.parametrize("damage", [b"", b"garbage" * 100, None])
def test_an_unreadable_program_is_compiled_again_and_replaced(tmp_path, capsys, damage):
    """Empty, other bytes, or cut short, as a killed process leaves it."""
    first = run(tmp_path)
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    np.testing.assert_array_equal(run(tmp_path), first)
    assert "the cached program jit_program was unreadable: compiled again" in capsys.readouterr().err
    assert len(entries(tmp_path)[0].read_bytes()) == pytest.approx(len(whole), rel=0.2)
    np.testing.assert_array_equal(run(tmp_path), first)
    assert capsys.readouterr().err == "", "the entry is good again"


def test_a_full_disk_does_not_stop_a_run(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("jax._src.compilation_cache.put_executable_and_time", full)
    assert np.isfinite(run(tmp_path)).all()
    assert "the program jit_program is not cached" in capsys.readouterr().err and not entries(tmp_path)
