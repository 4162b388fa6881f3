"""`mmi bench tune`: the fastest right config is chosen, a wrong one never; and the table it goes to."""

import dataclasses
import itertools
import json
from typing import Any

import jax
import pytest

from mmi_jax import files
from mmi_jax.bench import tune, tuned_table
from mmi_jax.bench.timing.wall_time import summary
from mmi_jax.bench.tuned_table import write_table
from mmi_jax.cli import main
from pallas_kernels.attention import reference
from pallas_kernels.attention.hopper import gpu_config, gpu_tuned
from pallas_kernels.attention.hopper.gpu_config import CONFIGS, HopperConfig
from pallas_kernels.attention.hopper.gpu_tuned import TunedEntry, choose_config, read_table
from pallas_kernels.device import has_hopper_gpu
from pallas_kernels.hopper import SHARED_MEMORY_BYTES

PROBLEM = tune.TuneProblem(head_dim=64, num_q_heads=2, num_kv_heads=1, num_tokens=512)
FAST = HopperConfig(tile_kv=128, num_k_stages=3, num_v_stages=3)
OTHER = HopperConfig(tile_kv=128, num_k_stages=2, num_v_stages=2)
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
    """Each config a millisecond slower than the one before it, but `FAST` as given."""
    count = itertools.count()

    def compile_all(configs, inputs):
        return {c: StandIn(**of_fast) if c == FAST else StandIn(ms=10.0 + next(count)) for c in configs}

    return compile_all


def test_the_fastest_config_is_first_and_becomes_the_entry():
    result = tune.tune(PROBLEM, repeats=2, compile_all=stand_ins(ms=1.0))
    entry = tuned_table.tuned_entry(PROBLEM, result["ranking"])
    assert entry.config == FAST and entry.key == (64, 128, 2)
    assert entry.tflops_per_s == result["ranking"][0]["tflops_per_s"] and set(entry.tflops_per_s) == {
        "all",
        "random",
        "short",
    }
    others = [row["tflops_per_s"]["random"] for row in result["ranking"] if "all" not in row["tflops_per_s"]]
    tried = {HopperConfig(**row["config"]) for row in result["ranking"]}
    assert others == sorted(others, reverse=True) and len(result["ranking"]) == len(tried)
    finalists = {HopperConfig(**row["config"]) for row in result["ranking"] if "all" in row["tflops_per_s"]}
    assert finalists > {config for (d, _), config in CONFIGS.items() if d == PROBLEM.head_dim}
    assert tried > {*tune.sizes(PROBLEM), *tune.variants([FAST])}


def test_a_wrong_config_is_never_chosen_and_last_with_the_reason():
    result = tune.tune(PROBLEM, repeats=1, compile_all=stand_ins(ms=1.0, error=0.1))
    wrong = result["ranking"][-1]
    assert HopperConfig(**wrong["config"]) == FAST and wrong["tflops_per_s"] == {}
    assert "relative error against float64 must be at most" in wrong["error"]
    assert "error" not in result["ranking"][0]


def test_without_a_right_config_there_is_no_entry():
    def compile_all(configs, inputs):
        return dict.fromkeys(configs, RuntimeError("out of registers"))

    with pytest.raises(RuntimeError, match="no config gives a right output: out of registers"):
        tune.tune(PROBLEM, repeats=1, compile_all=compile_all)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sizes_fit_the_shared_memory_and_hold_the_built_in_configs(head_dim):
    configs = tune.sizes(dataclasses.replace(PROBLEM, head_dim=head_dim))
    assert all(config.shared_memory_bytes(head_dim, "bfloat16") <= SHARED_MEMORY_BYTES for config in configs)
    assert {config for (d, _), config in CONFIGS.items() if d == head_dim} <= set(configs)
    assert len(set(configs)) == len(configs)


def test_a_variant_differs_in_one_field():
    configs = [dataclasses.asdict(config) for config in tune.variants([FAST])]
    changed = [
        {name for name, value in dataclasses.asdict(FAST).items() if value != config[name]} for config in configs
    ]
    assert [len(names) for names in changed] == [1] * len(configs)
    assert set().union(*changed) == set(tune.OTHER_FIELDS)


def test_all_kinds_of_lists_have_one_shape():
    random, short, every = PROBLEM.inputs().values()
    shapes = lambda inputs: [(x.shape, x.dtype) for x in jax.tree.leaves(inputs)]  # noqa: E731
    assert shapes(random) == shapes(short) == shapes(every)
    assert jax.tree.structure(random) == jax.tree.structure(short) == jax.tree.structure(every)
    assert every.index.visited_tiles()[0] == 10
    assert random.index.visited_tiles()[0] == short.index.visited_tiles()[0] == 7  # rows of 512 tokens are short


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(head_dim=96), "64, 128 or 256, got 96"),
        (dict(head_dim=300), "64, 128 or 256, got 300"),
        (dict(num_q_heads=3, num_kv_heads=2), "must be a multiple"),
        (dict(block_kv=96), "block_kv must be a multiple of 64, got 96"),
        (dict(block_kv=0), "block_kv must be a multiple of 64, got 0"),
        (dict(block_kv=1024), "block_kv must be at most num_tokens=512, got 1024"),
    ],
)
def test_a_problem_names_the_rule(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PROBLEM, **change)


@pytest.mark.skipif(has_hopper_gpu(), reason="there is a Hopper GPU")
def test_tune_refuses_without_a_hopper_gpu(capsys):
    assert main(["bench", "tune"]) == 2
    assert "tune needs a GPU of compute capability 9.x" in capsys.readouterr().err


def test_a_head_dim_above_the_last_is_refused():
    assert [gpu_config.padded_head_dim(d) for d in (1, 64, 65, 256)] == [64, 64, 128, 256]
    with pytest.raises(ValueError, match="head_dim must be at most 256, got 300"):
        gpu_config.padded_head_dim(300)


@pytest.fixture
def run_tune(monkeypatch):
    """`mmi bench tune` of one problem as on a Hopper GPU, the search itself replaced."""

    def run(table, search):
        monkeypatch.setattr("mmi_jax.cli.bench.commands.tune.has_hopper_gpu", lambda: True)
        monkeypatch.setattr("mmi_jax.cli.bench.runner.matmul_tflops_per_s", lambda: 1.0)
        monkeypatch.setattr(tuned_table, "tune", search)
        return main(["bench", "tune", "--head-dim", "64", "--heads", "2/1", "--table", str(table)])

    return run


FIGURES: dict[str, Any] = {
    "case": "d64 2/1",
    "tflops_per_s": 2.0,
    "ranking": [{"config": dataclasses.asdict(FAST), "tflops_per_s": {"random": 1.0, "all": 4.0}}],
}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nodir/x.json", None, "must be in a directory that exists"),
        (".", None, "must be a file, got a directory"),
        ("x.json", '{"version": 3, "entries": []}', "must be an object with version 2, got 3"),
        ("x.json", "{", "must hold JSON"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_before_the_search(tmp_path, capsys, run_tune, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert run_tune(tmp_path / name, lambda *_, **__: pytest.fail("searched")) == 2
    assert message in capsys.readouterr().err


def test_the_figures_outlive_a_table_that_breaks_during_the_search(tmp_path, capsys, run_tune):
    table = tmp_path / "x.json"

    def search(*_, **__):
        table.write_text("{")
        return dict(FIGURES)

    assert run_tune(table, search) == 1
    out = capsys.readouterr().out
    (case,) = json.loads(out.strip().splitlines()[-1])["cases"]
    assert case["ranking"] == FIGURES["ranking"] and case["tflops_per_s"] == 2.0
    assert case["error"].startswith(f"measured, but not saved in {table}: {table} must hold JSON")
    assert table.read_text() == "{"


def test_the_best_of_a_search_is_kept(tmp_path, run_tune):
    assert run_tune(tmp_path / "x.json", lambda *_, **__: dict(FIGURES)) == 0
    (entry,) = read_table(tmp_path / "x.json")
    assert (entry.config, entry.key) == (FAST, (64, 128, 2))
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o644


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text("old")

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="no space"):
        files.write_whole(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"] and path.read_text() == "old"


def test_the_table_keeps_the_newest_entry_of_each_kind(tmp_path):
    path = tmp_path / "gpu_tuned.json"
    other = dataclasses.replace(ENTRY, head_dim=64)
    newer = dataclasses.replace(ENTRY, config=OTHER, commit="def456")
    for entry in (ENTRY, other, newer):
        tuned_table.put_entry(path, entry)
    assert read_table(path) == (other, newer)
    assert [p.name for p in tmp_path.iterdir()] == ["gpu_tuned.json"]
    assert len(path.read_text().splitlines()) == 4  # an entry a line


def spoiled(**changes):
    entry = dataclasses.asdict(ENTRY) | changes
    return {"version": 2, "entries": [{key: value for key, value in entry.items() if value is not None}]}


def spoiled_config(**changes):
    return spoiled(config=dataclasses.asdict(ENTRY.config) | changes)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{", "must hold JSON"),
        ([], "must be an object with version 2, got list"),
        ({"version": 3, "entries": []}, "must be an object with version 2, got 3"),
        ({"version": 2, "entries": [], "model": "x"}, "unknown keys model: known keys are version, entries"),
        ({"version": 2, "entries": [7]}, "entry 0 of .* must be an object, got 7"),
        (spoiled(density=0.5), "unknown keys density: known keys are head_dim, block_kv"),
        (spoiled(device=None), "entry 0 of .* lacks device"),
        (spoiled(config={"tile_kv": 64}), "config of entry 0 of .* lacks num_k_stages, num_v_stages"),
        (spoiled(config={"tile_kv": 128, "num_k_stages": 2, "num_v_stages": 2, "warps": 4}), "unknown keys warps"),
        (spoiled(config={"tile_kv": 96, "num_k_stages": 2, "num_v_stages": 2}), "tile_kv must be 64 or 128"),
        (b"\xff\xfe\x00", "must hold JSON"),
        ({"version": 2, "entries": None}, "entries of .* must be a list, got None"),
        (spoiled(head_dim="128"), "head_dim of entry 0 of .* must be an integer, got '128'"),
        (spoiled(heads_per_kv_head=True), "heads_per_kv_head of entry 0 of .* must be an integer, got True"),
        (spoiled(commit=7), "commit of entry 0 of .* must be a string, got 7"),
        (spoiled(tflops_per_s=[1.0]), "tflops_per_s of entry 0 of .* must be an object"),
        (spoiled(tflops_per_s={"all": "fast"}), "tflops_per_s of entry 0 of .* must hold positive numbers"),
        (spoiled(heads_per_kv_head=0), "entry 0 of .*: heads_per_kv_head must be at least 1, got 0"),
        (spoiled(head_dim=96), "entry 0 of .*: head_dim must be 64, 128 or 256, got 96"),
        (spoiled(block_kv=256), "entry 0 of .*: block_kv must be 64 or 128, got 256"),
        (spoiled(block_kv=64), "entry 0 of .*: tile_kv must divide block_kv=64, got 128"),
        (spoiled_config(num_k_stages="3"), "num_k_stages of config of entry 0 of .* must be an integer, got '3'"),
        (spoiled_config(ping_pong=1), "ping_pong of config of entry 0 of .* must be true or false, got 1"),
        (spoiled_config(num_k_stages=9), "entry 0 of .*: the config's shared memory must be at most 232448 bytes, got"),
        ({"version": 2, "entries": 2 * spoiled()["entries"]}, "must have one entry for each .* got two of"),
    ],
)
def test_a_table_that_is_none_is_refused_with_the_rule(tmp_path, table, message):
    path = tmp_path / "gpu_tuned.json"
    text = table if isinstance(table, str | bytes) else json.dumps(table)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=message) as error:
        read_table(path)
    assert str(path) in str(error.value)


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
    four = dataclasses.replace(ENTRY, heads_per_kv_head=4, config=OTHER)
    shipped(ENTRY, four)
    assert choose_config(128, 128, 8) == choose_config(128, 256, 7) == ENTRY.config
    assert choose_config(128, 128, 4) == choose_config(128, 128) == OTHER
    assert choose_config(128, 64, 7) == CONFIGS[128, 64]
    assert choose_config(64, 128, 7) == CONFIGS[64, 128]
