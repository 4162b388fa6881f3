"""`mmi bench tune`: the fastest right config is chosen, a wrong one never; and the table it goes to."""

import dataclasses
import itertools
import json
from typing import Any

import jax
import pytest

from mmi_jax.bench import tune
from mmi_jax.bench.timing import summary
from mmi_jax.cli import main
from pallas_kernels.attention import gpu_config, gpu_tuned, reference
from pallas_kernels.attention.gpu_config import CONFIGS, SHARED_MEMORY_BYTES, HopperConfig, choose_config
from pallas_kernels.attention.gpu_tuned import TunedEntry, read_table, write_table

PROBLEM = tune.TuneProblem(head_dim=64, num_q_heads=2, num_kv_heads=1, num_tokens=512)
FAST = HopperConfig(tile_kv=128, num_k_stages=3, num_v_stages=3)
ENTRY = TunedEntry(
    head_dim=128, block_kv=128, heads_per_kv_head=7, config=HopperConfig(tile_kv=128, num_k_stages=3, num_v_stages=2),
    tflops_per_s={"all": 617.0, "random": 619.5}, device="NVIDIA H200", date="2026-11-25", commit="abc123",
)  # fmt: skip


@dataclasses.dataclass
class StandIn:
    """In place of a compiled kernel: the reference's output, and a time that is made up."""

    ms: float
    error: float = 0.0

    def __call__(self, inputs):
        out, lse = _attend(inputs)
        return out * (1 + self.error), lse

    def time(self, inputs, *, repeats):
        return summary([self.ms] * repeats, compile_ms=0.0)


_attend = jax.jit(reference.attend)


def stand_ins(**of_fast) -> Any:
    """Each config a millisecond slower than the one before it, but `FAST` as told."""
    count = itertools.count()

    def compile_all(configs, inputs):
        return {c: StandIn(**of_fast) if c == FAST else StandIn(ms=10.0 + next(count)) for c in configs}

    return compile_all


def test_the_fastest_config_is_first_and_becomes_the_entry():
    found = tune.tune(PROBLEM, repeats=2, compile_all=stand_ins(ms=1.0))
    entry = tune.entry(PROBLEM, found["ranking"])
    assert entry.config == FAST and entry.key == (64, 128, 2)
    assert entry.tflops_per_s == found["ranking"][0]["tflops_per_s"] and set(entry.tflops_per_s) == {"all", "random"}
    rates = [row["tflops_per_s"]["random"] for row in found["ranking"]]
    tried = {HopperConfig(**row["config"]) for row in found["ranking"]}
    assert rates == sorted(rates, reverse=True) and len(rates) == len(tried)
    assert tried > {*tune.sizes(PROBLEM), *tune.variants([FAST])}


def test_a_wrong_config_is_never_chosen_and_last_with_the_reason():
    found = tune.tune(PROBLEM, repeats=1, compile_all=stand_ins(ms=1.0, error=0.1))
    wrong = found["ranking"][-1]
    assert HopperConfig(**wrong["config"]) == FAST and wrong["tflops_per_s"] == {}
    assert "relative error against float64 must be at most" in wrong["error"]
    assert "error" not in found["ranking"][0]


def test_without_a_right_config_there_is_no_entry():
    def compile_all(configs, inputs):
        return dict.fromkeys(configs, RuntimeError("out of registers"))

    with pytest.raises(RuntimeError, match="no config gives a right output: out of registers"):
        tune.tune(PROBLEM, repeats=1, compile_all=compile_all)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sizes_fit_the_shared_memory_and_hold_the_built_in_configs(head_dim):
    found = tune.sizes(dataclasses.replace(PROBLEM, head_dim=head_dim))
    assert all(config.shared_memory_bytes(head_dim, "bfloat16") <= SHARED_MEMORY_BYTES for config in found)
    assert {config for (d, _), config in CONFIGS.items() if d == head_dim} <= set(found)
    assert len(set(found)) == len(found)


def test_a_variant_differs_in_one_field():
    found = [dataclasses.asdict(config) for config in tune.variants([FAST])]
    changed = [{name for name, value in dataclasses.asdict(FAST).items() if value != one[name]} for one in found]
    assert [len(names) for names in changed] == [1] * len(found)
    assert set().union(*changed) == set(tune.DIALS)


def test_both_kinds_of_lists_have_one_shape():
    random, every = PROBLEM.inputs().values()
    shapes = lambda inputs: [(x.shape, x.dtype) for x in jax.tree.leaves(inputs)]  # noqa: E731
    assert shapes(random) == shapes(every)
    assert jax.tree.structure(random) == jax.tree.structure(every)
    assert every.index.visited_tiles()[0] == 10 and random.index.visited_tiles()[0] == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [(dict(head_dim=96), "64, 128 or 256, got 96"), (dict(num_q_heads=3, num_kv_heads=2), "must be a multiple")],
)
def test_a_problem_names_the_rule(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PROBLEM, **change)


@pytest.mark.skipif(gpu_config.has_hopper_gpu(), reason="there is a Hopper GPU")
def test_tune_refuses_without_a_hopper_gpu(capsys):
    assert main(["bench", "tune"]) == 2
    assert "tune needs a GPU of compute capability 9.x" in capsys.readouterr().err


def test_the_table_keeps_the_newest_entry_of_each_kind(tmp_path):
    path = tmp_path / "gpu_tuned.json"
    other = dataclasses.replace(ENTRY, head_dim=64)
    newer = dataclasses.replace(ENTRY, config=FAST, commit="def456")
    for entry in (ENTRY, other, newer):
        tune.keep(path, entry)
    assert read_table(path) == (other, newer)
    assert [p.name for p in tmp_path.iterdir()] == ["gpu_tuned.json"]
    assert len(path.read_text().splitlines()) == 4  # an entry a line


def spoiled(**changes):
    entry = dataclasses.asdict(ENTRY) | changes
    return {"version": 1, "entries": [{key: value for key, value in entry.items() if value is not None}]}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{", "must hold JSON"),
        ([], "must be an object with version 1, got list"),
        ({"version": 2, "entries": []}, "must be an object with version 1, got 2"),
        ({"version": 1, "entries": [], "model": "x"}, "unknown keys model: known keys are version, entries"),
        ({"version": 1, "entries": [7]}, "entry 0 of .* must be an object, got 7"),
        (spoiled(density=0.5), "unknown keys density: known keys are head_dim, block_kv"),
        (spoiled(device=None), "entry 0 of .* lacks device"),
        (spoiled(config={"tile_kv": 64}), "config of entry 0 of .* lacks num_k_stages, num_v_stages"),
        (spoiled(config={"tile_kv": 128, "num_k_stages": 2, "num_v_stages": 2, "warps": 4}), "unknown keys warps"),
        (spoiled(config={"tile_kv": 96, "num_k_stages": 2, "num_v_stages": 2}), "tile_kv must be 64 or 128"),
        ({"version": 1, "entries": 2 * spoiled()["entries"]}, "must have one entry for each .* got two of"),
    ],
)
def test_a_table_that_is_none_is_refused_with_the_rule(tmp_path, table, message):
    path = tmp_path / "gpu_tuned.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    with pytest.raises(ValueError, match=message):
        read_table(path)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Another table in place of the shipped one."""

    def ship(*entries):
        write_table(tmp_path / "gpu_tuned.json", entries)
        gpu_tuned._shipped.cache_clear()

    monkeypatch.setattr(gpu_tuned, "PATH", tmp_path / "gpu_tuned.json")
    gpu_tuned._shipped.cache_clear()
    yield ship
    gpu_tuned._shipped.cache_clear()


def test_the_nearest_ratio_is_taken_and_the_built_in_config_where_there_is_none(shipped):
    assert choose_config(128, 128) == CONFIGS[128, 128]
    four = dataclasses.replace(ENTRY, heads_per_kv_head=4, config=FAST)
    shipped(ENTRY, four)
    assert choose_config(128, 128, 8) == choose_config(128, 256, 7) == ENTRY.config
    assert choose_config(128, 128, 4) == choose_config(128, 128) == FAST
    assert choose_config(128, 64, 7) == CONFIGS[128, 64]
    assert choose_config(64, 128, 7) == CONFIGS[64, 128]
